"""Groups as the failure browser shows them: a line each in the index, the rest in blocks."""

import base64
import gzip
import io
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from care_train.algorithm.spans import parse_spans
from care_train.data.images import load_image
from care_train.reporting.files import finite

Json = dict[str, Any]
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
_IMAGE_EDGE = 448
_MAX_IMAGE_PIXELS = 100_000_000


def pack(value: Any) -> bytes:
    """A block of data as the page's scripts read it: JSON, gzip. Any text is safe in it."""
    try:
        text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    except ValueError:
        text = json.dumps(finite(value), allow_nan=False, separators=(",", ":"))
    # No time in it: the same data is the same page.
    return gzip.compress(text.encode(), compresslevel=6, mtime=0)


def index_line(row: Mapping[str, Any]) -> Json:
    """What the list, its filters and the search for a question need of an archive's row."""
    sampled = [one for one in row["rollouts"] if one["reflected_from"] is None]
    rewards = [rollout["reward"] for rollout in sampled]
    return {
        **_question(row, _MAX_LINE),
        "size": len(sampled),
        "roles": sorted({rollout["role"] for rollout in row["rollouts"]}),
        "reward": round(sum(rewards) / len(rewards), 4) if rewards else None,
    }


def group_block(
    rows: Iterable[Mapping[str, Any]], images: Path, decode: Decode | None, tags: tuple[str, str]
) -> Json:
    """Some groups whole, with their images, each once.

    Args:
        rows: of the archive.
        images: the folder that holds the archive's images.
        decode: the run's tokenizer; without it values are shown per span, not per token.
        tags: names of the rationale's and the answer's tags.
    """
    groups = [
        {
            **_question(row, _MAX_CHARS),
            "size": sum(one["reflected_from"] is None for one in row["rollouts"]),
            "options": row["options"] or [],
            "images": row["images"] or [],
            "reflection": row["reflection"],
            "rollouts": [_rollout(rollout, decode, tags) for rollout in row["rollouts"]],
        }
        for row in rows
    ]
    names = dict.fromkeys(name for group in groups for name in group["images"])
    return {"groups": groups, "images": {name: _thumbnail(images / name) for name in names}}


def _question(row: Mapping[str, Any], max_chars: int) -> Json:
    return {
        "step": row["step"],
        "row": row["row_id"],
        "source": row["source"] or "",
        "type": row["answer_type"] or "",
        "outcome": row["reason"] or row["outcome"],
        "correct": row["num_correct"],
        "prompt": _cut(row["prompt"], max_chars),
        "answer": _cut(row["answer"], max_chars),
    }


def _rollout(rollout: Mapping[str, Any], decode: Decode | None, tags: tuple[str, str]) -> Json:
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


def _spans(rollout: Mapping[str, Any], tags: tuple[str, str]) -> tuple[list[str], list[TokenRange]]:
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
