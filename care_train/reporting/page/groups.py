"""A run's archive for the failure browser: its groups and evaluated answers, a line each in the
index, the rest in blocks."""

import base64
import gzip
import io
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from care_train.algorithm.spans import parse_spans
from care_train.data.images import load_image
from care_train.reporting.archive import ArchiveFile, archive_steps, image_path, read_files
from care_train.reporting.archive_schema import group_schema
from care_train.reporting.files import finite
from care_train.reporting.page.contents import Run

Json = dict[str, Any]
Row = Mapping[str, Any]
Packed = tuple[list[Json], bytes]
"""The lines of the index of some groups, and the groups as a block of the page."""
Decode = Callable[[Sequence[int]], tuple[str, list[int]]]
"""Token ids -> the text, and where each token's text ends (`models.prompts.TokenText.decode`)."""
TokenRange = tuple[int, int]

_VALUES = {
    "token_weights": "weight",
    "token_advantages": "advantage",
    "entropy": "entropy",
    "old_log_probs": "old",
    "ref_log_probs": "ref",
    "rollout_log_probs": "engine",
    "clipped": "clipped",
}
_FACTS = {
    "role": "role",
    "trained": "trained",
    "accuracy": "accuracy",
    "format": "format",
    "verdict": "verdict",
    "format_verdict": "formatVerdict",
    "reward": "reward",
    "distance": "distance",
    "rank_of_negative": "rank",
    "reflected_from": "reflectedFrom",
    "raw_advantage": "rawAdvantage",
    "sequence_advantage": "sequenceAdvantage",
    "finished": "finished",
}
_MAX_CHARS = 60_000
"""Of one text in the page; the archive has the whole of longer ones."""
_MAX_LINE = 160
_MAX_QUESTIONS = 1000
_PER_BLOCK = 50
_IMAGE_EDGE = 448
_MAX_IMAGE_PIXELS = 100_000_000


