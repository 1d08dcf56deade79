"""Kill real runs, resume them, and compare with runs that nothing interrupted; what a resume
refuses, what it takes, and what it cuts."""

import json
import random
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from care_train.cli import main
from care_train.config import load_config
from care_train.data import load_samples
from care_train.training import sft
from care_train.training.checkpoint import Checkpoint
from care_train.training.resume import (
    check_identity,
    check_progress,
    check_settings,
    cut_logs,
    identity,
    settings_of,
)
from tests.train.builders import load, make_config
from tests.train.runs import (
    COLD_START,
    FastRun,
    assert_same_runs,
    cold_start,
    errors_of,
    run,
    steps_logged,
    timeless,
)

STEPS = 6


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("resume")


@pytest.fixture(scope="module")
def start(out, color_rows) -> list[str]:
    return cold_start(out, color_rows)


@pytest.fixture(scope="module")
def whole(start, out) -> Path:
    """A run of STEPS steps that nothing interrupted."""
    run(*start, *_schedule(), "name=whole")
    assert any(record.get("grad_norm", 0) > 0 for record in timeless(out / "whole"))
    return out / "whole"


def _schedule(steps: int = STEPS) -> list[str]:
    return [f"train.steps={steps}", "train.save_every=2", "train.eval_every=2"]


def test_killed_in_a_save_then_stopped_by_sigterm_a_run_ends_the_same(start, out, whole):
    """SIGKILL inside the second checkpoint write, --resume, SIGTERM, resume=FOLDER: same bits."""
    folder = out / "killed"
    arguments = [*start, *_schedule(), "name=killed"]
    partial = folder / "checkpoints" / "step_000004.partial"
    first = FastRun(*arguments)
    assert first.wait_for(partial.exists)
    first.kill()
    assert min(_saves(folder)) == "step_000002"
    second = FastRun(*arguments, "--resume")
    assert second.wait_for(lambda: _resumed_at_four(folder))
    second.send(signal.SIGTERM)
    status, errors = second.end()[0]
    assert status == 75, errors
    assert "SIGTERM: stopped after step" in errors and f"resume={folder}" in errors
    assert not partial.exists()
    run("train", f"resume={folder}")
    assert_same_runs(folder, whole)


