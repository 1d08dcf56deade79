"""`care-train doctor`: what would go wrong in a run, found before it starts.

Each check is one function from a `Subject` to a `Finding`; a check that breaks is an error finding.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeVar

from care_train.config import Config
from care_train.data import Sample
from care_train.models.load import LoadedModel

Item = TypeVar("Item")


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    level: Literal["ok", "warning", "error"]
    message: str
    """What was found."""
    fix: str = ""
    """What to do about it; empty where all is well."""
    name: str = ""
    """Of the check; the report fills it in."""


def ok(message: str) -> Finding:
    return Finding("ok", message)


def warning(message: str, fix: str) -> Finding:
    return Finding("warning", message, fix)


def error(message: str, fix: str) -> Finding:
    return Finding("error", message, fix)


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
    def model(self) -> LoadedModel:
        """The loaded model; raises `UnavailableError` where it could not be loaded."""
        if self.loaded is None:
            raise UnavailableError("model")
        return self.loaded

    @property
    def rows(self) -> Sequence[Sample]:
        """The training rows; raises `UnavailableError` where they could not be read."""
        if not self.samples:
            raise UnavailableError("data")
        return self.samples


class UnavailableError(ValueError):
    """A check needs what could not be loaded, which is a finding of its own."""


def spread(items: Sequence[Item], count: int) -> list[Item]:
    """`count` items, evenly spaced over all."""
    if len(items) <= count:
        return list(items)
    return [items[place * len(items) // count] for place in range(count)]
