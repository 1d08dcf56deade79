"""Runs' folders with an archive of invented groups, for what a short run cannot hold."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from care_train.reporting.archive import ArchiveWriter
from care_train.reporting.archive_schema import group_schema
from care_train.reporting.files import JsonlWriter

_ROLES = ("anchor", "hard_negative", "hard_negative", "unused")


def write_metrics(folder: Path, config: str = "", seed: int = 0) -> Path:
    """A run's folder without an archive: metrics of 30 steps, and its configuration."""
    writer = JsonlWriter(folder / "metrics.jsonl")
    for step in range(1, 31):
        values = {"accuracy": (step * (1 + seed)) % 7 / 7, "groups": 8, "groups_skipped": 2}
        writer.write({"phase": "train", "step": step, **values})
    writer.close()
    (folder / "config.yaml").write_text(config)
    return folder


def write_run(folder: Path, groups: Sequence[dict[str, Any]], per_step: int = 16) -> Path:
    """A run's folder: a metric per step, and `groups` as its archive."""
    folder.mkdir(parents=True, exist_ok=True)
    metrics = JsonlWriter(folder / "metrics.jsonl")
    image = Image.new("RGB", (40, 30), "red")
    with ArchiveWriter(folder, 0, 1, None) as archive:
        for step, first in enumerate(range(0, len(groups), per_step), start=1):
            rows = [row | {"step": step} for row in groups[first : first + per_step]]
            archive.write_step(step, rows, [(image,)] * len(rows))
            metrics.write({"phase": "train", "step": step, "accuracy": 0.5, "reward": 0.4})
    metrics.close()
    return folder


def write_evaluation(run: Path, step: int, decoding: str, said: Sequence[str]) -> None:
    """Add an evaluation to a run's archive: what was said of each question, whose answer is `a`."""
    rows = [
        _question(place)
        | {"step": step, "decoding": decoding, **_answer(f"<answer>{word}</answer>", word == "a")}
        for place, word in enumerate(said)
    ]
    image = Image.new("RGB", (40, 30), "red")
    with ArchiveWriter(run, 0, 1, None) as archive:
        archive.write_evaluation(step, decoding, rows, [(image,)] * len(rows))


def invented_groups(number: int) -> Iterator[dict[str, Any]]:
    """`number` groups of one anchor, two hard negatives and an unused rollout."""
    for place in range(number):
        texts = [f"<think>it is {word}</think><answer>{word}</answer>" for word in "abcd"]
        yield group(place, texts)


def group(
    place: int, texts: Sequence[str], roles: Sequence[str] = _ROLES, **changes: Any
) -> dict[str, Any]:
    """One group whose rollouts said `texts`; the first is right."""
    pairs = zip(texts, roles, strict=True)
    rollouts = [_rollout(text, role, is_right=not i) for i, (text, role) in enumerate(pairs)]
    row = {
        **_question(place),
        **{"rank": 0, "group": place, "outcome": "anchored", "reason": "", "num_correct": 1},
        **{"num_negatives": 2, "equalize_factor": 1.0, "anchor_clamped": False},
        **{"reflection": "none", "reflect_on": None, "pair_distances": None},
        "rollouts": rollouts,
    }
    return row | changes


def _question(place: int) -> dict[str, Any]:
    return {
        **{"row_id": f"row-{place}", "visit": 0, "location": f"rows.jsonl:{place}"},
        **{"source": ("charts", "geometry")[place % 2], "prompt": f"what is number {place}?"},
        **{"answer": "a", "answer_type": "text", "options": []},
    }


def _answer(text: str, is_right: bool) -> dict[str, Any]:
    return {
        **{"text": text, "token_ids": np.arange(8, dtype=np.int32), "finished": True},
        **{"accuracy": float(is_right), "format": 1.0, "reward": float(is_right), "rewards": []},
        "verdict": "exact match" if is_right else "got another answer",
        "format_verdict": "",
    }


def _rollout(text: str, role: str, is_right: bool) -> dict[str, Any]:
    numbers = np.linspace(0, 1, 8, dtype=np.float32)
    credited = {
        "token_weights": numbers,
        "token_advantages": numbers if is_right else -numbers,
        "entropy": numbers,
        "ref_log_probs": -numbers,
        "clipped": np.zeros(8, np.int8),
    }
    return {
        **dict.fromkeys(group_schema().field("rollouts").type.value_type.names),
        **_answer(text, is_right),
        **{"think_start": 0, "think_end": 5, "answer_start": 5, "answer_end": 8},
        **{"role": role, "trained": role != "unused", "prefix_ids": np.empty(0, np.int32)},
        "rank_of_negative": 1 if role == "hard_negative" else None,
        "distance": 0.0 if is_right else 0.25,
        "raw_advantage": 1.4 if is_right else -0.7,
        "sequence_advantage": 1.4 if is_right else -0.35,
        **{"old_log_probs": -numbers, "old_log_prob_sum": -4.0},
        **(credited if role != "unused" else {}),
    }
