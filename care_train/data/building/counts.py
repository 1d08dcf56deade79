"""Exact counts of what became of every row."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from care_train.config import SourceSettings
from care_train.data.building.dedup import Duplicate
from care_train.data.building.prepare import Prepared, Rejected

_COUNTERS = ("rejected", "duplicates", "answer_types")


@dataclass
class SourceCounts:
    """One source's rows."""

    read: int = 0
    filtered: int = 0
    """Left out by `where`."""
    rejected: Counter[str] = field(default_factory=Counter)
    """By reason, before duplicates are looked for."""
    duplicates: Counter[str] = field(default_factory=Counter)
    """By reason and the source whose row is kept: `near_duplicate of chartqa`."""
    kept: int = 0
    images: int = 0
    """Images of kept rows."""
    text_only: int = 0
    multi_image: int = 0
    with_rationale: int = 0
    answer_types: Counter[str] = field(default_factory=Counter)

    @property
    def usable(self) -> int:
        """Rows after cleaning, before duplicates go: the paper's Table 4 counts these."""
        return self.kept + sum(self.duplicates.values())

    def as_dict(self) -> dict[str, Any]:
        """Plain values, counters in the order of their keys."""
        values = dict(vars(self))
        return values | {key: dict(sorted(values[key].items())) for key in _COUNTERS}

    def keep(self, row: Prepared) -> None:
        images = len(row.sample.images)
        self.kept += 1
        self.images += images
        self.text_only += images == 0
        self.multi_image += images > 1
        self.with_rationale += row.sample.rationale is not None
        self.answer_types[row.answer_type or "inferred by the verifier"] += 1

    def reject(self, row: Rejected) -> None:
        self.rejected[row.reason] += 1

    def repeat(self, duplicate: Duplicate) -> None:
        self.duplicates[f"{duplicate.reason} of {duplicate.first_source}"] += 1


def counts_from(saved: Mapping[str, Mapping[str, Any]]) -> dict[str, SourceCounts]:
    """What `as_dict` made of counts, back."""

    def one(values: Mapping[str, Any]) -> SourceCounts:
        counters = {key: Counter(values[key]) for key in _COUNTERS}
        return SourceCounts(**{**values, **counters})

    return {name: one(values) for name, values in saved.items()}


def summary_of(sources: list[SourceSettings], counts: Mapping[str, SourceCounts]) -> dict[str, Any]:
    """The manifest's counts: per source as in the paper's Table 4, then in total."""
    usable = sum(counts[source.name].usable for source in sources)
    kept = sum(counts[source.name].kept for source in sources)
    rows = {}
    for source in sources:
        one = counts[source.name]
        rows[source.name] = one.as_dict() | {
            "usable": one.usable,
            "usable_share": share(one.usable, usable),
            "kept_share": share(one.kept, kept),
            "expected_rows": source.expected_rows,
        }
        # Nothing is dropped without a line: this would be a bug of ours.
        assert one.read == one.filtered + sum(one.rejected.values()) + one.usable, source.name
    total = {
        key: sum(getattr(counts[source.name], key) for source in sources)
        for key in ("read", "filtered", "usable", "kept", "images", "text_only", "multi_image")
    }
    total["rejected"] = sum(sum(c.rejected.values()) for c in counts.values())
    total["duplicates"] = sum(sum(c.duplicates.values()) for c in counts.values())
    return {"sources": rows, "total": total}


def share(part: int, whole: int) -> float:
    """A part in percent, to one decimal, as Table 4 prints it."""
    return round(100 * part / whole, 1) if whole else 0.0
