"""Attacks on checkpoints: a file that would run code when it is loaded is refused first."""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from care_train.training.folders import find_damage, write_manifest
from tests.train.runs import FastRun, run, text_run_arguments


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


def _within_the_state(path: Path, says: Path) -> None:
    """The file as it was, and a payload among its values."""
    content = torch.load(path, weights_only=False)
    torch.save({**content, "client_state": Payload(says)}, path)


def _instead_of_the_file(path: Path, says: Path) -> None:
    """A plain pickle, no archive of torch's."""
    path.write_bytes(pickle.dumps(Payload(says)))


def _by_a_name_of_torchs(path: Path, says: Path) -> None:
    """torch's old format, which is a row of pickles."""
    torch.save({"module": Payload(says)}, path, _use_new_zipfile_serialization=False)


FILES = [
    (0, "state/mp_rank_00_model_states.pt"),
    (0, "rank_00000.pt"),
    (2, "state/zero_pp_rank_0_mp_rank_00_optim_states.pt"),
    (2, "state/mp_rank_00_model_states.pt"),
    (3, "state/zero_pp_rank_0_mp_rank_00_optim_states.pt"),
    (3, "state/zero_pp_rank_0_mp_rank_00_model_states.pt"),
]


# Every file for one attack; DeepSpeed's reader and ours for the others.
ATTACKS = [
    *((_within_the_state, *file) for file in FILES),
    *(
        (plant, *file)
        for plant in (_instead_of_the_file, _by_a_name_of_torchs)
        for file in FILES[:2]
    ),
]


@pytest.mark.parametrize(("plant", "stage", "name"), ATTACKS)
def test_a_checkpoint_that_would_run_code_is_refused(plant, stage, name, trained, tmp_path):
    """With a manifest that fits, as whoever can write the files can make: `--resume` and `export`
    end with status 2 and name the checkpoint; nothing of the payload was called."""
    folder, says = tmp_path / "run", tmp_path / "says"
    shutil.copytree(trained / f"zero{stage}", folder)
    checkpoint = folder / "checkpoints" / "step_000001"
    plant(checkpoint / name, says)
    (checkpoint / "manifest.json").unlink()
    write_manifest(checkpoint)
    resumed = ("train", f"resume={folder}", "train.steps=2")
    exported = ("export", f"--run={folder}", f"--out={tmp_path / 'out'}")
    # The export reads weights alone: of ZeRO-0 and 2 from one file, of ZeRO-3 from all shards.
    reads = "model_states" in name or (stage == 3 and "optim" in name)
    for command in (resumed, exported) if reads else (resumed,):
        [(status, errors)] = FastRun(*command).end()
        assert status == 2 and "Traceback" not in errors, errors
        assert f"{checkpoint}: a file holds more than tensors and plain data" in errors or (
            plant is not _within_the_state and "a file is none that DeepSpeed wrote" in errors
        ), errors
        assert not says.exists()


@pytest.mark.parametrize("name", ["state/bf16_zero_pp_rank_9_mp_rank_00_optim_states.pt", "x.py"])
def test_a_file_that_the_manifest_does_not_name_is_damage(name, trained, tmp_path):
    """DeepSpeed loads what it finds in the folder; a file that was added is found before."""
    checkpoint = tmp_path / "step_000001"
    shutil.copytree(trained / "zero3" / "checkpoints" / "step_000001", checkpoint)
    assert find_damage(checkpoint) is None
    (checkpoint / name).write_bytes(b"more")
    assert find_damage(checkpoint) == f"{name} is not in manifest.json"


@pytest.mark.parametrize(
    "entries",
    [
        [],
        {"files": []},
        {"files": {"a": 1}},
        {"files": {"../../etc/passwd": {"size": 1, "blake2b": "x"}}},
        {"files": {"/etc/passwd": {"size": 1, "blake2b": "x"}}},
    ],
)
def test_a_manifest_of_another_form_is_damage(entries, tmp_path):
    """Also one that names files elsewhere: they are not looked at."""
    (tmp_path / "manifest.json").write_text(json.dumps(entries))
    assert find_damage(tmp_path) == "manifest.json is damaged"


def test_a_link_in_a_checkpoint_is_damage(trained, tmp_path):
    """It would lead to a file that can change after its checksum was compared."""
    checkpoint = tmp_path / "step_000001"
    shutil.copytree(trained / "zero0" / "checkpoints" / "step_000001", checkpoint)
    file = checkpoint / "trainer_state.json"
    file.rename(tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    assert find_damage(checkpoint) == "trainer_state.json is missing"
