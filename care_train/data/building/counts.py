"""What became of the rows of a build's sources, in numbers."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from care_train.config.build import SourceSettings

_PLAIN = ("read", "filtered", "kept", "images", "text_only", "multi_image", "with_rationale")
_BY_REASON = ("rejected", "duplicates", "answer_types")


class SourceCounts(Counter[tuple[str, str]]):
    """What became of one source's rows, by (what, reason); the reason is empty but for _BY_REASON.

    `rejected` are told before duplicates are looked for; `duplicates` also name the source whose
    row is kept: `near_duplicate of chartqa`. `filtered` rows were left out by `where`; `images`
    and the others are of kept rows.
    """

    def add(self, what: str, reason: str = "", count: int = 1) -> None:
        """Count rows."""
        self[what, reason] += count

    def of(self, what: str) -> int:
        """All rows of `what`, whatever the reason."""
        return sum(count for (name, _), count in self.items() if name == what)

    @property
    def usable(self) -> int:
        """Rows after cleaning, before duplicates go: the paper's Table 4 counts these."""
        return self.of("kept") + self.of("duplicates")

    def keep(self, row: Mapping[str, Any]) -> None:
        """Count a kept row and what it holds."""
        images = len(row["looks"])
        self.add("kept")
        self.add("images", count=images)
        self.add("text_only", count=images == 0)
        self.add("multi_image", count=images > 1)
        self.add("with_rationale", count=row["rationale"] is not None)
        self.add("answer_types", row["answer_type"] or "inferred by the verifier")

    def as_dict(self) -> dict[str, Any]:
        """Plain values, in a fixed order."""
        values: dict[str, Any] = {what: self.of(what) for what in _PLAIN}
        for what in _BY_REASON:
            found = {reason: n for (name, reason), n in self.items() if name == what and n}
            values[what] = dict(sorted(found.items()))
        return values


def summary_of(
    sources: Sequence[SourceSettings], counts: Mapping[str, SourceCounts]
) -> dict[str, Any]:
    """The manifest's counts: per source as in the paper's Table 4, then in total."""
    usable = sum(one.usable for one in counts.values())
    kept = sum(one.of("kept") for one in counts.values())
    rows = {}
    for source in sources:
        one = counts[source.name]
        rows[source.name] = one.as_dict() | {
            "usable": one.usable,
            "usable_share": _share(one.usable, usable),
            "kept_share": _share(one.of("kept"), kept),
            "expected_rows": source.expected_rows,
        }
        # Every row is either left out, rejected, a duplicate or kept.
        assert one.of("read") == one.of("filtered") + one.of("rejected") + one.usable, source.name
    total: dict[str, int] = {"usable": usable}
    for what in (*_PLAIN[:-1], "rejected", "duplicates"):
        total[what] = sum(one.of(what) for one in counts.values())
    return {"sources": rows, "total": total}


def _share(part: int, whole: int) -> float:
    """A part in percent, to one decimal, as Table 4 prints it."""
    return round(100 * part / whole, 1) if whole else 0.0