def _resumed_at_four(folder: Path) -> bool:
    """The killed run logged 4 steps or more; the resumed one, cut to 2, logs the third anew."""
    return (folder / "checkpoints" / "step_000004").exists() or steps_logged(folder) == 3


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(out, whole, caplog, capsys):
    """One flipped byte in the newest: a warning, then the same run from the one before.

    Also: what the run exports is what it trained, which was no adapter.
    """
    before = timeless(whole), load_file(whole / "final" / "model.safetensors")
    states = whole / "checkpoints" / f"step_{STEPS:06d}" / "state" / "mp_rank_00_model_states.pt"
    content = bytearray(states.read_bytes())
    content[len(content) // 2] ^= 1
    states.write_bytes(content)
    assert main(["train", f"resume={whole}"]) == 0
    assert f"step_{STEPS:06d}" in caplog.text and "checksum" in caplog.text
    assert timeless(whole) == before[0]
    exported = out / "exported"
    assert main(["export", f"--run={whole}", f"--out={exported}"]) == 0
    for path in (whole / "final", exported):
        again = load_file(path / "model.safetensors")
        assert all((again[name] == tensor).all() for name, tensor in before[1].items())
    assert main(["export", f"--run={whole}", f"--out={out / 'none'}", "--adapter"]) == 2
    assert "trained all weights (model.lora.rank=0)" in capsys.readouterr().err
    AutoModelForImageTextToText.from_pretrained(exported)
    AutoProcessor.from_pretrained(exported)


def test_what_a_selector_has_learnt_goes_on(start, out, monkeypatch, tmp_path):
    """`care.selector=learned`, gone on with from the middle: what it chooses is the same."""
    monkeypatch.setattr("care_train.algorithm.fixability.MIN_OUTCOMES", 4)
    # Half of all responses are right, so that repairs succeed and fail.
    odd, folder = tmp_path / "odd.py", out / "learned"
    odd.write_text(
        "def f(reward_inputs):\n    return [len(r['response']) % 2 for r in reward_inputs]"
    )
    learned = ["care.selector=learned", "train.keep_checkpoints=3", "name=learned"]
    learned += [f"reward.functions=[{{function: '{odd}:f'}}]"]
    assert main([*start, *_schedule(), *learned]) == 0
    before, newest = timeless(folder), folder / "checkpoints" / f"step_{STEPS:06d}"
    learnt = _learnt(newest)
    assert {outcome[-1] for outcome in learnt} == {0.0, 1.0}
    shutil.rmtree(newest)
    assert main(["train", f"resume={folder}"]) == 0
    assert timeless(folder) == before and _learnt(newest) == learnt


def _learnt(checkpoint: Path) -> list[list[float]]:
    return json.loads((checkpoint / "trainer_state.json").read_text())["fixability"]


def test_a_cold_start_goes_on_too(start, out, monkeypatch):
    """Cut off in step 18 with checkpoints every 10, resumed: the weights of one that ran through.

    Resumed once more it has nothing to do.
    """
    common = start[1:-1]  # Without the command and the model.
    arguments = ["sft", *common, *COLD_START, "name=cut", "train.save_every=10"]
    real = sft.SftLoop.step

    def cut(loop, step):
        if step == 17:
            raise KeyboardInterrupt
        return real(loop, step)

    monkeypatch.setattr(sft.SftLoop, "step", cut)
    with pytest.raises(KeyboardInterrupt):
        main(arguments)
    monkeypatch.setattr(sft.SftLoop, "step", real)
    assert _saves(out / "cut", "cold_start_checkpoints") == {"step_000010"}
    for _ in range(2):
        assert main([*arguments, "--resume"]) == 0
        assert timeless(out / "cut") == timeless(out / "cold")
    weights = [
        (out / name / "final" / "model.safetensors").read_bytes() for name in ("cut", "cold")
    ]
    assert weights[0] == weights[1]
    assert not (out / "cut" / "cold_start_checkpoints").exists()


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("ranks", "stage", "more"),
    [(1, 2, ()), (1, 3, ()), (2, 2, ()), (2, 3, ()), (2, 3, ("model.lora.rank=4",))],
)
def test_kills_at_random_lose_nothing(ranks, stage, more, start, out):
    """Five SIGKILLs at random moments for each of one and two ranks, ZeRO-2 and ZeRO-3: 20; and
    five with adapters."""
    draw = random.Random(f"{ranks}/{stage}")
    arguments = [
        *(*start, *more, f"deepspeed.zero_stage={stage}", "train.steps=40"),
        *("train.save_every=1", "train.eval_every=5", "train.keep_best=accuracy"),
    ]
    names = [f"{kind}-{ranks}-{stage}-{len(more)}" for kind in ("calm", "killed")]
    run(*arguments, f"name={names[0]}", ranks=ranks)
    folder = out / names[1]
    for _ in range(5):
        attempt = FastRun(*arguments, f"name={names[1]}", "--resume", ranks=ranks)
        known = _saves(folder)
        assert attempt.wait_for(lambda known=known: bool(_saves(folder) - known)), attempt.end()
        time.sleep(draw.uniform(0, 0.8))
        attempt.kill()
    assert steps_logged(folder) < 40, "the kills came too late to mean anything"
    run(*arguments, f"name={names[1]}", "--resume", ranks=ranks)
    assert_same_runs(folder, out / names[0])


def _saves(run_dir: Path, folder: str = "checkpoints") -> set[str]:
    return {path.name for path in (run_dir / folder).glob("step_*")}


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_both(start, out):
    """Two ranks under ZeRO-3, SIGTERM to the second alone: both save together and leave."""
    arguments = [*start, *_schedule(40), "deepspeed.zero_stage=3", "name=one-of-two"]
    folder = out / "one-of-two"
    both = FastRun(*arguments, ranks=2)
    assert both.wait_for(lambda: steps_logged(folder) >= 3)
    both.send(signal.SIGTERM, rank=1)
    status, errors = both.end()[0]
    assert status == 75, errors
    [errors] = errors_of("train", f"resume={folder}", status=2)
    assert "was saved by 2 ranks, got 1" in errors


