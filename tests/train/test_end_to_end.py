"""Whole runs through the command line, on tiny real models and drawn images."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from care_train.distributed import own_environment
from care_train.training.timer import MODEL_PARTS

ROOT = Path(__file__).parents[2]

SMALL = (
    "prompt.system=null",
    "rollout.group_size=4",
    "rollout.max_new_tokens=32",
    "train.steps=3",
    "train.prompts_per_step=4",
    "train.micro_batch_size=8",
    "train.learning_rate=2e-4",
    "train.warmup_steps=0",
    "sft.steps=40",
    "sft.batch_size=8",
    "sft.learning_rate=3e-3",
    "sft.warmup_steps=0",
    "logging.report_to=[]",
    "logging.samples_every=2",
)


def _command(command: str, *arguments: str, ranks: int = 1) -> list[str]:
    launch = ["-m", "care_train"]
    if ranks > 1:
        launch = [
            *("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"),
            *("-m", "care_train"),
        ]
    return [sys.executable, *launch, command, *SMALL, *arguments]


def _run(command: str, *arguments: str, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    environment = own_environment() | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        _command(command, *arguments, ranks=ranks),
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def _data(rows: Path) -> list[str]:
    return [f"{section}.path={rows}" for section in ("data", "sft.data", "eval.data")]


def _metrics(run_dir: Path, phase: str = "train") -> list[dict]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["phase"] == phase]


@pytest.fixture(scope="module")
def cold_start(tmp_path_factory, color_rows) -> Path:
    """A tiny Qwen2.5-VL that has seen the format: what the training tests start from."""
    out = tmp_path_factory.mktemp("cold")
    done = _run("sft", *_data(color_rows), f"output_dir={out}", "name=cold")
    assert done.returncode == 0, done.stderr
    return out / "cold" / "final"


def _train(out: Path, name: str, cold_start: Path, rows: Path, *arguments: str, ranks: int = 1):
    done = _run(
        "train",
        *_data(rows),
        f"model.path={cold_start}",
        f"output_dir={out}",
        f"name={name}",
        *arguments,
        ranks=ranks,
    )
    assert done.returncode == 0, done.stderr
    return done, out / name


def test_a_run_leaves_everything_it_promises(cold_start, color_rows, tmp_path):
    """`care-train train`: config, metrics, summary, checkpoints, final model, plots and report."""
    done, run = _train(tmp_path, "care", cold_start, color_rows, "eval.blind=true")
    for name in ("config.yaml", "metrics.jsonl", "summary.json", "report.md", "samples.jsonl"):
        assert (run / name).stat().st_size > 0, name
    assert (run / "learning_curves.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_000003"]
    summary = json.loads((run / "summary.json").read_text())
    assert summary["algorithm"] == "care" and summary["steps"] == 3
    for key in ("accuracy", "format", "greedy", "blind"):
        assert 0 <= summary[f"{key}_before"] <= 1 and 0 <= summary[f"{key}_after"] <= 1
    assert summary["sampled_sequences"] >= 3 * 4 * 4
    assert summary["decoded_tokens"] > 0 and summary["wall_seconds"] > 0
    assert len(_metrics(run)) == 3 and len(_metrics(run, "eval")) == 2
    _assert_times_add_up(_metrics(run))
    model = AutoModelForImageTextToText.from_pretrained(run / "final")
    AutoProcessor.from_pretrained(run / "final")
    assert model.config.model_type == "qwen2_5_vl"
    # What it prints: scores before and after, no warnings, no tracebacks.
    assert "accuracy" in done.stdout and "before" in done.stdout
    assert "arning" not in done.stderr, done.stderr


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


def test_runs_repeat_bit_for_bit(cold_start, color_rows, tmp_path):
    """Same configuration and seed: the same metrics and the same weights."""
    runs = [_train(tmp_path, name, cold_start, color_rows)[1] for name in ("one", "two")]
    for key in ("reward", "loss", "grad_norm", "decoded_tokens"):
        assert [m[key] for m in _metrics(runs[0])] == [m[key] for m in _metrics(runs[1])]
    weights = [AutoModelForImageTextToText.from_pretrained(run / "final") for run in runs]
    for name, parameter in weights[0].named_parameters():
        assert torch.equal(parameter, weights[1].get_parameter(name)), name


@pytest.mark.parametrize(
    ("stage", "batches"),
    [
        (2, ()),
        (
            3,
            (
                "train.packing=true",
                "train.micro_batch_tokens=264",
                "train.gradient_checkpointing=true",
            ),
        ),
    ],
    ids=["zero2", "zero3-packed"],
)
def test_two_ranks_follow_one(stage, batches, cold_start, color_rows, tmp_path):
    """Two gloo ranks under ZeRO-2, or under ZeRO-3 with packs of a token budget and checkpointing,
    take one process's trajectory at the same batch: scores, reference and training.

    Rollouts are seeded per request, so both sample the same responses; what differs is the order
    of float32 sums over micro-batches and ranks, which AdamW's division by sqrt(v) can amplify in
    weights whose gradient is near zero: hence 1e-3 on losses of order 1 over three steps.
    """
    arguments = ("loss.kl_coef=0.1", "train.mini_batches=2", "prompt.max_prompt_tokens=200")
    _, single = _train(tmp_path, "single", cold_start, color_rows, *arguments)
    _, double = _train(
        tmp_path,
        "double",
        cold_start,
        color_rows,
        *arguments,
        f"deepspeed.zero_stage={stage}",
        *batches,
        ranks=2,
    )
    for one, two in zip(_metrics(single), _metrics(double), strict=True):
        assert one["decoded_tokens"] == two["decoded_tokens"]
        assert one["trained_sequences"] == two["trained_sequences"]
        for key in ("reward", "reward_std", "accuracy", "loss", "kl", "entropy"):
            assert one[key] == pytest.approx(two[key], abs=1e-3), key
        assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=2e-2)


def test_a_resumed_run_goes_on_where_it_stopped(cold_start, color_rows, tmp_path):
    """Stopped after step 2 and resumed, a run ends with the weights of one that never stopped."""
    _, whole = _train(tmp_path, "whole", cold_start, color_rows, "train.save_every=1")
    _, part = _train(tmp_path, "part", cold_start, color_rows, "train.steps=2")
    _train(tmp_path, "part", cold_start, color_rows, "resume=true")
    assert _metrics(part)[-1]["step"] == 3
    assert _metrics(part)[-1]["loss"] == _metrics(whole)[-1]["loss"]
    weights = [AutoModelForImageTextToText.from_pretrained(run / "final") for run in (whole, part)]
    for name, parameter in weights[0].named_parameters():
        assert torch.equal(parameter, weights[1].get_parameter(name)), name


@pytest.mark.parametrize("algorithm", ["grpo", "dapo", "gspo", "dr_grpo"])
def test_baselines_train(algorithm, cold_start, color_rows, tmp_path):
    """Every baseline of Table 5 runs through the same trainer, over several updates a batch."""
    _, run = _train(
        tmp_path,
        algorithm,
        cold_start,
        color_rows,
        f"algorithm={algorithm}",
        "train.num_iterations=2",
        f"train.dynamic_sampling={'true' if algorithm == 'dapo' else 'false'}",
    )
    metrics = _metrics(run)
    assert len(metrics) == 3
    assert sum(m["trained_sequences"] for m in metrics) > 0
    assert any(m.get("grad_norm", 0) > 0 for m in metrics)


@pytest.mark.parametrize(
    "arguments",
    [
        ("preset=literal",),
        ("preset=official", "care.reflection.max_new_tokens=12"),
        ("care.reflection.context=x_only",),
        ("loss.kl_estimator=exact", "loss.entropy_coef=0.01", "care.selector=random"),
    ],
    ids=["literal", "official", "x_only", "exact_kl"],
)
def test_care_variants_train(arguments, cold_start, color_rows, tmp_path):
    """Presets and the main alternatives of the decision table run to the end."""
    _, run = _train(tmp_path, "variant", cold_start, color_rows, *arguments)
    assert sum(m["trained_sequences"] for m in _metrics(run)) > 0


def test_qwen3_vl_and_mixed_rows_train(color_rows, tmp_path):
    """Qwen3-VL with `<reasoning>` tags, on rows with no, one and two images together."""
    rows = [json.loads(line) for line in color_rows.read_text().splitlines()]
    for index, row in enumerate(rows):
        row["images"] = [str(color_rows.parent / name) for name in row["images"]]
        row["images"] = row["images"] * (index % 3)
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text("\n".join(map(json.dumps, rows)))
    done = _run(
        "quickstart",
        f"--config={ROOT / 'configs' / 'easy_vqa.yaml'}",
        *_data(mixed),
        "sft.data.max_samples=null",
        "eval.data.max_samples=null",
        "model.path=tiny-qwen3-vl",
        "prompt.think_tag=reasoning",
        f"output_dir={tmp_path}",
        "name=mixed",
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "mixed" / "summary.json").read_text())
    assert summary["steps"] == 3 and summary["trained_sequences"] > 0


def test_a_text_model_trains_in_bf16(color_rows, tmp_path):
    """A plain language model, rows without images, bfloat16 with fp32 master weights, ZeRO-1."""
    rows = [json.loads(line) | {"images": []} for line in color_rows.read_text().splitlines()]
    text = tmp_path / "text.jsonl"
    text.write_text("\n".join(map(json.dumps, rows)))
    done = _run(
        "train",
        *_data(text),
        "model.path=tiny-qwen2",
        "model.dtype=bfloat16",
        "deepspeed.zero_stage=1",
        f"output_dir={tmp_path}",
        "name=text",
    )
    assert done.returncode == 0, done.stderr
    assert len(_metrics(tmp_path / "text")) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train.step=1",), "did you mean 'train.steps'"),
        (("data.path=nowhere.jsonl",), "nowhere.jsonl"),
        (("model.path=nowhere",), "no config.json there"),
        (
            ("train.prompts_per_step=0",),
            "train.prompts_per_step: got 0, wanted an integer, at least 1",
        ),
    ],
)
def test_bad_input_is_one_clear_line(arguments, message, color_rows, tmp_path):
    """User errors exit with 2 and one line, no traceback."""
    done = _run("train", *_data(color_rows), f"output_dir={tmp_path}", *arguments)
    assert done.returncode == 2
    assert message in done.stderr and "Traceback" not in done.stderr


def test_a_run_never_replaces_what_it_reads(color_rows, tmp_path):
    """Evaluating a run's model under the run's own name is refused, and the model survives."""
    final = tmp_path / "same" / "final"
    final.mkdir(parents=True)
    (tmp_path / "same" / "config.yaml").write_text("name: same\n")
    done = _run(
        "eval",
        *_data(color_rows),
        f"model.path={final}",
        f"output_dir={tmp_path}",
        "name=same",
        "overwrite=true",
    )
    assert done.returncode == 2 and "set name=" in done.stderr
    assert final.is_dir()


def test_launchers_may_put_the_local_rank_first():
    """`deepspeed --module care_train train` passes --local_rank before the command."""
    from care_train.cli import main

    assert main(["--local_rank=0", "train", "train.step=1"]) == 2


def test_bad_rows_are_named(color_rows, tmp_path):
    """A missing image stops the run naming file, row and path."""
    rows = color_rows.read_text().replace('"0.png"', '"lost.png"')
    broken = color_rows.parent / "broken.jsonl"
    broken.write_text(rows)
    done = _run("train", *_data(broken), "model.path=tiny-qwen2.5-vl", f"output_dir={tmp_path}")
    assert done.returncode == 2
    assert "broken.jsonl" in done.stderr and "lost.png" in done.stderr
