"""easy-VQA (github.com/vzhou842/easy-VQA): questions about one coloured shape on a 64 x 64 image.

The package ships its images, so a first run needs no download. Its rows carry no rationale; each
image's shape and colour follow from the answers to its own questions, and state one.
"""

import random
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product
from typing import Any

from care_train.data.schema import Sample

SHAPES = ("circle", "rectangle", "triangle")
COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")

_WORD = re.compile(r"[a-z]+")


@dataclass(frozen=True)
class Figure:
    """What an image shows."""

    shape: str
    color: str

    @property
    def words(self) -> frozenset[str]:
        return frozenset((self.shape, self.color))

    def describe(self) -> str:
        """The rationale that states it."""
        return f"the shape is a {self.color} {self.shape}"


FIGURES = tuple(Figure(shape, color) for shape, color in product(SHAPES, COLORS))
"""Every figure the set can show."""

_NAMES = frozenset((*SHAPES, *COLORS))


def easy_vqa_samples(split: str) -> list[Sample]:
    """All rows of a split, `train` or `test`, in the package's order; rows count from 1.

    Raises:
        ValueError: another split.
    """
    rows, paths = _rows(split)
    figures = derive_figures(split)
    samples = []
    for number, (question, answer, image) in enumerate(rows, 1):
        id, figure = f"easy_vqa/{split}/{number}", figures[image]
        samples.append(
            Sample(
                id=id,
                prompt=question,
                answer=answer,
                images=(paths[image],),
                rationale=figure.describe() if figure else None,
                failed_rationale=wrong_figure(figure, id).describe() if figure else None,
                source="easy_vqa",
                location=f"easy_vqa {split}: row {number}",
                columns={"image_id": image},
            )
        )
    return samples


def derive_figures(split: str) -> dict[int, Figure | None]:
    """What each image shows, by image id; None where its questions leave more than one figure."""
    asked = defaultdict(list)
    for question, answer, image in _rows(split)[0]:
        asked[image].append((question, answer))
    return {image: derive_figure(pairs) for image, pairs in asked.items()}


def derive_figure(pairs: Iterable[tuple[str, str]]) -> Figure | None:
    """The one figure that agrees with every (question, answer) pair, if exactly one does."""
    left = FIGURES
    for question, answer in pairs:
        left = tuple(figure for figure in left if agrees(figure, question, answer))
    return left[0] if len(left) == 1 else None


def agrees(figure: Figure, question: str, answer: str) -> bool:
    """Whether a figure makes the answer true.

    Yes-no questions ask whether the shape or colour they name is there, or, with `no` or `not`,
    whether it is absent. The others ask for a shape or a colour and name the other one as given.
    """
    words = set(_WORD.findall(question.lower()))
    named = words & _NAMES
    if answer not in ("yes", "no"):
        return named | {answer} <= figure.words
    negated = bool(words & {"no", "not"})
    return ((named <= figure.words) != negated) == (answer == "yes")


def wrong_figure(figure: Figure, key: str) -> Figure:
    """A figure that differs in shape, colour or both (equally likely), fixed by `key`."""
    rng = random.Random(key)
    change_shape, change_color = rng.choice([(True, False), (False, True), (True, True)])
    shape = rng.choice([s for s in SHAPES if s != figure.shape]) if change_shape else figure.shape
    color = rng.choice([c for c in COLORS if c != figure.color]) if change_color else figure.color
    return Figure(shape, color)


def _rows(split: str) -> tuple[list[tuple[str, str, int]], Any]:
    """(question, answer, image id) of each row, and the images' paths by id."""
    import easy_vqa  # Not there where only an integration is used.

    if split not in ("train", "test"):
        raise ValueError(f"easy_vqa: got split {split!r}, wanted 'train' or 'test'")
    questions = getattr(easy_vqa, f"get_{split}_questions")()
    return list(zip(*questions, strict=True)), getattr(easy_vqa, f"get_{split}_image_paths")()
