"""The order in which prompts are drawn."""

import random
from dataclasses import dataclass
from functools import lru_cache


@dataclass(frozen=True)
class PromptOrder:
    """An endless order of rows, a fresh permutation per epoch.

    A pure function of the position, so a resumed run needs no state but that integer.
    """

    num_samples: int
    seed: int

    def __post_init__(self) -> None:
        if self.num_samples < 1:
            raise ValueError(f"num_samples: got {self.num_samples}, wanted at least 1")

    def take(self, position: int, count: int) -> list[int]:
        """Row indices of draws `position` to `position + count - 1`, counted from the run's start.

        Raises:
            ValueError: a negative position or count.
        """
        if position < 0 or count < 0:
            raise ValueError(f"position, count: got {position}, {count}, wanted at least 0")
        indices = []
        for draw in range(position, position + count):
            epoch, place = divmod(draw, self.num_samples)
            indices.append(permutation(self.num_samples, f"{self.seed}/epoch/{epoch}")[place])
        return indices


@lru_cache(maxsize=4)
def permutation(length: int, key: str) -> tuple[int, ...]:
    """A permutation of range(length) fixed by `key`, the same on every machine."""
    indices = list(range(length))
    random.Random(key).shuffle(indices)
    return tuple(indices)
