"""How far every contender is from the truth: log-probs, dX and dW, against float64.

    python -m bench.accuracy
    python -m bench.accuracy --rows 128 --width 3584 --vocab 152064

All contenders get the same bfloat16 numbers, as does the truth, computed from them in float64 a
slice of the vocabulary at a time. The loss is -sum_i a_i log p_i with advantages of both signs;
logits have a standard deviation of 3.5 and lean to the targets (see `bench.peers.make_problem`).
The last line is one JSON object with the figures.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import Tensor

from bench.measure import (
    describe,
    devices,
    machine_facts,
    numbers_table,
    quieten,
    run_contender,
)
from bench.peers import (
    OURS,
    PEERS,
    Contender,
    MeasurementError,
    Outcome,
    Problem,
    chosen_contenders,
    make_problem,
)

_TILE = 8192


class Truth(NamedTuple):
    """What an exact computation gives for the same inputs."""

    log_probs: Tensor
    """[N]."""
    grad_hidden: Tensor
    """[N, D]."""
    grad_weight: Tensor
    """[V, D]; kept in float32, whose rounding is far below any error measured here."""


def true_log_probs(problem: Problem, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Log-probs [N] and logarithms of the softmax's denominators [N], in slices of V."""
    hidden, weight = problem.hidden.detach().to(dtype), problem.head_weight.detach()
    parts = [(hidden @ tile.to(dtype).T).logsumexp(-1) for tile in weight.split(_TILE)]
    normaliser = torch.stack(parts).logsumexp(0)
    own = (hidden * weight[problem.target_ids].to(dtype)).sum(-1)
    return own - normaliser, normaliser


def true_outcome(problem: Problem, dtype: torch.dtype = torch.float64) -> Truth:
    """Log-probs and gradients of -sum_i a_i log p_i, in `dtype`, in slices of the vocabulary."""
    hidden, weight = problem.hidden.detach().to(dtype), problem.head_weight.detach()
    targets, scale = problem.target_ids, problem.advantages.to(dtype)[:, None]
    log_probs, normaliser = true_log_probs(problem, dtype)
    grad_hidden = torch.zeros_like(hidden)
    grad_weight = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
    for start in range(0, len(weight), _TILE):
        tile = weight[start : start + _TILE].to(dtype)
        grad = (hidden @ tile.T - normaliser[:, None]).exp()
        rows = ((targets >= start) & (targets < start + len(tile))).nonzero().squeeze(-1)
        grad[rows, targets[rows] - start] -= 1
        grad *= scale
        grad_hidden += grad @ tile
        grad_weight[start : start + len(tile)] = grad.T @ hidden
    return Truth(log_probs, grad_hidden, grad_weight)


def relative_error(estimate: Tensor, truth: Tensor) -> float:
    """||estimate - truth|| / ||truth||, a slice at a time."""
    error = torch.zeros((), dtype=torch.float64, device=truth.device)
    size = torch.zeros_like(error)
    # Slices small enough for the allocator to reuse, instead of asking the system for each.
    for e, t in zip(estimate.split(256), truth.split(256), strict=True):
        error += (e.to(t.dtype) - t).square().sum(dtype=torch.float64)
        size += t.square().sum(dtype=torch.float64)
    return (error / size).sqrt().item()


def errors_of(outcome: Outcome, truth: Truth) -> dict[str, float | None]:
    """RMS and largest error of the log-probs, None without them; relative errors of dX and dW."""
    errors: dict[str, float | None] = {"log_prob_rms": None, "log_prob_max": None}
    if outcome.log_probs is not None:
        off = outcome.log_probs.double() - truth.log_probs
        errors = {"log_prob_rms": off.square().mean().sqrt().item()}
        errors["log_prob_max"] = off.abs().max().item()
    for name in ("grad_hidden", "grad_weight"):
        errors[name] = relative_error(getattr(outcome, name), getattr(truth, name))
    return errors


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table and the JSON line; 1 where something could not be measured."""
    options = _options(arguments)
    quieten()
    try:
        contenders = chosen_contenders(options.skip_peer)
        found = {device: _measure(device, contenders, options) for device in options.devices}
    except MeasurementError as error:
        print(f"bench.accuracy: {error}", file=sys.stderr)
        return 1
    size = {"rows": options.rows, "width": options.width, "vocab": options.vocab}
    ours = found[options.devices[0]]["contenders"]["ours"]
    print(json.dumps(size | {"skipped": options.skip_peer} | ours | {"devices": found}))
    return 0


def _measure(
    device: str, contenders: dict[str, Contender], options: argparse.Namespace
) -> dict[str, Any]:
    facts = machine_facts(device)
    problem = make_problem(options.rows, options.width, options.vocab, device)
    truth = true_outcome(problem)
    errors = {name: _errors(name, one, problem, truth) for name, one in contenders.items()}
    # What no gradient in bfloat16 can be better than.
    rounding = {
        "grad_hidden": relative_error(truth.grad_hidden.bfloat16(), truth.grad_hidden),
        "grad_weight": relative_error(truth.grad_weight.bfloat16(), truth.grad_weight),
    }
    _print_table(device, facts, errors, rounding, contenders, options)
    return facts | {"contenders": errors, "rounding": _three_digits(rounding)}


def _errors(
    name: str, contender: Contender, problem: Problem, truth: Truth
) -> dict[str, float | None]:
    outcome = run_contender(name, contender.run, problem)
    if contender.log_probs is not None:
        outcome = outcome._replace(log_probs=contender.log_probs(problem))
    errors = errors_of(outcome, truth)
    wrong = [key for key, value in errors.items() if value is not None and not isfinite(value)]
    if wrong:
        raise MeasurementError(f"{name}: {', '.join(wrong)} not finite")
    return _three_digits(errors)


def _three_digits(figures: Mapping[str, float | None]) -> dict[str, float | None]:
    return {key: None if x is None else float(f"{x:.3g}") for key, x in figures.items()}


def _print_table(
    device: str,
    facts: dict[str, Any],
    errors: dict[str, dict[str, float | None]],
    rounding: dict[str, float],
    contenders: dict[str, Contender],
    options: argparse.Namespace,
) -> None:
    title = (
        f"errors against float64, {device}: N={options.rows:,}, D={options.width:,}, "
        f"V={options.vocab:,}, bfloat16 inputs"
    )
    headings = ("log-prob RMS", "log-prob max", "dX, relative", "dW, relative")
    table = numbers_table(title, headings)
    for name, values in errors.items():
        cells = ["-" if value is None else f"{value:.1e}" for value in values.values()]
        table.add_row(contenders[name].label, *cells, style="bold" if name in OURS else None)
    floor = [f"{rounding[key]:.1e}" for key in ("grad_hidden", "grad_weight")]
    table.add_row("(the truth itself, rounded to bfloat16)", "-", "-", *floor, style="dim")
    console = Console(width=120)
    console.print(table)
    console.print(describe(facts), highlight=False)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.accuracy", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--rows", type=int, default=256, help="N, sampled tokens")
    parser.add_argument("--width", type=int, default=2048, help="D of the hidden states")
    parser.add_argument("--vocab", type=int, default=151_936, help="V")
    parser.add_argument("--skip-peer", nargs="+", default=[], choices=PEERS, metavar="PEER")
    parser.add_argument("--devices", nargs="+", default=devices(), choices=devices())
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
