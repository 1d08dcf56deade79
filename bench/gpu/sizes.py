"""The problems that are measured, and the tiny ones of a dry run.

Shape letters: N rows, D hidden, V vocabulary.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Sizes:
    """Heads and numbers of rows."""

    heads: dict[str, tuple[int, int]]
    """D and V by name."""
    headline_rows: tuple[int, ...]
    more_rows: tuple[int, ...]
    profile_rows: int
    deep: tuple[int, int, int]
    """N, D and V with more than 2^31 logits."""
    real_rows: int
    """N of the real heads that are compared with float64."""


_QWEN_HEADS = {"7b": (3584, 152_064), "3b": (2048, 151_936)}
_FULL = Sizes(
    heads=_QWEN_HEADS,
    headline_rows=(8192, 4096),
    more_rows=(1024, 2048, 16_384),
    profile_rows=8192,
    deep=(16_384, 64, 152_064),
    real_rows=2048,
)
_DRY = Sizes(
    heads={"7b": (64, 304), "3b": (32, 300)},
    headline_rows=(24,),
    more_rows=(8, 40),
    profile_rows=24,
    deep=(20, 16, 50),
    real_rows=12,
)


def sizes_of(dry: bool) -> Sizes:
    """Qwen2.5-VL's heads, or tiny ones."""
    return _DRY if dry else _FULL
