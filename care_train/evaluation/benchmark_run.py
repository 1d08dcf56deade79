"""`care-train eval --benchmarks ...`: open the questions of a run's benchmarks, answer them, and
write its results."""

import hashlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from care_train.config import Config, Role, role_of
from care_train.data import ImageRef, Sample, load_samples, permutation, sample_digest
from care_train.data.columns import check_row
from care_train.data.files import open_rows
from care_train.data.images import image_refs
from care_train.distributed import barrier, is_main
from care_train.evaluation.benchmarks import BENCHMARKS
from care_train.evaluation.evaluate import answer_questions, decoding
from care_train.evaluation.question import Benchmark, Question, QuestionSet
from care_train.evaluation.table import macro_average, results_markdown, summarize
from care_train.reporting.files import read_json, write_file, write_json
from care_train.training.resume import identity, settings_of
from care_train.training.session import Session
from care_train.verifier.score import check_key

DATA = "data"
"""The name under which `eval.benchmarks` has the rows of `eval.data`."""

_ANSWERS = "answers"
_MADE_WITH = "made_with.json"

_SECTIONS = ("prompt", "model", "rollout", "reward", "seed")
"""Sections that decide what is answered, and what of it is right."""

_INDIFFERENT = ("model.path", "model.lora", "model.train_vision", "rollout.group_size")
"""Of those: the weights themselves are compared, and an evaluation has no groups."""


def open_questions(name: str, config: Config) -> QuestionSet:
    """The questions of a benchmark, each read once, so that a bad row is found before any answer.

    A question that is there twice, as in a folder with two copies of its table, is asked once.

    Args:
        name: one of `BENCHMARKS`, or `data`.
        config: `eval.sources` says where the rows are, `eval.max_samples` how many count.

    Raises:
        ValueError: no rows, a row that breaks the published schema, a key of `data` that no one
            reads, or an id that two different questions share.
    """
    if name == DATA:
        if config.held_out is None:
            raise ValueError("eval.data: got none, wanted the rows of the benchmark `data`")
        samples = load_samples(config.held_out, config.seed, "eval.data")
        benchmark, source, total, limit = None, config.held_out.path, len(samples), len(samples)
        read = partial(_own_question, samples)
    else:
        benchmark = BENCHMARKS[name]
        source = config.eval.sources.get(name, benchmark.dataset)
        read, total = _reader(benchmark, source)
        limit = config.eval.max_samples or total
    order = permutation(total, f"{config.seed}/{name}") if limit < total else range(total)
    found: dict[str, tuple[int, str, str]] = {}
    image_digests: dict[ImageRef, str] = {}
    num_odd_keys = num_repeated = 0
    for place in order:
        if len(found) == limit:
            break
        question = read(place)
        if benchmark is None:
            check_key(question.sample, config.reward)
        sample, digest = question.sample, _digest(question, image_digests)
        _, location, known = found.setdefault(sample.id, (place, sample.location, digest))
        if known != digest:
            raise ValueError(
                f"{sample.location}: id: got {sample.id!r}, already used by {location}, wanted "
                "unique ids"
            )
        num_repeated += location != sample.location
        num_odd_keys += question.is_odd
    if num_repeated and is_main():
        print(f"{name}: {num_repeated:,} questions are there twice: asked once", file=sys.stderr)
    rows = sorted((place, id, digest) for id, (place, _, digest) in found.items())
    places, ids, digests = zip(*rows, strict=True)
    return QuestionSet(
        name, source, ids, digests, lambda i: read(places[i]), benchmark, num_odd_keys
    )


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
    engine = session.rollout_engine()
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


def _check_made_with(session: Session, weights: Any, run_dir: Path) -> None:
    """Note what answers are made with; refuse to add to those made otherwise."""
    settings = settings_of(session.config).items()
    now = {key: value for key, value in settings if _decides(key)}
    now["model.path's weights"] = weights
    path = run_dir / _ANSWERS / _MADE_WITH
    before = read_json(path) if path.is_file() else now
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


def _own_question(samples: Sequence[Sample], place: int) -> Question:
    return Question(samples[place], group=samples[place].source)


def _reader(benchmark: Benchmark, source: str) -> tuple[Callable[[int], Question], int]:
    """A function from a place to its question, over all parts, and how many places there are."""
    key, split = f"eval.sources.{benchmark.name}", benchmark.split
    parts = open_rows(
        source, key=key, split=split, subsets=benchmark.subsets, download=(f"*{split}*",)
    )
    rows = [(part, place) for part in parts for place in range(len(part))]
    if not rows:
        raise ValueError(f"{key}: {source} has no rows of split {split!r}, wanted at least 1")

    def read(place: int) -> Question:
        part, row_place = rows[place]
        row, location = part.row(row_place), part.location(row_place)
        check_row(benchmark.name, benchmark.columns, row, location)
        at = f"{benchmark.name}: {location}"
        images = partial(image_refs, column="image", base_dir=part.base_dir, at=at)
        return benchmark.to_question(row, at, images)

    return read, len(rows)


def _digest(question: Question, image_digests: dict[ImageRef, str]) -> str:
    sample = question.sample
    parts = (sample_digest(sample, image_digests), question.options, question.kind, sample.columns)
    text = json.dumps(parts, default=str, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
