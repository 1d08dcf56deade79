"""The questions of one benchmark, or of `eval.data`, read one at a time."""

import hashlib
import json
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from care_train.config import Config
from care_train.data import ImageRef, Sample, load_samples, sample_digest
from care_train.data.order import permutation
from care_train.evaluation.benchmarks import BENCHMARKS
from care_train.evaluation.columns import check_row
from care_train.evaluation.question import Benchmark, Judgement, Question
from care_train.evaluation.rows import Rows, open_rows

DATA = "data"
"""The name under which `eval.benchmarks` has the rows of `eval.data`."""


@dataclass(frozen=True)
class QuestionSet:
    """Questions by place, and the rule that says which answers are right."""

    name: str
    title: str
    source: str
    """Where the rows are from."""
    ids: tuple[str, ...]
    digests: tuple[str, ...]
    """Of each question's words, images and key: what a record of its answer was made from."""
    read: Callable[[int], Question]
    judge: Callable[[str, Question], Judgement] | None
    """The benchmark's rule; None: the run's own verifier and rewards."""

    @property
    def digest(self) -> str:
        """Of all questions: evaluations with the same one asked the same."""
        return hashlib.blake2b("".join(self.digests).encode(), digest_size=8).hexdigest()


def open_questions(name: str, config: Config) -> QuestionSet:
    """The questions of a benchmark, every row checked.

    Args:
        name: one of `BENCHMARKS`, or `data`.
        config: `eval.sources` says where the rows are, `eval.max_questions` how many count.

    Raises:
        ValueError: no rows, a row that breaks the published schema, or an id used twice.
    """
    if name == DATA:
        return _from_samples(load_samples(config.eval.data, config.seed), config.eval.data.path)
    benchmark = BENCHMARKS[name]
    source = config.eval.sources.get(name, benchmark.dataset)
    parts = open_rows(source, benchmark.subsets, benchmark.split)
    total = sum(part.count for part in parts)
    limit = config.eval.max_questions
    places: Sequence[int] = range(total)
    if limit is not None and limit < total:
        places = sorted(permutation(total, f"{config.seed}/{name}")[:limit])
    read = _reader(benchmark, parts)
    return _question_set(
        name, benchmark.title, source, len(places), lambda i: read(places[i]), benchmark.judge
    )


def _from_samples(samples: Sequence[Sample], source: str) -> QuestionSet:
    def read(place: int) -> Question:
        sample = samples[place]
        return Question(sample, group=sample.source)

    return _question_set(DATA, "held-out rows", source, len(samples), read, None)


def _question_set(
    name: str,
    title: str,
    source: str,
    count: int,
    read: Callable[[int], Question],
    judge: Callable[[str, Question], Judgement] | None,
) -> QuestionSet:
    """Read every question once, so that a bad row or path is found before the first answer."""
    locations: dict[str, str] = {}
    digests, image_digests = [], {}
    for place in range(count):
        question = read(place)
        sample = question.sample
        if sample.id in locations:
            raise ValueError(
                f"{sample.location}: id: got {sample.id!r}, already used by "
                f"{locations[sample.id]}, wanted unique ids"
            )
        locations[sample.id] = sample.location
        digests.append(_digest(question, image_digests))
    return QuestionSet(name, title, source, tuple(locations), tuple(digests), read, judge)


def _digest(question: Question, image_digests: dict[ImageRef, str]) -> str:
    sample = question.sample
    parts = (sample_digest(sample, image_digests), question.options, question.kind, sample.columns)
    text = json.dumps(parts, default=str, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _reader(benchmark: Benchmark, parts: Sequence[Rows]) -> Callable[[int], Question]:
    ends = list(accumulate(part.count for part in parts))

    def read(place: int) -> Question:
        which = bisect_right(ends, place)
        part, row_place = parts[which], place - (ends[which - 1] if which else 0)
        row, location = part.read(row_place), part.location(row_place)
        check_row(benchmark.name, benchmark.columns, row, location)
        return benchmark.to_question(row, f"{benchmark.name}: {location}", part.base_dir)

    return read
