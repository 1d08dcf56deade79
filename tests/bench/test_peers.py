"""Every installed peer computes the same gradient; those that compile are left to the bench."""

import pytest

from bench.accuracy import relative_error, true_outcome
from bench.peers import CONTENDERS, installed_version, make_problem


@pytest.mark.parametrize(
    "name", [n for n in CONTENDERS if n not in ("torch_compiled", "cut_cross_entropy")]
)
def test_contender_matches_the_truth(name: str) -> None:
    contender = CONTENDERS[name]
    if installed_version(contender.package) is None:
        pytest.skip(f"{contender.package} is not installed")
    problem = make_problem(24, 32, 1003)
    truth = true_outcome(problem)
    outcome = contender.run(problem)
    assert relative_error(outcome.grad_hidden, truth.grad_hidden) < 0.03
    assert relative_error(outcome.grad_weight, truth.grad_weight) < 0.03
    log_probs = outcome.log_probs
    if log_probs is None and contender.log_probs is not None:
        log_probs = contender.log_probs(problem)
    assert log_probs is not None
    assert (log_probs.double() - truth.log_probs).abs().max() < 0.1


def test_problem_is_peaked_as_a_trained_model() -> None:
    problem = make_problem(256, 64, 20_000)
    truth = true_outcome(problem)
    assert 0.05 < truth.log_probs.exp().median() < 0.95
    assert (problem.advantages > 0).any()
    assert (problem.advantages < 0).any()
