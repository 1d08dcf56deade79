"""The questions of one benchmark, or of `eval.data`, read one at a time."""

import hashlib
import json
import sys
from bisect import bisect_right
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import accumulate

from care_train.config import Config
from care_train.data import ImageRef, load_samples, permutation, sample_digest
from care_train.data.columns import check_row
from care_train.data.files import open_rows
from care_train.distributed import is_main
from care_train.evaluation.benchmarks import BENCHMARKS
from care_train.evaluation.question import Benchmark, Question

DATA = "data"
"""The name under which `eval.benchmarks` has the rows of `eval.data`."""


@dataclass(frozen=True)
class QuestionSet:
    """Questions by place, and what says which answers are right."""

    name: str
    source: str
    """Where the rows are from."""
    ids: tuple[str, ...]
    digests: tuple[str, ...]
    """Of each question's words, images and key: what a record of its answer was made from."""
    read: Callable[[int], Question]
    benchmark: Benchmark | None
    """Whose rule says what is right; None: the run's own verifier and rewards."""
    num_odd_keys: int = 0
    """Multiple-choice questions whose key names none of their options: only a judge finds an answer
    to them right."""

    @property
    def digest(self) -> str:
        """Of all questions: evaluations with the same one asked the same."""
        return hashlib.blake2b("".join(self.digests).encode(), digest_size=8).hexdigest()


def open_questions(name: str, config: Config) -> QuestionSet:
    """The questions of a benchmark, each read once, so that a bad row is found before any answer.

    A question that is there twice, as in a folder with two copies of its table, is asked once.

    Args:
        name: one of `BENCHMARKS`, or `data`.
        config: `eval.sources` says where the rows are, `eval.max_samples` how many count.

    Raises:
        ValueError: no rows, a row that breaks the published schema, or an id that two different
            questions share.
    """
    if name == DATA:
        if config.held_out is None:
            raise ValueError("eval.data: got none, wanted the rows of the benchmark `data`")
        samples = load_samples(config.held_out, config.seed, "eval.data")
        count, source = len(samples), config.held_out.path

        def read_sample(place: int) -> Question:
            return Question(samples[place], group=samples[place].source)

        return _read_all(name, source, read_sample, range(count), count, None)
    benchmark = BENCHMARKS[name]
    source = config.eval.sources.get(name, benchmark.dataset)
    read, total = _reader(benchmark, source)
    limit = config.eval.max_samples or total
    order = permutation(total, f"{config.seed}/{name}") if limit < total else range(total)
    return _read_all(name, source, read, order, limit, benchmark)


def _read_all(
    name: str,
    source: str,
    read: Callable[[int], Question],
    order: Iterable[int],
    limit: int,
    benchmark: Benchmark | None,
) -> QuestionSet:
    """The first `limit` different questions of `order`, in the order of their rows."""
    found: dict[str, tuple[int, str, str]] = {}
    image_digests: dict[ImageRef, str] = {}
    num_odd_keys = num_repeated = 0
    for place in order:
        if len(found) == limit:
            break
        question = read(place)
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


def _digest(question: Question, image_digests: dict[ImageRef, str]) -> str:
    sample = question.sample
    parts = (sample_digest(sample, image_digests), question.options, question.kind, sample.columns)
    text = json.dumps(parts, default=str, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _reader(benchmark: Benchmark, source: str) -> tuple[Callable[[int], Question], int]:
    """A function from a place to its question, over all parts, and how many places there are."""
    key, split = f"eval.sources.{benchmark.name}", benchmark.split
    parts = open_rows(
        source, key=key, split=split, subsets=benchmark.subsets, download=(f"*{split}*",)
    )
    ends = list(accumulate(map(len, parts)))
    if not ends[-1]:
        raise ValueError(f"{key}: {source} has no rows of split {split!r}, wanted at least 1")

    def read(place: int) -> Question:
        which = bisect_right(ends, place)
        part, row_place = parts[which], place - (ends[which - 1] if which else 0)
        row, location = part.row(row_place), part.location(row_place)
        check_row(benchmark.name, benchmark.columns, row, location)
        return benchmark.to_question(row, f"{benchmark.name}: {location}", part.base_dir)

    return read, ends[-1]
