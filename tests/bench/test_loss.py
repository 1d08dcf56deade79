"""bench.loss and bench.accuracy end to end, at sizes that take seconds; what they measure with."""

import gc
import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from bench import accuracy, loss, peers
from bench.accuracy import true_outcome
from bench.measure import interleave, peak_memory
from bench.peers import (
    CONTENDERS,
    Contender,
    MeasurementError,
    Outcome,
    Problem,
    make_problem,
)

_COMPILED = ("torch_compiled", "cut_cross_entropy")
_SLOW = (*_COMPILED, "liger_grpo", "liger_scaled_ce", "trl_chunked", "torch_linear_cross_entropy")
_SKIP = ["--devices", "cpu", "--skip-peer", *_SLOW]
_LOSS = ["--size", "32", "503", "--rows", "8", "16", "--repeats", "2"]
_ACCURACY = ["--width", "32", "--vocab", "503", "--rows", "16"]


@pytest.fixture(scope="module", autouse=True)
def quick_collections() -> Iterator[None]:
    """Garbage is collected before each timed call: not once more among all that is imported."""
    gc.freeze()
    yield
    gc.unfreeze()


def _doubled(problem: Problem) -> Outcome:
    outcome = peers.ours(problem)
    return outcome._replace(grad_weight=2 * outcome.grad_weight)


