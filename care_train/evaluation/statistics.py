"""From records to a benchmark's numbers: accuracy, pass@k, majority@k, intervals."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from math import comb
from statistics import fmean
from typing import Any

from care_train.reporting.interval import mean_interval, proportion_interval

Record = Mapping[str, Any]


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """The probability that one of k responses drawn without replacement is right.

    The unbiased estimator 1 - C(n - c, k) / C(n, k) (Chen et al., 2021, arXiv:2107.03374, Eq. 1).

    Raises:
        ValueError: k is not in [1, n], or c not in [0, n].
    """
    if not 1 <= k <= num_samples or not 0 <= num_correct <= num_samples:
        raise ValueError(
            f"pass_at_k: got n {num_samples}, c {num_correct}, k {k}, wanted 1 <= k <= n and "
            "0 <= c <= n"
        )
    return 1.0 - comb(num_samples - num_correct, k) / comb(num_samples, k)


def majority_at_k(votes: Sequence[str], accuracies: Sequence[float], k: int) -> float:
    """How right the commonest of k answers is, a mean over the blocks of k responses.

    Empty votes (no answer) do not count; of equally common answers the first given wins; without
    any vote the block is wrong.

    Raises:
        ValueError: k is not in [1, number of votes].
    """
    if not 1 <= k <= len(votes):
        raise ValueError(f"majority_at_k: got k {k}, wanted 1 to {len(votes)}")
    scores = []
    for start in range(0, len(votes) - k + 1, k):
        block = range(start, start + k)
        counts = Counter(votes[i] for i in block if votes[i])
        winner = max(counts, key=lambda vote: counts[vote], default=None)
        scores.append(next((accuracies[i] for i in block if votes[i] == winner), 0.0))
    return fmean(scores)


def summarize(records: Sequence[Record], ks: Sequence[int]) -> dict[str, Any]:
    """A benchmark's numbers from all its records, those of each seed a complete pass.

    Args:
        records: of every question, seed and sample.
        ks: for which pass@k and majority@k are wanted.

    Returns:
        Means over seeds, questions and samples: `accuracy`, of it `exact`, `format`, `truncated`
        (cut by the length limit), `tokens`; `per_seed` accuracies; `half_width` of their 95 %
        interval, None for one seed; `interval` of the share of questions (Wilson, one seed);
        `pass@k`, `majority@k`; `groups` with each part's accuracy.
    """
    seeds = sorted({record["seed"] for record in records})
    per_seed = [_mean(records, "accuracy", seed) for seed in seeds]
    accuracy, half_width = mean_interval(per_seed)
    num_questions = len({record["id"] for record in records})
    return {
        "num_questions": num_questions,
        "accuracy": accuracy,
        "half_width": half_width if len(seeds) > 1 else None,
        "interval": proportion_interval(accuracy * num_questions, num_questions),
        "per_seed": per_seed,
        "exact": _mean(records, "exact"),
        "format": _mean(records, "format"),
        "truncated": 1.0 - _mean(records, "finished"),
        "tokens": _mean(records, "tokens"),
        "pass@k": {k: fmean(pass_at_k(*_counts(b), k) for b in _blocks(records)) for k in ks},
        "majority@k": {
            k: fmean(
                majority_at_k([r["vote"] for r in b], [r["accuracy"] for r in b], k)
                for b in _blocks(records)
            )
            for k in ks
        },
        "groups": _groups(records),
    }


def macro_average(summaries: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The unweighted mean over benchmarks (Sec. 8.3), and over seeds its 95 % interval.

    Args:
        summaries: of each benchmark, with as many seeds each.
    """
    columns = [summary["per_seed"] for summary in summaries.values()]
    per_seed = [fmean(values) for values in zip(*columns, strict=True)]
    accuracy, half_width = mean_interval(per_seed)
    return {
        "accuracy": accuracy,
        "half_width": half_width if len(per_seed) > 1 else None,
        "per_seed": per_seed,
        "benchmarks": list(summaries),
    }


def _mean(records: Sequence[Record], key: str, seed: int | None = None) -> float:
    return fmean(float(r[key]) for r in records if seed is None or r["seed"] == seed)


def _blocks(records: Sequence[Record]) -> list[list[Record]]:
    """The responses to one question under one seed, in the order of samples."""
    blocks = defaultdict(list)
    for record in records:
        blocks[record["id"], record["seed"]].append(record)
    return [sorted(block, key=lambda record: record["sample"]) for block in blocks.values()]


def _counts(block: Sequence[Record]) -> tuple[int, int]:
    return len(block), sum(record["accuracy"] == 1.0 for record in block)


def _groups(records: Sequence[Record]) -> dict[str, dict[str, float]]:
    parts = defaultdict(list)
    for record in records:
        parts[record["group"]].append(record)
    return {
        name: {
            "num_questions": len({record["id"] for record in part}),
            "accuracy": _mean(part, "accuracy"),
        }
        for name, part in sorted(parts.items())
    }
