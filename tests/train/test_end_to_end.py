"""Whole runs through the command line, on tiny real models and drawn images."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from care_train.cli import main
from care_train.reporting import read_archive
from care_train.reporting.archive import archive_files
from care_train.training.timer import MODEL_PARTS
from tests.train.runs import (
    COLD_START,
    ROOT,
    SMALL,
    data_arguments,
    python,
    records,
    run,
    summary,
)

OWN = (
    "rollout.max_new_tokens=32",
    "train.steps=3",
    "train.schedule=constant",
    "eval.also=[greedy]",
)


@pytest.fixture(scope="module")
def start(from_cold_start) -> list[str]:
    return [*from_cold_start, *OWN]


def _train(start: Sequence[str], out: Path, *arguments: str, ranks: int = 1) -> Path:
    """The folder of a run that must succeed."""
    run(*start, f"output_dir={out}", "name=run", *arguments, ranks=ranks)
    return out / "run"


def test_a_run_leaves_everything_it_promises(start, tmp_path):
    """`python -m care_train train` as a user types it: config, metrics, summary, checkpoints, final
    model, plots and report."""
    own = (f"output_dir={tmp_path}", "name=care", "eval.also=[greedy,blind]")
    done = python("-m", "care_train", *start, *own)
    folder = tmp_path / "care"
    for name in ("config.yaml", "metrics.jsonl", "summary.json", "report.md"):
        assert (folder / name).stat().st_size > 0, name
    assert (folder / "learning_curves.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step_000003"]
    facts = summary(folder)
    assert facts["algorithm"] == "care" and facts["steps"] == 3
    for key in ("accuracy", "format", "greedy", "blind"):
        assert 0 <= facts[f"{key}_before"] <= 1 and 0 <= facts[f"{key}_after"] <= 1
    assert facts["sampled_sequences"] >= 3 * 4 * 4
    assert facts["decoded_tokens"] > 0 and facts["wall_seconds"] > 0
    assert len(records(folder)) == 3 and len(records(folder, "eval")) == 2
    _assert_times_add_up(records(folder))
    model = AutoModelForImageTextToText.from_pretrained(folder / "final")
    AutoProcessor.from_pretrained(folder / "final")
    assert model.config.model_type == "qwen2_5_vl"
    # What it prints: scores before and after, no warnings, no tracebacks.
    assert "accuracy" in done.stdout and "before" in done.stdout
    assert "arning" not in done.stderr, done.stderr
    # Without bars lines of the first step and the last, and a group of step 2
    # (logging.samples_every).
    lines = done.stderr.splitlines()
    shown = [line.split()[1] for line in lines if line.startswith("care ")]
    assert (shown[0], shown[-1]) == ("1/3", "3/3")
    assert sum("step 2 · " in line for line in lines) == 1
    assert any(line.split()[1:2] == ["reference"] for line in lines)


def _assert_times_add_up(metrics: list[dict]) -> None:
    """Every moment of a step is in exactly one part, and overhead is what no model computes in."""
    wanted = {"sync", "prepare", "generate", "score", "old_forward", "select", "collate", "update"}
    for values in metrics:
        parts = {k.removeprefix("seconds_"): v for k, v in values.items() if "seconds_" in k}
        overhead = parts.pop("overhead")
        assert wanted | {"optimizer", "other"} <= parts.keys()
        assert all(seconds >= 0 for seconds in parts.values())
        assert sum(parts.values()) == pytest.approx(values["seconds"])
        model = sum(seconds for part, seconds in parts.items() if part in MODEL_PARTS)
        assert overhead == pytest.approx(values["seconds"] - model)


ON_RANKS = ("loss.kl_coef=0.1", "train.mini_batches=2", "prompt.max_prompt_tokens=200")
PACKED = ("train.packing=true", "train.micro_batch_tokens=264", "train.gradient_checkpointing=true")


@pytest.fixture(scope="module")
def on_one_rank(start, tmp_path_factory) -> Path:
    """The run that two ranks follow."""
    return _train(start, tmp_path_factory.mktemp("one"), *ON_RANKS)


@pytest.mark.parametrize(
    ("stage", "batches"), [(2, ()), (3, PACKED)], ids=["zero2", "zero3-packed"]
)
def test_two_ranks_follow_one(stage, batches, on_one_rank, start, tmp_path):
    """Two gloo ranks under ZeRO-2, or under ZeRO-3 with packs of a token budget and checkpointing,
    take one process's trajectory at the same batch: scores, reference and training.

    Rollouts are seeded per request, so both sample the same responses; what differs is the order
    of float32 sums over micro-batches and ranks, which AdamW's division by sqrt(v) can amplify in
    weights whose gradient is near zero: hence 1e-3 on losses of order 1 over three steps.
    """
    more = (*ON_RANKS, f"deepspeed.zero_stage={stage}", *batches)
    double = _train(start, tmp_path, *more, ranks=2)
    for one, two in zip(records(on_one_rank), records(double), strict=True):
        assert one["decoded_tokens"] == two["decoded_tokens"]
        assert one["trained_sequences"] == two["trained_sequences"]
        for key in ("reward", "reward_std", "accuracy", "loss", "kl", "entropy"):
            assert one[key] == pytest.approx(two[key], abs=1e-3), key
        assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=2e-2)
    _assert_same_archive(on_one_rank, double)


def _assert_same_archive(single: Path, double: Path) -> None:
    """Each of two ranks wrote its own groups and answers: together they are those of one rank, with
    the numbers of its update but for the order of sums."""
    files = {(file.kind, file.rank) for file in archive_files(double)}
    assert files == {(kind, rank) for kind in ("step", "eval") for rank in (0, 1)}
    assert {row["rank"] for row in read_archive(double, columns=["rank"]).to_pylist()} == {0, 1}
    for evaluations, names in ((True, ("images", "text")), (False, ("images", "outcome"))):
        ours, theirs = (_by_row(run, evaluations) for run in (single, double))
        assert ours.keys() == theirs.keys() and ours
        for key, row in ours.items():
            assert [row[name] for name in names] == [theirs[key][name] for name in names]
            pairs = zip(row.get("rollouts", ()), theirs[key].get("rollouts", ()), strict=True)
            for one, two in pairs:
                for name in ("text", "role", "trained", "accuracy"):
                    assert one[name] == two[name]
                for name in ("token_advantages", "old_log_probs", "ref_log_probs"):
                    assert one[name] == (two[name] and pytest.approx(two[name], abs=1e-2))


def _by_row(run: Path, evaluations: bool) -> dict[tuple, dict]:
    rows = read_archive(run, evaluations=evaluations).to_pylist()
    found = {(row["step"], row.get("decoding"), row["row_id"], row["visit"]): row for row in rows}
    assert len(found) == len(rows)
    return found


VARIANTS = {
    "literal": (
        *("preset=literal", "loss.kl_estimator=exact", "loss.entropy_coef=0.01"),
        "care.selector=random",
    ),
    "dapo": ("algorithm=dapo", "train.dynamic_sampling=true", "train.num_iterations=2"),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_train(name, start, tmp_path):
    """Alternatives that no shipped configuration has (those train in tests/test_commands.py), and
    dynamic sampling over several updates a batch."""
    metrics = records(_train(start, tmp_path, *VARIANTS[name]))
    assert len(metrics) == 3 and sum(m["trained_sequences"] for m in metrics) > 0
    assert any(m.get("grad_norm", 0) > 0 for m in metrics)


def test_qwen3_vl_and_mixed_rows_train(mixed_rows, tmp_path):
    """Qwen3-VL with `<reasoning>` tags, on rows with no, one and two images together."""
    config = f"--config={ROOT / 'configs' / 'easy_vqa.yaml'}"
    run(
        *("quickstart", config, *SMALL, *COLD_START, "sft.steps=40", *OWN),
        *data_arguments(mixed_rows),
        "sft.data.max_samples=null",
        "eval.max_samples=null",
        "model.path=tiny-qwen3-vl",
        "prompt.tags=[reasoning,answer]",
        f"output_dir={tmp_path}",
        "name=mixed",
    )
    folder = tmp_path / "mixed"
    facts = summary(folder)
    assert facts["steps"] == 3 and facts["trained_sequences"] > 0
    # Old and new policy agree in the first step, whose update moves both towers.
    first = records(folder)[0]
    assert abs(first["kl"]) < 1e-6 and first["clipped_low"] == first["clipped_high"] == 0
    before, after = (
        load_file(folder / name / "model.safetensors") for name in ("cold_start", "final")
    )
    changed = {name for name, weight in before.items() if not torch.equal(weight, after[name])}
    assert any("visual" in name for name in changed)
    assert any("language_model" in name for name in changed)


def test_bad_input_is_one_clear_line(tmp_path, capsys):
    """User errors exit with 2 and one line, no traceback, also where `deepspeed --module` passes
    --local_rank before the command."""
    for arguments, message in (
        (["train", "data.path=nowhere.jsonl"], "nowhere.jsonl"),
        (["train", "model.path=nowhere"], "no config.json there"),
        (["--local_rank=0", "train", "train.step=1"], "did you mean 'train.steps'"),
    ):
        assert main([*arguments, f"output_dir={tmp_path}"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line
