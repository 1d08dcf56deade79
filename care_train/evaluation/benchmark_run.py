"""`care-train eval --benchmarks ...`: all benchmarks of a run, and its results.

Accuracy, pass@k, majority@k and their intervals are computed here from the records of responses.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from math import comb
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from care_train.config import Config, Role, role_of
from care_train.distributed import barrier, is_main
from care_train.evaluation.answering import Record, answer_questions
from care_train.evaluation.evaluate import decoding
from care_train.evaluation.question_set import DATA, QuestionSet, open_questions
from care_train.evaluation.table import results_markdown
from care_train.reporting import mean_interval, proportion_interval
from care_train.reporting.files import write_file, write_json
from care_train.training.resume import identity, settings_of
from care_train.training.session import Session

_ANSWERS = "answers"
_MADE_WITH = "made_with.json"

_SECTIONS = ("prompt", "model", "rollout", "reward", "seed")
"""Sections that decide what is answered, and what of it is right."""

_INDIFFERENT = ("model.path", "model.lora", "rollout.group_size")
"""Of those: the weights themselves are compared, and an evaluation has no groups."""


def open_question_sets(config: Config) -> list[QuestionSet]:
    """The questions of every benchmark of `eval.benchmarks`, each once, every row checked.

    Raises:
        ValueError: rows that break a benchmark's schema.
    """
    return [open_questions(name, config) for name in dict.fromkeys(config.eval.benchmarks)]


def evaluate_benchmarks(
    session: Session,
    question_sets: Sequence[QuestionSet],
    run_dir: Path,
    device: torch.device,
    started: Callable[[], None],
) -> dict[str, Any]:
    """Answer and score every benchmark of `eval.benchmarks`, going on where a run was stopped.

    Writes `answers/<benchmark>/rank_<r>.jsonl` as responses come, then `results.json` and
    `results.md`.

    Args:
        session: the model; its config says how it is asked.
        question_sets: what it is asked.
        run_dir: the run's folder.
        device: this rank's.
        started: called before the first answer.

    Returns:
        `benchmarks`: each one's `summarize`; `macro`: their `macro_average`, `data` apart; and
        how they were decoded.

    Raises:
        ValueError: answers found in `run_dir` that were made with another model or under other
            settings.
        Stopped: a signal asked for it.
    """
    config = session.config
    weights = identity(config, (), session.loaded.model)["weights"]
    _check_made_with(session, weights, run_dir)
    engine = session.rollout_engine(session.loaded, config.rollout.batch_size)
    started()
    summaries: dict[str, dict[str, Any]] = {}
    for questions in question_sets:
        folder = run_dir / _ANSWERS / questions.name
        records = answer_questions(session, engine, questions, folder, device)
        summaries[questions.name] = summarize(records, _ks(config.eval.samples))
        summaries[questions.name]["odd_keys"] = questions.num_odd_keys
    averaged = {name: summary for name, summary in summaries.items() if name != DATA}
    results = {
        "model": config.model.path,
        "weights": weights,
        "seeds": config.eval.seeds,
        "samples": config.eval.samples,
        "decoding": asdict(decoding(config)),
        "sources": {questions.name: questions.source for questions in question_sets},
        "questions": {questions.name: questions.digest for questions in question_sets},
        "benchmarks": summaries,
        "macro": macro_average(averaged) if averaged else None,
    }
    if is_main():
        write_json(run_dir / "results.json", results)
        write_file(run_dir / "results.md", results_markdown(config.name, results))
    barrier()
    return results


def benchmark_summary(results: Mapping[str, Any]) -> dict[str, Any]:
    """The accuracies alone, for summary.json and the terminal."""
    scores = {name: summary["accuracy"] for name, summary in results["benchmarks"].items()}
    macro = results["macro"]
    return {"benchmarks": scores} | ({"macro_accuracy": macro["accuracy"]} if macro else {})


def _ks(samples: int) -> list[int]:
    """For which k pass@k and majority@k are reported: powers of two, and all samples."""
    return sorted({2**i for i in range(samples.bit_length())} | {samples}) if samples > 1 else []


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


def _check_made_with(session: Session, weights: Any, run_dir: Path) -> None:
    """Note what answers are made with; refuse to add to those made otherwise."""
    settings = settings_of(session.config).items()
    now = {key: value for key, value in settings if _decides(key)}
    now["model.path's weights"] = weights
    path = run_dir / _ANSWERS / _MADE_WITH
    before = json.loads(path.read_text()) if path.is_file() else now
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key):
            raise ValueError(
                f"{key}: {run_dir} has answers made with {before.get(key)!r}, got "
                f"{now.get(key)!r}: set it back, or choose another name for the run"
            )
    barrier()
    if is_main():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, now)
    barrier()


def _decides(key: str) -> bool:
    if key == "eval.decode":
        return True
    is_asked = key.split(".")[0] in _SECTIONS and role_of(key) not in (Role.SPEED, Role.FREE)
    return is_asked and not any(f"{key}.".startswith(f"{name}.") for name in _INDIFFERENT)


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
