"""Attacks on checkpoints and models: what would run code when it is loaded is refused first."""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from care_train.training.folders import find_damage, write_manifest
from tests.security.conftest import one_rank
from tests.train.builders import load
from tests.train.runs import run, text_run_arguments


class Payload:
    """Pickled, it calls a function of the attacker's choice when it is loaded."""

    def __init__(self, says: Path) -> None:
        self._says = says

    def __reduce__(self):
        return os.system, (f"touch {self._says}",)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Runs of one step under ZeRO-0, 2 and 3, each with its checkpoint."""
    out = tmp_path_factory.mktemp("trained")
    for stage in (0, 2, 3):
        own = ("algorithm=grpo", "train.steps=1", "train.schedule=constant", "train.save_every=1")
        run(*text_run_arguments(out), *own, f"name=zero{stage}", f"deepspeed.zero_stage={stage}")
    return out


PLANTS = {
    # The file as it was, and a payload among its values.
    "within the state": lambda path, payload: torch.save(
        {**torch.load(path, weights_only=False), "client_state": payload}, path
    ),
    # A plain pickle, no archive of torch's.
    "instead of the file": lambda path, payload: path.write_bytes(pickle.dumps(payload)),
    # torch's old format, which is a row of pickles.
    "torch's old format": lambda path, payload: torch.save(
        {"module": payload}, path, _use_new_zipfile_serialization=False
    ),
}

# The ZeRO stage, a file that the commands read, and the commands: an export reads weights alone,
# of ZeRO-0 and 2 from one file, of ZeRO-3 from all shards.
RESUME, BOTH = ("resume",), ("resume", "export")
ATTACKS = [
    ("within the state", 0, "rank_00000.pt", RESUME),
    ("within the state", 2, "state/zero_pp_rank_0_mp_rank_00_optim_states.pt", RESUME),
    ("within the state", 3, "state/zero_pp_rank_0_mp_rank_00_optim_states.pt", BOTH),
    ("within the state", 3, "state/zero_pp_rank_0_mp_rank_00_model_states.pt", BOTH),
    ("instead of the file", 0, "state/mp_rank_00_model_states.pt", BOTH),
    ("torch's old format", 2, "state/mp_rank_00_model_states.pt", BOTH),
]


@pytest.mark.parametrize(("plant", "stage", "name", "commands"), ATTACKS)
def test_a_checkpoint_that_would_run_code_is_refused(
    plant, stage, name, commands, trained, tmp_path
):
    """With a manifest that fits, as whoever can write the files can make: `--resume` and `export`
    end with status 2 and name the checkpoint; nothing of the payload was called."""
    folder, says = tmp_path / "run", tmp_path / "says"
    shutil.copytree(trained / f"zero{stage}", folder)
    checkpoint = folder / "checkpoints" / "step_000001"
    PLANTS[plant](checkpoint / name, Payload(says))
    (checkpoint / "manifest.json").unlink()
    write_manifest(checkpoint)
    arguments = {
        "resume": ("train", f"resume={folder}", "train.steps=2"),
        "export": ("export", f"--run={folder}", f"--out={tmp_path / 'out'}"),
    }
    for command in commands:
        status, errors = one_rank(*arguments[command])
        assert status == 2 and "Traceback" not in errors, errors
        assert f"{checkpoint}: a file holds more than tensors and plain data" in errors or (
            "within" not in plant and "a file is none that DeepSpeed wrote" in errors
        ), errors
        assert not says.exists()


def test_what_the_manifest_does_not_say_is_damage(trained, tmp_path):
    """DeepSpeed loads what it finds in the folder, so a file that was added is damage. So is a
    link, which would lead to a file that can change after its checksum was compared."""
    checkpoint = tmp_path / "step_000001"
    shutil.copytree(trained / "zero3" / "checkpoints" / "step_000001", checkpoint)
    assert find_damage(checkpoint) is None
    added = checkpoint / "state" / "bf16_zero_pp_rank_9_mp_rank_00_optim_states.pt"
    added.write_bytes(b"more")
    assert find_damage(checkpoint) == f"state/{added.name} is not in manifest.json"
    added.unlink()
    file = checkpoint / "trainer_state.json"
    file.rename(tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    assert find_damage(checkpoint) == "trainer_state.json is missing"


@pytest.mark.parametrize("files", [[], {"a": 1}, {"../../x": {"size": 1, "blake2b": "x"}}])
def test_a_manifest_of_another_form_is_damage(files, tmp_path):
    """Also one that names files elsewhere: they are not looked at."""
    (tmp_path / "manifest.json").write_text(json.dumps({"files": files}))
    assert find_damage(tmp_path) == "manifest.json is damaged"


CODE = """
from pathlib import Path
Path({mark!r}).touch()
class Own: pass
"""
MAPS = {
    "config.json": {"AutoConfig": "code.Own", "AutoModelForImageTextToText": "code.Own"},
    "tokenizer_config.json": {"AutoTokenizer": ["code.Own", "code.Own"]},
    "processor_config.json": {"AutoProcessor": "code.Own", "AutoImageProcessor": "code.Own"},
}


@pytest.mark.parametrize("name", MAPS)
def test_code_of_a_models_folder_is_not_run(name, tiny_folder, tmp_path, monkeypatch):
    """A model that names its own classes is read by transformers' or refused by name."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder(), folder)
    (folder / "code.py").write_text(CODE.format(mark=str(tmp_path / "ran")))
    path = folder / name
    values = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(values | {"auto_map": MAPS[name]}))

    def asked(*_):
        raise AssertionError("asked on standard input")

    monkeypatch.setattr("builtins.input", asked)
    try:
        load(folder)
    except ValueError as error:
        assert str(folder) in str(error)
    assert not (tmp_path / "ran").exists()
