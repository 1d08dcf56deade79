"""`care-train eval --benchmarks ...`: all benchmarks of a run, its results and their table."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from care_train.config import Config
from care_train.distributed import barrier, is_main
from care_train.evaluation.decode import answer_questions
from care_train.evaluation.decoding import decoding
from care_train.evaluation.question_set import DATA, QuestionSet, open_questions
from care_train.evaluation.statistics import macro_average, summarize
from care_train.evaluation.table import results_markdown
from care_train.reporting.jsonl import finite
from care_train.training.folders import write_file
from care_train.training.resume import identity, settings_of
from care_train.training.session import Session

_ANSWERS = "answers"
_MADE_WITH = "made_with.json"

_DECIDING = ("prompt", "model", "rollout", "reward", "eval.decode", "seed")
"""Keys and sections that decide what is answered, and what of it is right."""

_INDIFFERENT = ("model.path", "model.lora", "rollout.group_size", "rollout.batch_size")
_INDIFFERENT += ("rollout.vllm", "rollout.max_log_prob_gap", "reward.workers")
_INDIFFERENT += tuple(
    f"reward.judge.{key}" for key in ("api_key_env", "timeout", "retries", "concurrency")
)


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
    engine = session.rollout_engine(session.loaded, config.eval.batch_size)
    started()
    summaries: dict[str, dict[str, Any]] = {}
    for questions in question_sets:
        folder = run_dir / _ANSWERS / questions.name
        records = answer_questions(session, engine, questions, folder, device)
        summaries[questions.name] = summarize(records, config.eval.k)
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
        text = json.dumps(finite(results), indent=2, allow_nan=False)
        write_file(run_dir / "results.json", text + "\n")
        write_file(run_dir / "results.md", results_markdown(config.name, results))
    barrier()
    return results


def benchmark_summary(results: Mapping[str, Any]) -> dict[str, Any]:
    """The accuracies alone, for summary.json and the terminal."""
    scores = {name: summary["accuracy"] for name, summary in results["benchmarks"].items()}
    macro = results["macro"]
    return {"benchmarks": scores} | ({"macro_accuracy": macro["accuracy"]} if macro else {})


def _check_made_with(session: Session, weights: Any, run_dir: Path) -> None:
    """Note what answers are made with; refuse to add to those made otherwise."""
    now = {"settings": _deciding(session.config), "weights": weights}
    path = run_dir / _ANSWERS / _MADE_WITH
    if path.is_file():
        saved = json.loads(path.read_text())
        before, after = _flat(saved), _flat(now)
        for key in sorted(before.keys() | after.keys()):
            if before.get(key) != after.get(key):
                raise ValueError(
                    f"{key}: {run_dir} has answers made with {before.get(key)!r}, got "
                    f"{after.get(key)!r}: set it back, or choose another name for the run"
                )
    barrier()
    if is_main():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, json.dumps(now, indent=2) + "\n")
    barrier()


def _deciding(config: Config) -> dict[str, Any]:
    return {
        key: value
        for key, value in settings_of(config).items()
        if _within(key, _DECIDING) and not _within(key, _INDIFFERENT)
    }


def _flat(made_with: Mapping[str, Any]) -> dict[str, Any]:
    return made_with["settings"] | {"model.path's weights": made_with["weights"]}


def _within(key: str, names: tuple[str, ...]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in names)