REFUSED = [
    ({"train": {"learning_rate": 2e-3}}, "train.learning_rate: saved 0.001, got 0.002"),
    ({"data": {"path": "other.jsonl"}}, "data.path: saved 'easy_vqa', got 'other.jsonl'"),
    (
        {"deepspeed": {"zero_stage": 2}, "allow_changes": ["deepspeed"]},
        "deepspeed.zero_stage: saved 0, got 2",
    ),
    # Another rank of adapters, or none: the checkpoint's files would not fit.
    (
        {"model": {"lora": {"rank": 8}}, "allow_changes": ["model"]},
        "model.lora.rank: saved 0, got 8",
    ),
    ({"deepspeed": {"config": {"wall_clock_breakdown": True}}}, "saved None, got True"),
    ({"allow_changes": ["train.lr"]}, "allow_changes: got 'train.lr', which is no setting"),
    # More steps where the schedule looks at them.
    ({"train": {"schedule": "cosine", "steps": 9}}, "train.steps: saved 2, got 9"),
]
TAKEN = [
    # Evaluation, logging, checkpoints and names change nothing.
    {"name": "other", "eval": {"also": [], "samples": 2}, "logging": {"samples_every": 3}},
    {"train": {"steps": 9, "save_every": 3, "keep_best": "accuracy", "eval_every": 2}},
    {"train": {"learning_rate": 2e-3}, "allow_changes": ["train.learning_rate"]},
]


def test_settings_of_a_resume():
    """What would change its way is refused with key, saved and new value; what changes nothing, or
    is allowed, is taken."""
    saved = settings_of(make_config())
    cosine = settings_of(make_config({"train": {"schedule": "cosine"}}))
    for change, message in REFUSED:
        before = cosine if "train.steps" in message else saved
        with pytest.raises(ValueError, match=re.escape(message)):
            check_settings(before, make_config(change), where=Path("step_000002"))
    for change in TAKEN:
        check_settings(saved, make_config(change), where=Path("x"))
    # One that only an older version had would be lost.
    with pytest.raises(ValueError, match=r"earlier version, which had care\.think_share: go on"):
        check_settings(saved | {"care.think_share": 0.5}, make_config(), where=Path("x"))
    # A key that an older version did not have counts as at its default.
    del saved["loss.dual_clip"]
    check_settings(saved, make_config(), where=Path("x"))


def test_a_resume_refuses_fewer_steps_and_other_ranks():
    """train.steps below what is done; a number of ranks the files are not for."""
    done = Checkpoint(Path("step_000004"), {"step": 4, "ranks": 1})
    with pytest.raises(ValueError, match=r"train\.steps: got 2, wanted at least the 4 steps"):
        check_progress(done, "train.steps", 2)
    with pytest.raises(ValueError, match="was saved by 2 ranks, got 1"):
        check_progress(Checkpoint(Path("x"), {"step": 4, "ranks": 2}), "train.steps", 9)


def test_logs_are_cut_back_to_the_checkpoint(tmp_path):
    """Lines after it go, a torn one too; a log without a size goes altogether."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"st')
    (tmp_path / "care_events.jsonl").write_text('{"step": 2}\n')
    cut_logs(tmp_path, {"metrics.jsonl": len('{"step": 1}\n')}, step=1)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'
    assert (tmp_path / "care_events.jsonl").read_text() == ""


def test_resume_names_a_folder(tmp_path):
    """`resume=FOLDER` takes its configuration, wherever the folder is now."""
    run = tmp_path / "moved"
    with pytest.raises(ValueError, match=r"no config\.yaml there"):
        load_config(None, [f"resume={run}"])
    run.mkdir()
    (run / "config.yaml").write_text("name: old\noutput_dir: runs\nseed: 3\n")
    config = load_config(None, [f"resume={run}", "train.steps=7"])
    assert (config.resume, config.name, config.output_dir) == (True, "moved", str(tmp_path))
    assert (config.seed, config.train.steps) == (3, 7)
    assert load_config(None, ["resume=true"]).resume is True


def test_a_resume_refuses_other_pixels(color_rows: Path, tiny_folder, tmp_path: Path):
    """The same rows over a changed image file are other rows."""
    folder = Path(shutil.copytree(color_rows.parent, tmp_path / "rows"))
    config = make_config({"data": {"path": str(folder / "rows.jsonl")}})
    model = load(tiny_folder()).model

    def now() -> dict:
        return identity(config, load_samples(config.data), model)

    checkpoint = Checkpoint(tmp_path / "step_000001", now())
    check_identity(checkpoint, now(), "data.path", config)
    with Image.open(folder / "3.png") as image:
        image.putpixel((5, 5), (9, 9, 9))
        image.save(folder / "3.png")
    with pytest.raises(ValueError, match=r"data\.path: its rows are not those that"):
        check_identity(checkpoint, now(), "data.path", config)
