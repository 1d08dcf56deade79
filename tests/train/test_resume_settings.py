"""What a resume refuses, what it takes, and what it cuts."""

from pathlib import Path

import pytest

from care_train.config import load_config
from care_train.training.checkpoint import Checkpoint
from care_train.training.resume import check_progress, check_settings, cut_logs, settings_of
from tests.train.builders import make_config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": {"learning_rate": 2e-3}}, "train.learning_rate: saved 0.001, got 0.002"),
        ({"seed": 1}, "seed: saved 0, got 1"),
        ({"data": {"path": "other.jsonl"}}, "data.path: saved 'easy_vqa', got 'other.jsonl'"),
        ({"deepspeed": {"zero_stage": 2}}, "deepspeed.zero_stage: saved 0, got 2"),
        (
            {"deepspeed": {"zero_stage": 2}, "allow_changes": ["deepspeed"]},
            "deepspeed.zero_stage: saved 0, got 2",
        ),
        ({"deepspeed": {"config": {"wall_clock_breakdown": True}}}, "saved None, got True"),
        ({"allow_changes": ["train.lr"]}, "allow_changes: got 'train.lr', which is no setting"),
        ({"sft": {"steps": 7}}, "sft.steps: saved 160, got 7"),
    ],
)
def test_a_resume_refuses_settings_that_would_change_its_way(change, message):
    """Key, saved and new value are named."""
    with pytest.raises(ValueError) as error:
        check_settings(settings_of(make_config()), make_config(change), where=Path("step_000002"))
    assert message in str(error.value)


def test_a_resume_takes_settings_that_change_nothing_or_are_allowed():
    """Evaluation, logging, checkpoints and names; more steps where no schedule looks at them."""
    saved = settings_of(make_config())
    free = {
        "name": "other",
        "eval": {"greedy": False, "samples": 2},
        "logging": {"samples_every": 3},
        "train": {"steps": 9, "save_every": 3, "keep_best": "accuracy", "eval_every": 2},
    }
    check_settings(saved, make_config(free), where=Path("x"))
    allowed = {"train": {"learning_rate": 2e-3}, "allow_changes": ["train.learning_rate"]}
    check_settings(saved, make_config(allowed), where=Path("x"))
    # A key that an older version did not have counts as at its default.
    check_settings(
        {k: v for k, v in saved.items() if k != "loss.dual_clip"}, make_config(), where=Path("x")
    )
    cosine = {"train": {"schedule": "cosine"}}
    longer = make_config({"train": {"schedule": "cosine", "steps": 9}})
    with pytest.raises(ValueError, match=r"train\.steps: saved 2, got 9"):
        check_settings(settings_of(make_config(cosine)), longer, where=Path("x"))


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
