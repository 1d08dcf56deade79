"""Trainer against engine: the gap, the gate, the weights that correct for it."""

from dataclasses import replace

import pytest
import torch

from care_train.config import LossSettings
from care_train.training.failures import EngineError
from care_train.training.mismatch import Mismatch, check_parity, importance_weights
from tests.algorithm.builders import right
from tests.algorithm.fakes import sampled_group

CPU = torch.device("cpu")


def _rollout(log_probs):
    ids = tuple(range(50, 50 + len(log_probs)))
    return replace(right(), token_ids=ids, log_probs=tuple(log_probs))


def test_the_gap_is_a_mean_over_tokens():
    """Each rollout counts once; those without log-probs do not."""
    mismatch = Mismatch()
    one, two = _rollout([-1.0, -2.0]), _rollout([-0.5])
    group = sampled_group([one, two, right()])
    mismatch.add(group, one, torch.tensor([-1.1, -2.0]))
    mismatch.add(group, one, torch.tensor([-9.0, -9.0]))
    mismatch.add(group, two, torch.tensor([-0.8]))
    mismatch.add(group, right(), torch.tensor([-0.8]))
    values, worst = mismatch.reduce(CPU)
    assert values["gap_mean"] == pytest.approx(0.4 / 3)
    assert values["gap_max"] == pytest.approx(0.3)
    differences = torch.tensor([-0.1, 0.0, -0.3])
    assert values["gap_k3"] == pytest.approx(float((differences.exp() - 1 - differences).mean()))
    assert worst.token_id == 50 and worst.place == 0
    assert torch.equal(mismatch.trainer_log_probs(one), torch.tensor([-1.1, -2.0]))


def test_nothing_measured_is_nothing_reported():
    assert Mismatch().reduce(CPU) == ({}, None)


@pytest.mark.parametrize("trainer", [-3.0, float("nan")])
def test_an_absurd_gap_stops_the_run_and_names_the_token(trainer):
    """Sample, token and both numbers."""
    mismatch = Mismatch()
    rollout = _rollout([-1.0, -1.0])
    mismatch.add(sampled_group([rollout]), rollout, torch.tensor([-1.0, trainer]))
    with pytest.raises(EngineError, match=r"rows.jsonl: row 1: response token 1 \(id 51\).*-1.0"):
        check_parity(*mismatch.reduce(CPU), 0.2)
    check_parity(*mismatch.reduce(CPU), None)


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ({}, [2.0, 0.5, 1.0]),
        ({"importance_cap": 5.0}, [4.0, 0.5, 1.0]),
        ({"importance_over_cap": "mask"}, [0.0, 0.5, 1.0]),
        ({"importance_sampling": "sequence"}, [2.0, 2.0, 2.0]),
        ({"importance_sampling": "sequence", "importance_cap": 1.5}, [1.5, 1.5, 1.5]),
        (
            {"importance_sampling": "sequence", "importance_cap": 1.5}
            | {"importance_over_cap": "mask"},
            [0.0, 0.0, 0.0],
        ),
    ],
)
def test_importance_weights(values, wanted):
    """Ratios 4, 1/2 and 1, of product 2."""
    engine = [-2.0, -1.0, -0.5]
    trainer = torch.tensor(engine) + torch.tensor([4.0, 0.5, 1.0]).log()
    weights = importance_weights(trainer, engine, LossSettings(**values))
    torch.testing.assert_close(weights, torch.tensor(wanted))
