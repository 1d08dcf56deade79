"""A real `care-train serve` beside the trainer: tokens, log-probs, weights, errors."""

import json

import pytest

from care_train.rollout.transformers_engine import TransformersEngine
from tests.rollout.servers import Server
from tests.rollout.test_vllm_engine import GREEDY, largest_gap, tokens
from tests.rollout.test_vllm_runs import ARGUMENTS
from tests.train.runs import data_arguments, run


def test_greedy_outputs_equal_transformers_after_every_sync(served):
    """Images and text, before and after three changes of all weights; log-probs agree too."""
    model = served()
    transformers = TransformersEngine(model.loaded, 64)
    requests, seen = model.requests(), set()
    for seed in range(4):
        completions = model.engine.generate(requests, GREEDY)
        assert tokens(completions) == tokens(transformers.generate(requests, GREEDY))
        assert largest_gap(model, requests, completions) < 1e-3
        seen.add(tuple(tokens(completions)))
        model.change_weights(seed)
        model.sync()
    assert len(seen) == 4, "the changes of weights were too small to see"


@pytest.mark.parametrize(("ranks", "zero_stage"), [(2, 3)])
def test_a_run_trains_and_evaluates(ranks, zero_stage, color_rows, tmp_path):
    """A quickstart with a server, the weights gathered from both ranks' shards."""
    more = [*ARGUMENTS, *data_arguments(color_rows), f"output_dir={tmp_path}", "name=run"]
    server = Server("--config=configs/quickstart.yaml", *more[1:])
    errors = run(
        *more,
        f"rollout.vllm.server={server.url}",
        f"deepspeed.zero_stage={zero_stage}",
        ranks=ranks,
    )
    server.stop()
    assert "Traceback" not in errors
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    steps = [r for r in map(json.loads, lines) if r["phase"] == "train"]
    assert [r["step"] for r in steps] == [1, 2]
    assert all(r["sync_bytes"] > 1e5 and r["seconds_sync"] > 0 for r in steps)
    gaps = [r["gap_max"] for r in steps if "gap_max" in r]
    assert gaps and max(gaps) < 0.01
