"""What every section of settings shares: strict validation, bounds, and the role on resume."""

from dataclasses import field
from enum import StrEnum
from typing import Annotated, Any, TypeVar, cast, dataclass_transform
from urllib.parse import SplitResult, urlsplit

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as pydantic_dataclass

T = TypeVar("T")

FROM_PYTHON = "python:"
"""What stands for rows and reward functions that a program hands over: `python:NAME`."""

SHIPPED_REWARDS = "care_train:"
"""What stands for reward functions that come with the installation: `care_train:NAME`."""

Share = Annotated[float, Field(ge=0, le=1)]
PositiveShare = Annotated[float, Field(gt=0, le=1)]


class Role(StrEnum):
    """What a setting may do to a run that is resumed; written beside it, or beside its section.

    A setting without one is `DECIDES`.
    """

    DECIDES = "decides"
    """Other values give other weights: a resumed run refuses them unless `allow_changes` names
    the key."""
    SPEED = "speed"
    """As `DECIDES` for training, where another value changes last bits; a resumed evaluation, whose
    finished answers it cannot change, takes any."""
    FIXED = "fixed"
    """The files of a checkpoint depend on it: it can never change."""
    FREE = "free"
    """Decides nothing about the weights: any value is taken."""


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(field, Field))
def section(cls: type[T]) -> type[T]:
    """Class decorator: a frozen dataclass that validates its fields.

    Unknown keys, NaN and infinities are errors. The docstring below a field is its description.
    """
    config = ConfigDict(extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)
    made: Any = pydantic_dataclass(cls, frozen=True, kw_only=True, config=config)
    return cast(type[T], made)


def check(holds: bool, key: str, got: object, wanted: str) -> None:
    """Raise ValueError naming key, got and wanted unless `holds`; for rules over several keys."""
    if not holds:
        raise ValueError(f"{key}: got {got!r}, wanted {wanted}")


def read_url(text: str) -> SplitResult | None:
    """The parts of an http or https address; None for anything else."""
    try:
        url = urlsplit(text)
        is_url = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
    except ValueError:  # of brackets or a port
        return None
    return url if is_url else None