class PackedArchive:
    """A run's archive, packed; what is packed is kept for the next look at a run that goes on."""

    def __init__(self) -> None:
        # By the files and when they were written: another run may take this one's place.
        self._groups: dict[tuple[ArchiveFile, int], Packed] = {}
        self._answers: tuple[Any, dict[str, Packed], str] = (), {}, ""

    def groups(self, run: Run, max_bytes: int) -> tuple[dict[str, Packed], str]:
        """The packed files by name, of steps evenly spaced to `max_bytes`; what is left out."""
        steps, chosen = _spaced(run, "step", max_bytes)
        known, self._groups = self._groups, {}
        for version in _versions(chosen):
            self._groups[version] = known.get(version) or _packed(
                read_files([version[0]]).to_pylist(), run, _decoder(run)
            )
        found = {file.path.stem: one for (file, _), one in self._groups.items() if one[0]}
        return found, _left_out((len(chosen), len(steps), "steps"))

    def answers(self, run: Run, max_bytes: int) -> tuple[dict[str, Packed], str]:
        """The packed questions by block, each with its answers of evaluations evenly spaced to
        `max_bytes`; what is left out."""
        steps, chosen = _spaced(run, "eval", max_bytes)
        versions = _versions(chosen)
        if versions != self._answers[0]:
            rows = _questions(chosen)
            shown = rows[:: max(1, -(-len(rows) // _MAX_QUESTIONS))]
            packed = {
                f"answers-{place}": _packed_answers(shown[place : place + _PER_BLOCK], run)
                for place in range(0, len(shown), _PER_BLOCK)
            }
            evaluations = len(chosen), len(steps), "evaluations"
            note = _left_out(evaluations, (len(shown), len(rows), "questions"))
            self._answers = versions, packed, note
        return self._answers[1:]


def pack(value: Any) -> bytes:
    """A block of data as the page's scripts read it: JSON, gzip. Any text is safe in it."""
    try:
        text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    except ValueError:
        text = json.dumps(finite(value), allow_nan=False, separators=(",", ":"))
    # No time in it: the same data is the same page.
    return gzip.compress(text.encode(), compresslevel=6, mtime=0)


def _spaced(
    run: Run, kind: str, max_bytes: int
) -> tuple[list[list[ArchiveFile]], list[list[ArchiveFile]]]:
    """The files of all steps, and of the last and evenly spaced ones before it, of about so many
    bytes at most."""
    steps = archive_steps(run.folder, kind)
    total = sum(file.path.stat().st_size for file in chain(*steps))
    every = max(1, -(-total // max_bytes))
    return steps, list(reversed(steps[::-1][::every]))


def _versions(steps: Iterable[Sequence[ArchiveFile]]) -> list[tuple[ArchiveFile, int]]:
    """Each file, and when it was written."""
    return [(file, file.path.stat().st_mtime_ns) for file in chain(*steps)]


def _left_out(*counts: tuple[int, int, str]) -> str:
    return ", ".join(f"{shown} of {total} {what}" for shown, total, what in counts if shown < total)


def _packed(rows: Sequence[Row], run: Run, decode: Decode | None) -> Packed:
    """Groups with their images, each once; without `decode`, the run's tokenizer, values are shown
    per span, not per token."""
    groups = [
        {
            **_question(row, _MAX_CHARS),
            "size": sum(one["reflected_from"] is None for one in row["rollouts"]),
            "options": row["options"] or [],
            "images": row["images"] or [],
            "reflection": row["reflection"],
            "rollouts": [_rollout(rollout, decode, run.tags) for rollout in row["rollouts"]],
        }
        for row in rows
    ]
    names = dict.fromkeys(name for group in groups for name in group["images"])
    images = {name: _thumbnail(image_path(run.folder, name)) for name in names}
    return list(map(_index_line, rows)), pack({"groups": groups, "images": images})


def _index_line(row: Row) -> Json:
    """What the list, its filters and the search for a question need of a group."""
    sampled = [one for one in row["rollouts"] if one["reflected_from"] is None]
    rewards = [rollout["reward"] for rollout in sampled]
    return {
        **_question(row, _MAX_LINE),
        "size": len(sampled),
        "roles": sorted({rollout["role"] for rollout in row["rollouts"]}),
        "reward": round(sum(rewards) / len(rewards), 4) if rewards else None,
    }


def _question(row: Row, max_chars: int) -> Json:
    return {
        "step": row["step"],
        "row": row["row_id"],
        "source": row["source"] or "",
        "type": row["answer_type"] or "",
        "outcome": row["reason"] or row["outcome"],
        "correct": row["num_correct"],
        "prompt": _cut(row["prompt"], max_chars),
        "answer": _cut(row["answer"], max_chars),
        **({"decoding": row["decoding"]} if "decoding" in row else {}),
    }


def _questions(evaluations: Sequence[Sequence[ArchiveFile]]) -> list[list[Json]]:
    """Each question as a group per decoding, whose rollouts are the answers of all evaluations."""
    answers: dict[str, dict[str, list[Json]]] = {}
    for files in evaluations:
        for row in read_files(files, evaluations=True).to_pylist():
            title = f"After {row['step']} steps" if row["step"] else "Before training"
            title = title if len(evaluations) > 1 else "Answer"
            by_decoding = answers.setdefault(row["row_id"], {})
            by_decoding.setdefault(row["decoding"], []).append(row | {"role": title})
    nothing = dict.fromkeys(group_schema().field("rollouts").type.value_type.names)
    return [
        [
            each[-1]
            | {
                "outcome": _outcome(each[0]["accuracy"], each[-1]["accuracy"], len(each)),
                "reason": "",
                "num_correct": sum(answer["accuracy"] == 1 for answer in each),
                "reflection": "none",
                "rollouts": [nothing | answer for answer in each],
            }
            for each in by_decoding.values()
        ]
        for by_decoding in answers.values()
    ]


def _packed_answers(questions: Iterable[Sequence[Row]], run: Run) -> Packed:
    rows = list(chain(*questions))
    lines, block = _packed(rows, run, None)
    for line, row in zip(lines, rows, strict=True):
        verdict = f"{row['verdict']}\n{row['format_verdict']}"
        line |= {"roles": [], "reward": row["reward"], "verdict": verdict}
    return lines, block


def _outcome(first: float, last: float, evaluations: int) -> str:
    before, after = (
        "right" if accuracy == 1 else "wrong" if accuracy == 0 else "partly right"
        for accuracy in (first, last)
    )
    if evaluations == 1:
        return after
    return f"stayed {after}" if before == after else f"became {after}"


def _rollout(rollout: Row, decode: Decode | None, tags: tuple[str, str]) -> Json:
    ids, prefix = rollout["token_ids"], rollout["prefix_ids"]
    if decode is None:
        pieces, ranges = _spans(rollout, tags)
    else:
        # Both at once: a character may begin in the prefix.
        text, ends = decode([*(prefix or ()), *ids])
        pieces = [text[i:j] for i, j in zip([0, *ends[:-1]], ends, strict=True)]
        ranges = [(place, place + 1) for place in range(len(ids))]
    forced = "".join(pieces[: len(pieces) - len(ranges)])
    pieces = pieces[len(pieces) - len(ranges) :]
    kept, left = _bounded(pieces)
    values = {name: _per_piece(rollout[key], ranges[: len(kept)]) for key, name in _VALUES.items()}
    return {
        **{name: rollout[key] for key, name in _FACTS.items()},
        "rewards": {reward["name"]: reward["value"] for reward in rollout["rewards"] or ()},
        "prefix": _cut(forced, _MAX_CHARS),
        "pieces": kept,
        "left": left,
        "tokens": len(ids),
        "perToken": decode is not None,
        **{name: each for name, each in values.items() if each is not None},
    }


def _spans(rollout: Row, tags: tuple[str, str]) -> tuple[list[str], list[TokenRange]]:
    """The text cut at the rationale and the answer, and the tokens of each part."""
    text, num_tokens = rollout["text"], len(rollout["token_ids"])
    found = parse_spans(text, *tags)
    marked = sorted(
        (span, (rollout[f"{name}_start"], rollout[f"{name}_end"]))
        for name, span in (("think", found.think), ("answer", found.answer))
        if span is not None and rollout[f"{name}_start"] is not None
    )
    pieces: list[str] = []
    ranges: list[TokenRange] = []
    place = token = 0
    for (start, end), (first, last) in marked:
        # An answer inside an unclosed rationale belongs to it.
        if start >= place:
            pieces += [text[place:start], text[start:end]]
            ranges += [(token, max(first, token)), (max(first, token), last)]
            place, token = end, last
    return [*pieces, text[place:]], [*ranges, (token, num_tokens)]


def _per_piece(
    values: Sequence[float] | None, ranges: Sequence[TokenRange]
) -> list[float | None] | None:
    """The mean of `values` over each piece's tokens; None for a piece without any."""
    if values is None:
        return None
    array = np.asarray(values, np.float64)
    if all(end == start + 1 for start, end in ranges):
        means = array[: len(ranges)]
    else:
        parts = (array[start:end] for start, end in ranges)
        means = np.array([part.mean() if len(part) else math.nan for part in parts])
    return [value if math.isfinite(value) else None for value in np.round(means, 5).tolist()]


def _bounded(pieces: Sequence[str]) -> tuple[list[str], int]:
    """The first pieces, up to the bound, and how many characters are left out."""
    kept: list[str] = []
    room = _MAX_CHARS
    for piece in pieces:
        if room <= 0:
            break
        kept.append(piece[:room])
        room -= len(piece)
    return kept, sum(map(len, pieces)) - sum(map(len, kept))


def _cut(text: str | None, max_chars: int) -> str:
    text = text or ""
    return text if len(text) <= max_chars else f"{text[:max_chars]} […]"


def _decoder(run: Run) -> Decode | None:
    """The tokenizer of the run's own folder or its model's; None where there is none to be had."""
    checkpoints = sorted(run.folder.glob("checkpoints/*/model"), reverse=True)
    places = [run.folder / "final", run.folder / "cold_start", run.folder / "base", *checkpoints]
    for place in [*places, Path(str(run.settings.get("model.path", "")))]:
        file = place / "tokenizer.json"
        if file.is_file() and (decode := _tokenizer(place, file.stat().st_mtime_ns)):
            return decode
    return None


@lru_cache(maxsize=8)
def _tokenizer(folder: Path, written: int) -> Decode | None:
    """The tokenizer of a folder, as it was `written`; None where it cannot be read."""
    from transformers import AutoTokenizer

    from care_train.models.prompts import TokenText

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True
        )
        return TokenText(tokenizer).decode
    except (OSError, ValueError):
        return None


@lru_cache(maxsize=4096)
def _thumbnail(path: Path) -> str | None:
    """A small WebP of the image as base64; None where it is gone or cannot be read."""
    try:
        image = load_image(path, location=path.name, max_pixels=_MAX_IMAGE_PIXELS)
    except ValueError:
        return None
    image.thumbnail((_IMAGE_EDGE, _IMAGE_EDGE), Image.Resampling.LANCZOS)
    content = io.BytesIO()
    image.save(content, "WEBP", quality=82, method=2)
    return base64.b64encode(content.getvalue()).decode()
