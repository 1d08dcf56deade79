"""Trainer against engine: the gap, the gate, the weights that correct for it."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from care_train.algorithm.region_weights import importance_weights
from care_train.algorithm.types import Credit, TrainSequence
from care_train.config import LossSettings, build_config
from care_train.training.failures import EngineError
from care_train.training.log_probs import TrainItem
from care_train.training.metrics import engine_gap
from care_train.training.step import TrainStep
from tests.algorithm.builders import right
from tests.algorithm.fakes import FakeEngine, sampled_group

CPU = torch.device("cpu")


def _rollout(engine, trainer=None):
    ids = tuple(range(50, 50 + len(engine)))
    old = None if trainer is None else torch.tensor(trainer)
    return replace(right(), token_ids=ids, log_probs=tuple(engine), old_log_probs=old)


def _sequence(rollout):
    return TrainSequence(rollout, 0.0, Credit((0, 0), (0, 0), earns_rationale=False))


def test_the_gap_is_a_mean_over_tokens():
    """Each rollout counts once, whether it is trained or not; those that one side has no log-probs
    of do not."""
    one, late = _rollout([-1.0, -2.0], [-1.1, -2.0]), _rollout([-0.5])
    unmeasured = [right(), _rollout([-7.0]), replace(right(), old_log_probs=torch.tensor([-0.8]))]
    group = sampled_group([one, *unmeasured])
    items = [
        TrainItem(group, _sequence(rollout), group.sequence(rollout), torch.tensor(trainer))
        for rollout, trainer in ((one, [-9.0, -9.0]), (late, [-0.8]))
    ]
    values = engine_gap([group], items, CPU)
    assert values["gap_mean"] == pytest.approx(0.4 / 3)
    assert values["gap_max"] == pytest.approx(0.3)
    differences = torch.tensor([-0.1, 0.0, -0.3])
    assert values["gap_k3"] == pytest.approx(float((differences.exp() - 1 - differences).mean()))
    worst = r"response token 0 \(id 50\): log-prob -0.8000 in the trainer, -0.5000 in"
    with pytest.raises(EngineError, match=worst):
        engine_gap([group], items, CPU, limit=0.1)
    assert engine_gap([sampled_group([right()])], [], CPU, limit=0.1) == {}


@pytest.mark.parametrize("trainer", [-3.0, float("nan")])
def test_an_absurd_gap_stops_the_run_after_every_start_of_the_engine(trainer):
    """It names sample, token and both numbers. Not at a run's first step alone: an engine that woke
    up is compared before the next update, and one that neither started nor woke up is not."""
    sampler = SimpleNamespace(num_starts=1)
    config = build_config({"rollout": {"engine": "vllm"}})
    step = TrainStep(config, FakeEngine(), sampler, None, None)
    good = [sampled_group([_rollout([-1.0], [-1.1])])]
    bad = [sampled_group([_rollout([-1.0, -1.0], [-1.0, trainer])])]
    message = r"rows.jsonl: row 1: response token 1 \(id 51\).*-1.0"
    step._checked_gap([], [])
    with pytest.raises(EngineError, match=message):
        step._checked_gap(bad, [])
    step._checked_gap(good, [])
    step._checked_gap(bad, [])
    sampler.num_starts = 2
    with pytest.raises(EngineError, match=message):
        step._checked_gap(bad, [])
    assert engine_gap(bad, [], CPU, limit=None)


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ({}, [2.0, 0.5, 1.0]),
        ({"importance_range": [0, 5]}, [4.0, 0.5, 1.0]),
        ({"importance_sampling": "sequence"}, [2.0, 2.0, 2.0]),
        ({"importance_sampling": "sequence", "importance_range": [0, 1.5]}, [1.5, 1.5, 1.5]),
        ({"importance_range": [0.8, 2]}, [2.0, 0.8, 1.0]),
        # IcePop's band, whose edges belong to it.
        ({"importance_sampling": "token_mask", "importance_range": [0.5, 3]}, [0, 0.5, 1]),
        ({"importance_sampling": "token_mask", "importance_range": [0.6, 5]}, [4, 0, 1]),
        ({"importance_sampling": "geometric"}, [2 ** (1 / 3)] * 3),
        ({"importance_sampling": "geometric_mask", "importance_range": [0, 1.25]}, [0.0] * 3),
    ],
)
def test_importance_weights(values, wanted):
    """Ratios 4, 1/2 and 1, of product 2 and geometric mean 2^(1/3): cut to the range, or 0."""
    engine = [-2.0, -1.0, -0.5]
    trainer = torch.tensor(engine) + torch.tensor([4.0, 0.5, 1.0]).log()
    weights = importance_weights(trainer, engine, LossSettings(**values))
    torch.testing.assert_close(weights, torch.tensor(wanted, dtype=torch.float32))


def test_a_floor_above_the_cap_is_refused():
    """No weight could lie between them."""
    with pytest.raises(ValueError, match=r"importance_range: got \[3.0, 2.0\], wanted the smaller"):
        build_config({"loss": {"importance_range": [3, 2]}})
