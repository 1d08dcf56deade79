"""Groups as the failure browser shows them: a line each in the index, the rest in blocks."""

import base64
import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from care_train.algorithm.spans import parse_spans
from care_train.data.images import load_image

Json = dict[str, Any]
Decode = Callable[[Sequence[int]], tuple[str, list[int]]]
"""Token ids -> the text, and where each token's text ends (`models.prompts.TokenText.decode`)."""

_VALUES = {
    "token_weights": "weight",
    "token_advantages": "advantage",
    "entropy": "entropy",
    "old_log_probs": "old",
    "ref_log_probs": "ref",
    "rollout_log_probs": "engine",
}
_FACTS = (
    "role",
    "accuracy",
    "format",
    "verdict",
    "reward",
    "rewards",
    "distance",
    "reflected_from",
    "rank_of_negative",
    "sequence_advantage",
    "trained",
)
_MAX_CHARS = 60_000
"""Of one text in the page; a rollout of megabytes stays whole in the archive alone."""
_MAX_LINE = 160
_IMAGE_EDGE = 448
_MAX_IMAGE_PIXELS = 100_000_000


def index_line(row: Mapping[str, Any]) -> Json:
    """What the list, its filters and the search for a question need of an archive's row."""
    rollouts = row["rollouts"]
    rewards = [rollout["reward"] for rollout in rollouts if rollout["reward"] is not None]
    return {
        "step": row["step"],
        "row": str(row["row_id"]),
        "source": row["source"] or "",
        "type": row["answer_type"] or "",
        "outcome": row["outcome"] or "",
        "correct": row["num_correct"],
        "size": sum(rollout["reflected_from"] is None for rollout in rollouts),
        "roles": sorted({rollout["role"] for rollout in rollouts}),
        "reward": round(sum(rewards) / len(rewards), 4) if rewards else None,
        "prompt": _cut(row["prompt"], _MAX_LINE),
        "answer": _cut(row["answer"], _MAX_LINE),
    }


def group_block(
    rows: Iterable[Mapping[str, Any]], images: Path, decode: Decode | None, tags: tuple[str, str]
) -> Json:
    """Some groups whole, with their images, each once.

    Args:
        rows: of the archive.
        images: the folder that holds the archive's images by hash.
        decode: the run's tokenizer; without it values are shown per span, not per token.
        tags: names of the rationale's and the answer's tags.
    """
    groups = [_group(row, decode, tags) for row in rows]
    hashes = dict.fromkeys(one for group in groups for one in group["images"])
    return {"groups": groups, "images": {one: _thumbnail(images, one) for one in hashes}}


def _group(row: Mapping[str, Any], decode: Decode | None, tags: tuple[str, str]) -> Json:
    return {
        "step": row["step"],
        "row": str(row["row_id"]),
        "source": row["source"] or "",
        "prompt": _cut(row["prompt"], _MAX_CHARS),
        "images": list(row["images"] or ()),
        "answer": _cut(row["answer"], _MAX_CHARS),
        "type": row["answer_type"] or "",
        "options": row["options"] or {},
        "outcome": row["outcome"] or "",
        "correct": row["num_correct"],
        "rollouts": [_rollout(rollout, decode, tags) for rollout in row["rollouts"]],
    }


def _rollout(rollout: Mapping[str, Any], decode: Decode | None, tags: tuple[str, str]) -> Json:
    text, ids = rollout["text"] or "", rollout["token_ids"]
    ends = None
    if decode is not None and ids is not None:
        text, ends = decode(ids)
    if ends is None:
        pieces, ranges = _spans(text, rollout, tags)
    else:
        starts = [0, *ends[:-1]]
        pieces = [text[start:end] for start, end in zip(starts, ends, strict=True)]
        ranges = [(place, place + 1) for place in range(len(pieces))]
    values = {name: _per_piece(rollout.get(key), ranges) for key, name in _VALUES.items()}
    total, kept = len(text), _first_pieces(pieces, _MAX_CHARS)
    shown = [piece[:_MAX_CHARS] for piece in pieces[:kept]]
    return {
        **{key: rollout.get(key) for key in _FACTS},
        "pieces": shown,
        "tokens": None if ids is None else len(ids),
        "perToken": ends is not None,
        "left": total - sum(map(len, shown)),
        **{name: each[:kept] for name, each in values.items() if each is not None},
    }


def _spans(
    text: str, rollout: Mapping[str, Any], tags: tuple[str, str]
) -> tuple[list[str], list[tuple[int, int]]]:
    """The text cut at the rationale and the answer, and the tokens of each part."""
    found = parse_spans(text, *tags)
    marked = []
    for name, span in (("think", found.think), ("answer", found.answer)):
        first, last = rollout.get(f"{name}_start"), rollout.get(f"{name}_end")
        if span is not None and first is not None and last is not None:
            marked.append((span, (first, last)))
    pieces, ranges, place, token = [], [], 0, 0
    for (start, end), (first, last) in sorted(marked):
        pieces += [text[place:start], text[start:end]]
        ranges += [(token, first), (first, last)]
        place, token = end, last
    return [*pieces, text[place:]], [*ranges, (token, len(rollout["token_ids"] or ()))]


def _per_piece(
    values: Sequence[float] | None, ranges: Sequence[tuple[int, int]]
) -> list[float | None] | None:
    """The mean of `values` over the tokens of each piece; None where there are none."""
    if values is None or not len(values):
        return None
    array = np.asarray(values, np.float64)
    if all(end == start + 1 for start, end in ranges) and len(ranges) == len(array):
        means = array
    else:
        parts = (array[start:end] for start, end in ranges)
        means = np.array([part.mean() if len(part) else np.nan for part in parts])
    return [value if math.isfinite(value) else None for value in np.round(means, 6).tolist()]


def _first_pieces(pieces: Sequence[str], max_chars: int) -> int:
    """How many of the first pieces have no more characters than asked for; at least one."""
    total = 0
    for place, piece in enumerate(pieces):
        total += len(piece)
        if total > max_chars:
            return max(place, 1)
    return len(pieces)


def _cut(text: str | None, max_chars: int) -> str:
    text = text or ""
    return text if len(text) <= max_chars else f"{text[:max_chars]} […]"


def _thumbnail(folder: Path, name: str) -> str | None:
    """A small WebP of the image as base64; None where it is gone or cannot be read."""
    path = next(iter(sorted(folder.glob(f"{name}*"))), None)
    if path is None:
        return None
    try:
        image = load_image(path, location=name, max_pixels=_MAX_IMAGE_PIXELS)
    except ValueError:
        return None
    image.thumbnail((_IMAGE_EDGE, _IMAGE_EDGE), Image.Resampling.LANCZOS)
    content = io.BytesIO()
    image.save(content, "WEBP", quality=82, method=2)
    return base64.b64encode(content.getvalue()).decode()
