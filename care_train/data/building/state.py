"""How far a build has come, so that a killed one goes on: one database beside its parts."""

import json
import sqlite3
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from care_train.config.build import BuildSettings, SourceSettings
from care_train.data.building.prepare import Prepared

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

    def keep(self, row: Prepared) -> None:
        """Count a kept row and what it holds."""
        images = len(row.sample.images)
        self.add("kept")
        self.add("images", count=images)
        self.add("text_only", count=images == 0)
        self.add("multi_image", count=images > 1)
        self.add("with_rationale", count=row.sample.rationale is not None)
        self.add("answer_types", row.sample.answer_type or "inferred by the verifier")

    def as_dict(self) -> dict[str, Any]:
        """Plain values, in a fixed order."""
        values: dict[str, Any] = {what: self.of(what) for what in _PLAIN}
        for what in _BY_REASON:
            found = {reason: n for (name, reason), n in self.items() if name == what and n}
            values[what] = dict(sorted(found.items()))
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "SourceCounts":
        """What `as_dict` made of counts, back."""
        counts = cls({(what, ""): values[what] for what in _PLAIN})
        for what in _BY_REASON:
            counts.update({(what, reason): n for reason, n in values[what].items()})
        return counts


def summary_of(
    sources: Sequence[SourceSettings], counts: Mapping[str, SourceCounts]
) -> dict[str, Any]:
    """The manifest's counts: per source as in the paper's Table 4, then in total."""
    usable = sum(counts[source.name].usable for source in sources)
    kept = sum(counts[source.name].of("kept") for source in sources)
    rows = {}
    for source in sources:
        one = counts[source.name]
        rows[source.name] = one.as_dict() | {
            "usable": one.usable,
            "usable_share": share(one.usable, usable),
            "kept_share": share(one.of("kept"), kept),
            "expected_rows": source.expected_rows,
        }
        # Every row is either left out, rejected, a duplicate or kept.
        assert one.of("read") == one.of("filtered") + one.of("rejected") + one.usable, source.name
    total: dict[str, int] = {"usable": usable}
    for what in (*_PLAIN[:-1], "rejected", "duplicates"):
        total[what] = sum(one.of(what) for one in counts.values())
    return {"sources": rows, "total": total}


def share(part: int, whole: int) -> float:
    """A part in percent, to one decimal, as Table 4 prints it."""
    return round(100 * part / whole, 1) if whole else 0.0


class BuildState:
    """Committed once per chunk, after the chunk's part is on the disk."""

    def __init__(
        self, folder: Path, settings: BuildSettings, fingerprint: Mapping[str, Any]
    ) -> None:
        """
        Args:
            folder: where the parts are.
            settings: the build's; `overwrite` forgets what is there.
            fingerprint: all that decides the output.

        Raises:
            ValueError: the folder holds a build of other settings, inputs or library versions, or
                another process writes to it.
        """
        self.next_part = 0
        """How many parts are done."""
        self.position = (0, 0, 0)
        """Source, file and row (from 0) where the next chunk begins."""
        self.counts = {source.name: SourceCounts() for source in settings.sources}
        folder.mkdir(parents=True, exist_ok=True)
        self.connection = _locked(folder)
        try:
            if settings.overwrite:
                self._forget(folder)
            self._resume(folder, json.loads(json.dumps(fingerprint)))
        except BaseException:
            self.close()
            raise

    def commit(self, position: tuple[int, int, int]) -> None:
        """One more part is done; the next chunk begins at `position`."""
        self.next_part += 1
        self.position = position
        self._put("next_part", self.next_part)
        self._put("position", position)
        self._put("counts", {name: count.as_dict() for name, count in self.counts.items()})
        self.connection.commit()

    def close(self) -> None:
        """Leave the database."""
        self.connection.close()

    def _forget(self, folder: Path) -> None:
        for table in ("state", "kept", "bands"):
            self.connection.execute(f"DROP TABLE IF EXISTS {table}")
        for part in [*folder.glob("*.arrow"), *folder.glob("*.jsonl")]:
            part.unlink()

    def _resume(self, folder: Path, fingerprint: Mapping[str, Any]) -> None:
        self.connection.execute(
            "CREATE TABLE IF NOT EXISTS state (key TEXT PRIMARY KEY, value TEXT)"
        )
        stored = self.connection.execute("SELECT key, value FROM state")
        saved = {key: json.loads(value) for key, value in stored}
        if not saved:
            self._put("fingerprint", fingerprint)
            self.connection.commit()
        elif changes := changes_of(saved["fingerprint"], fingerprint):
            raise ValueError(
                f"output: {folder.parent} holds an unfinished build of another kind: "
                + "; ".join(changes)
                + ": set it back, or build anew with overwrite=true"
            )
        if "position" in saved:
            self.next_part, self.position = saved["next_part"], tuple(saved["position"])
            self.counts = {
                name: SourceCounts.from_dict(values) for name, values in saved["counts"].items()
            }

    def _put(self, key: str, value: Any) -> None:
        self.connection.execute(
            "INSERT OR REPLACE INTO state VALUES (?, ?)", (key, json.dumps(value))
        )


def changes_of(saved: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Each value that differs, by its dotted key."""
    found = []
    for key in {**saved, **now}:
        before, after = saved.get(key), now.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            found += changes_of(before, after, f"{prefix}{key}.")
        elif before != after:
            found.append(f"{prefix}{key}: saved {before!r:.200}, got {after!r:.200}")
    return found


def _locked(folder: Path) -> sqlite3.Connection:
    """The folder's database, for this process alone."""
    connection = sqlite3.connect(folder / "state.sqlite", timeout=1)
    connection.execute("PRAGMA locking_mode=EXCLUSIVE")
    try:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("CREATE TABLE IF NOT EXISTS locked (by_this_process INTEGER)")
    except sqlite3.OperationalError as error:
        connection.close()
        raise ValueError(
            f"output: {folder.parent}: {error}: does another process build there?"
        ) from None
    return connection
