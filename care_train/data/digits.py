"""Strips of real handwritten digits and questions whose answer must be seen and derived.

The digits are UCI's optdigits (https://doi.org/10.24432/C50P49), 1,797 images of 8 x 8 that
scikit-learn ships, so a run needs no download. A strip shows 2 to 6 of them; its rationale reads
them and derives the answer step by step. The failed rationale misreads one digit and goes on from
there without another mistake: a near miss. Train and test share no image of a digit.

Every row is a pure function of its length, split and number.
"""

import io
import random
from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from typing import Any

import numpy as np
from PIL import Image

from care_train.data.schema import Sample

QUESTIONS = {
    "sum": "what is the sum of the digits?",
    "largest": "what is the largest digit?",
    "smallest": "what is the smallest digit?",
    "difference": "what is the largest digit minus the smallest?",
    "even": "how many digits are even?",
}
KINDS = tuple(QUESTIONS)
_NUM_TEST_IMAGES = 400
_TILE = 28  # pixels a side: four patches of 14, which Qwen's vision towers merge into one token

Derived = tuple[str, str, str]
"""Question, rationale and answer."""


def digits_sample(length: int, split: str, row: int) -> Sample:
    """A strip of so many digits with a question.

    Its `columns` hold the question's kind, the `digits` and the `failed_answer` that the failed
    rationale leads to.

    Args:
        length: how many digits, one of `config.LEVELS`.
        split: `train` or `test`.
        row: from 1.
    """
    rng = random.Random(f"digits-{length}/{split}/{row}")
    labels, tiles = _images()
    chosen = [rng.choice(_image_numbers(split)) for _ in range(length)]
    digits = [labels[i] for i in chosen]
    # Of two nines one stays the largest whatever is misread: another kind is asked.
    kinds = rng.sample(KINDS, len(KINDS))
    kind, slips = next((kind, slips) for kind in kinds if (slips := _slips(kind, digits)))
    image = np.concatenate([tiles[i] for i in chosen], axis=1)
    slip, columns = rng.choice(slips), {"kind": kind, "digits": digits}
    right = derive(kind, digits)
    return derived_sample(f"digits-{length}", (split, row), image, right, slip, columns)


def derived_sample(
    name: str,
    place: tuple[str, int],
    pixels: np.ndarray,
    right: Derived,
    slip: Derived,
    columns: dict[str, Any],
) -> Sample:
    """A row whose rationale and answer follow from what its image shows.

    Args:
        name: the data set's, with its level.
        place: split and row.
        pixels: uint8 [height, width] grey or [height, width, 3] colored.
        right: what follows from what they show.
        slip: what follows from something misread.
        columns: more of the row.
    """
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    (split, row), (question, rationale, answer) = place, right
    return Sample(
        id=f"{name}/{split}/{row}",
        prompt=question,
        answer=answer,
        images=(file.getvalue(),),
        rationale=rationale,
        failed_rationale=slip[1],
        source=name.partition("-")[0],
        location=f"{name} {split}: row {row}",
        columns=columns | {"failed_answer": slip[2]},
    )


def derive(kind: str, digits: Sequence[int]) -> Derived:
    """Question (one of `KINDS`), rationale and answer of digits that are read left to right."""
    seen = f"i see {' '.join(map(str, digits))}"
    if kind == "even":
        steps, answer = counted("even ones", [digit for digit in digits if digit % 2 == 0])
    else:
        steps, answer = derived(kind, digits)
    return QUESTIONS[kind], " . ".join([seen, *steps]), str(answer)


def _slips(kind: str, digits: Sequence[int]) -> list[Derived]:
    """Derivations with one digit taken for another."""
    return near_misses(partial(derive, kind), digits, misread(digits, range(10)))


def derived(kind: str, numbers: Sequence[int]) -> tuple[list[str], int]:
    """A rationale's steps from numbers to an answer, and that: a sum, an extreme, a difference."""
    high, low = max(numbers), min(numbers)
    if kind == "difference":
        return [f"{high} minus {low} is {high - low}"], high - low
    if kind in ("largest", "tallest", "smallest", "shortest"):
        answer = high if kind in ("largest", "tallest") else low
        return [f"the {kind} is {answer}"], answer
    steps, total = [], numbers[0]
    for number in numbers[1:]:
        steps.append(f"{total} plus {number} is {total + number}")
        total += number
    return steps, total


def counted(what: str, numbers: Sequence[int]) -> tuple[list[str], int]:
    """A rationale's steps that name numbers of a kind and count them, and how many there are."""
    listed = " ".join(map(str, numbers)) or "none"
    return [f"{what} : {listed}", f"that makes {len(numbers)}"], len(numbers)


def near_misses(
    derive: Callable[[Any], Derived], shown: Sequence[Any], others: Iterable[Sequence[Any]]
) -> list[Derived]:
    """Derivations from what was misread, those that lead to another answer than what is shown."""
    answer = derive(shown)[2]
    return [found for found in map(derive, others) if found[2] != answer]


def is_test(content: str) -> bool:
    """Whether a picture of this content is one of the fifth that are in test and not in train."""
    return random.Random(content).random() < 0.2


def misread(numbers: Sequence[int], values: Sequence[int]) -> list[list[int]]:
    """Numbers with one of them taken for another of these values, in every way."""
    return [
        [*numbers[:place], wrong, *numbers[place + 1 :]]
        for place, right in enumerate(numbers)
        for wrong in values
        if wrong != right
    ]


@cache
def _images() -> tuple[list[int], list[np.ndarray]]:
    """What each image shows, and its pixels as dark ink on white, [28, 28] uint8."""
    # Here, as scikit-learn takes a second to import and other data sets do without it.
    from sklearn.datasets import load_digits

    data: Any = load_digits()
    tiles = []
    for image in data.images:  # [8, 8] of 0 to 16, ink bright
        tile = Image.fromarray((255 - image * 255 / 16).astype(np.uint8))
        tiles.append(np.asarray(tile.resize((_TILE, _TILE), Image.Resampling.BICUBIC)))
    return [int(label) for label in data.target], tiles


@cache
def _image_numbers(split: str) -> list[int]:
    """The images that a split draws from."""
    numbers = list(range(len(_images()[0])))
    random.Random("digits").shuffle(numbers)
    is_test = split == "test"
    return numbers[:_NUM_TEST_IMAGES] if is_test else numbers[_NUM_TEST_IMAGES:]
