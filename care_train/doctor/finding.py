"""What a check says, and what checks look at."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeVar

from care_train.config import Config
from care_train.data import Sample
from care_train.models.load import LoadedModel

Item = TypeVar("Item")
Level = Literal["ok", "warning", "error"]


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    level: Level
    name: str
    message: str
    """What was found."""
    fix: str = ""
    """What to do about it; empty where all is well."""


@dataclass(frozen=True)
class Subject:
    """A run that has not started."""

    config: Config
    ranks: int
    """Processes that will train."""
    loaded: LoadedModel | None = field(default=None, repr=False)
    """None where it could not be loaded."""
    samples: Sequence[Sample] = field(default=(), repr=False)
    """Training rows; empty where they could not be read."""

    @property
    def run_dir(self) -> Path:
        """Where the run will write."""
        return Path(self.config.output_dir) / self.config.name

    @property
    def model(self) -> LoadedModel:
        """The loaded model.

        Raises:
            ValueError: it could not be loaded.
        """
        if self.loaded is None:
            raise ValueError("the model could not be loaded")
        return self.loaded

    @property
    def rows(self) -> Sequence[Sample]:
        """The training rows.

        Raises:
            ValueError: they could not be read.
        """
        if not self.samples:
            raise ValueError("the training rows could not be read")
        return self.samples


def spread(items: Sequence[Item], count: int) -> list[Item]:
    """`count` items, evenly spaced over all."""
    if len(items) <= count:
        return list(items)
    return [items[place * len(items) // count] for place in range(count)]