def test_accuracy_prints_a_table_and_its_figures(capsys: Any) -> None:
    """Each contender that needs no compiler computes the loss."""
    assert accuracy.main([*_ACCURACY, "--devices", "cpu", "--skip-peer", *_COMPILED]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any("linear_policy_loss" in line for line in lines[:-1])
    figures = json.loads(lines[-1])
    assert figures["log_prob_rms"] < 1e-4
    assert figures["skipped"] == list(_COMPILED)
    cpu = figures["devices"]["cpu"]
    assert cpu["contenders"].keys() == CONTENDERS.keys() - set(_COMPILED)
    for name, errors in cpu["contenders"].items():
        assert max(errors["grad_hidden"], errors["grad_weight"]) < 0.03, name
        assert errors["log_prob_max"] < 0.1, name
    assert cpu["contenders"]["ours"]["grad_weight"] < 0.01
    assert cpu["rounding"]["grad_weight"] <= cpu["contenders"]["ours"]["grad_weight"]


def test_loss_prints_tables_and_its_figures(capsys: Any) -> None:
    assert loss.main([*_LOSS, *_SKIP, "--no-memory"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any("three bare GEMMs" in line for line in lines[:-1])
    figures = json.loads(lines[-1])
    assert figures["ratio_to_gemms"] > 0
    assert figures["fastest_peer"] in ("torch", "torch_bfloat16")
    assert figures["fastest_peer_ratio"] > 0
    assert figures["quarter_active_ratio"] > 0
    assert figures["headline"] == {"rows": 16, "width": 32, "vocab": 503}
    timed = figures["devices"]["cpu"]["cells"][0]["contenders"]["ours"]
    assert timed["runs"] == 2


@pytest.mark.parametrize("skip", [["--no-memory", "--skip-peer", *peers.PEERS], ["--floor"]])
def test_loss_with_all_peers_skipped_says_so(capsys: Any, skip: list[str]) -> None:
    assert loss.main([*_LOSS, "--devices", "cpu", *skip]) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["fastest_peer"] is None
    assert figures["fastest_peer_ratio"] is None
    assert figures["skipped"] == list(peers.PEERS)
    assert ("0.25" in figures["devices"]["cpu"]["active_ratios"]) == ("--floor" not in skip)


@pytest.mark.parametrize("module", [accuracy, loss])
def test_a_missing_peer_is_named(module: Any, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = Contender(peers.trl_chunked, "no-such-package", "a peer")
    monkeypatch.setitem(CONTENDERS, "trl_chunked", missing)
    assert module.main(["--devices", "cpu"]) == 1
    output = capsys.readouterr()
    assert "trl_chunked" in output.err
    assert "--skip-peer trl_chunked" in output.err
    assert output.out == ""


def test_failures_and_wrong_gradients_are_named(
    capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A peer that fails ends the run; one with a wrong gradient gets no time; ours ends it too."""

    def broken(problem: Problem) -> Outcome:
        raise RuntimeError("out of luck")

    monkeypatch.setitem(CONTENDERS, "torch", Contender(broken, "torch", "broken"))
    assert accuracy.main([*_ACCURACY, *_SKIP]) == 1
    assert "torch failed: out of luck" in capsys.readouterr().err
    monkeypatch.setitem(CONTENDERS, "torch", Contender(_doubled, "torch", "doubled"))
    assert loss.main([*_LOSS, *_SKIP, "--no-memory"]) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    wrong = figures["devices"]["cpu"]["cells"][0]["contenders"]["torch"]
    assert "wrong gradient: dW" in wrong["note"] and "seconds" not in wrong
    assert figures["fastest_peer"] == "torch_bfloat16"
    monkeypatch.setitem(CONTENDERS, "ours", Contender(_doubled, "torch", "doubled"))
    assert loss.main([*_LOSS, *_SKIP, "--no-memory"]) == 1
    output = capsys.readouterr()
    assert "ours at 8 rows: wrong gradient: dW" in output.err and output.out == ""


def test_a_peer_over_its_budget_is_skipped_at_more_rows(capsys: Any) -> None:
    assert loss.main([*_LOSS, *_SKIP, "--no-memory", "--budget", "1e-9"]) == 0
    first, second = json.loads(capsys.readouterr().out.splitlines()[-1])["devices"]["cpu"]["cells"]
    assert first["contenders"]["torch"]["runs"] == 1
    assert second["contenders"]["torch"]["note"].startswith("skipped: about")
    assert second["contenders"]["ours"]["runs"] == 1


def test_truth_is_autograd_in_float64() -> None:
    problem = make_problem(12, 16, 20_000)
    hidden, weight = problem.hidden.double(), problem.head_weight.double()
    log_probs = (hidden @ weight.T).log_softmax(-1).gather(-1, problem.target_ids[:, None])
    loss_value = -(problem.advantages * log_probs.squeeze(-1)).sum()
    grads = torch.autograd.grad(loss_value, (hidden, weight))
    truth = true_outcome(problem)
    torch.testing.assert_close(truth.log_probs, log_probs.detach().squeeze(-1))
    torch.testing.assert_close(truth.grad_hidden, grads[0])
    torch.testing.assert_close(truth.grad_weight, grads[1].float())


def test_rounds_rotate_so_that_nobody_is_always_first() -> None:
    order: list[str] = []
    calls = {name: (lambda name=name: order.append(name)) for name in "abc"}
    seconds = interleave(calls, 3, 10.0, "cpu")
    assert order == list("abc" + "bca" + "cab")
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3, "c": 3}
    # A call over its budget still runs once.
    assert len(interleave({"a": calls["a"]}, 4, 0.0, "cpu")["a"]) == 1


def test_peak_memory_counts_results_and_logits() -> None:
    rows, width, vocab = 64, 256, 32_000
    peaks = peak_memory("torch", [rows // 2, rows], width, vocab, device="cpu")
    results = vocab * width * 2
    logits = rows * vocab * (2 + 4)
    assert results + logits / 2 < peaks[rows] < 4 * (results + logits)
    assert peaks[rows // 2] < peaks[rows]


def test_what_cannot_be_measured_is_named() -> None:
    with pytest.raises(MeasurementError, match="peak memory of nobody"):
        peak_memory("nobody", [4], 8, 16, device="cpu")


def test_the_problem() -> None:
    """Peaked as a trained model's, advantages of both signs, and the asked share of them active."""
    problem = make_problem(256, 64, 20_000)
    assert 0.05 < true_outcome(problem).log_probs.exp().median() < 0.95
    assert (problem.advantages > 0).any() and (problem.advantages < 0).any()
    assert (problem.with_active(0.25).advantages != 0).sum() == 64
