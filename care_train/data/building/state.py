"""How far a build has come, so that a killed one goes on: one database beside its parts."""

import json
import sqlite3
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from care_train.config import BuildSettings
from care_train.data.building.counts import SourceCounts, counts_from


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
            self._go_on(folder, json.loads(json.dumps(fingerprint)))
        except BaseException:
            self.close()
            raise

    def _forget(self, folder: Path) -> None:
        for table in ("state", "kept", "bands"):
            self.connection.execute(f"DROP TABLE IF EXISTS {table}")
        for part in [*folder.glob("*.arrow"), *folder.glob("*.jsonl")]:
            part.unlink()

    def _go_on(self, folder: Path, fingerprint: Mapping[str, Any]) -> None:
        self.connection.execute(
            "CREATE TABLE IF NOT EXISTS state (key TEXT PRIMARY KEY, value TEXT)"
        )
        saved = dict(self.connection.execute("SELECT key, value FROM state"))
        if not saved:
            self._put("fingerprint", fingerprint)
            self.connection.commit()
        elif changes := _changes(json.loads(saved["fingerprint"]), fingerprint):
            raise ValueError(
                f"output: {folder.parent} holds an unfinished build of another kind: "
                + "; ".join(changes)
                + ": set it back, or build anew with overwrite=true"
            )
        if "position" in saved:
            self.next_part = json.loads(saved["next_part"])
            self.position = tuple(json.loads(saved["position"]))
            self.counts = counts_from(json.loads(saved["counts"]))

    def commit(self, position: tuple[int, int, int]) -> None:
        """A part more is done; the next chunk begins at `position`."""
        self.next_part += 1
        self.position = position
        self._put("next_part", self.next_part)
        self._put("position", position)
        self._put("counts", {name: count.as_dict() for name, count in self.counts.items()})
        self.connection.commit()

    def close(self) -> None:
        """Leave the database."""
        self.connection.close()

    def _put(self, key: str, value: Any) -> None:
        self.connection.execute(
            "INSERT OR REPLACE INTO state VALUES (?, ?)", (key, json.dumps(value))
        )


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


def _changes(saved: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    found = []
    for key in {**saved, **now}:
        before, after = saved.get(key), now.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            found += _changes(before, after, f"{prefix}{key}.")
        elif before != after:
            found.append(f"{prefix}{key}: saved {_short(before)}, got {_short(after)}")
    return found


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 200 else text[:200] + "..."
