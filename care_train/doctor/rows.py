"""Checks of the data: rows readable, images too, prompts short enough, rewards fast."""

import random
import time
from collections.abc import Sequence
from pathlib import Path

from care_train.data import Sample, load_images, load_samples
from care_train.doctor.finding import Finding, Subject, spread
from care_train.models.prompts import PromptEncoder
from care_train.verifier import Verifier

_NUM_ROWS = 32
_MEASURE_SECONDS = 20.0
"""For prompt lengths: a run measures all rows at its start."""
_MAX_REWARD_SECONDS = 0.05
"""Per response: more would be felt beside generation."""


def check_rows(subject: Subject) -> Finding:
    """Training rows become prompts of allowed length; of some the images are decoded too."""
    prompt, name, rows = subject.config.prompt, "training rows", subject.rows
    encoder = PromptEncoder(subject.model, prompt)
    lengths = _prompt_lengths(encoder, rows)
    short = [place for place in sorted(lengths) if lengths[place] <= prompt.max_prompt_tokens]
    found, fix = f"{len(lengths)} of {len(rows)} measured: ", ""
    if len(short) < len(lengths):
        place = min(lengths.keys() - set(short))
        found += (
            f"{len(lengths) - len(short)} prompts over prompt.max_prompt_tokens = "
            f"{prompt.max_prompt_tokens} ({_place([rows[place]])}: {lengths[place]}, the longest: "
            f"{max(lengths.values())})"
        )
        fix = "raise it, lower model.max_pixels, or leave them out with prompt.overlong=drop"
        if prompt.overlong == "error" or not short:
            return Finding("error", name, found, fix)
        found += ", which will be left out; the others: "
    some = [rows[place] for place in spread(short, _NUM_ROWS)]
    start = time.perf_counter()
    encoder.encode(some)
    seconds = (time.perf_counter() - start) / len(some)
    return Finding(
        "warning" if fix else "ok",
        name,
        f"{found}prompts of {min(lengths.values())} to {max(lengths[i] for i in short)} tokens; "
        f"{len(some)} read with {sum(len(row.images) for row in some)} images, "
        f"{1000 * seconds:.0f} ms each",
        fix,
    )


def _prompt_lengths(encoder: PromptEncoder, rows: Sequence[Sample]) -> dict[int, int]:
    """Tokens of rows' prompts, of as many rows in any order as there is time for."""
    lengths: dict[int, int] = {}
    end = time.perf_counter() + _MEASURE_SECONDS
    for place in random.Random(0).sample(range(len(rows)), len(rows)):
        lengths[place] = encoder.num_tokens(rows[place])
        if time.perf_counter() > end:
            break
    return lengths


def check_evaluation_rows(subject: Subject) -> Finding:
    """The held-out rows are there, readable, and not the training rows."""
    config, name = subject.config, "evaluation rows"
    data, own = config.held_out, config.data
    if data is None:
        return Finding(
            "warning", name, "none: a run is not evaluated", "set eval.data.path to held-out rows"
        )
    held_out = load_samples(data, config.seed, "eval.data")
    rows = spread(held_out, _NUM_ROWS)
    for row in rows:
        load_images(row, config.prompt.max_image_pixels)
    # A file has no splits.
    is_same_split = data.split == (own.split or "train") or Path(data.path).is_file()
    if data.path == own.path and is_same_split:
        return Finding(
            "warning",
            name,
            "eval.data is the training data: accuracy will be that of seen rows",
            "set eval.data.path or eval.data.split to held-out rows",
        )
    return Finding("ok", name, f"{len(held_out)} rows; {len(rows)} read with their images")


def check_rewards(subject: Subject) -> Finding:
    """The verifier gives each key full marks in a well-formed response, and quickly."""
    config, name = subject.config, "rewards"
    think, answer = config.prompt.think_tag, config.prompt.answer_tag
    verifier = Verifier(config.prompt, config.reward)
    rows = spread(subject.rows, _NUM_ROWS)
    start = time.perf_counter()
    scores = [
        verifier.score(f"<{think}>so</{think}> <{answer}>{row.answer}</{answer}>", row)
        for row in rows
    ]
    seconds = (time.perf_counter() - start) / len(rows)
    failed = [row for row, score in zip(rows, scores, strict=True) if score.reward < 1]
    if failed:
        return Finding(
            "error",
            name,
            f"{_place(failed)}: its own answer {failed[0].answer[:60]!r} scores less than 1 in a "
            "well-formed response",
            f"take <{answer}> and <{think}> out of the answers: keys are the bare answer",
        )
    if seconds > _MAX_REWARD_SECONDS:
        return Finding(
            "warning", name, f"{1000 * seconds:.0f} ms per response", "shorten the answers"
        )
    return Finding("ok", name, f"keys score 1, {1e6 * seconds:.0f} us per response")


def _place(rows: Sequence[Sample]) -> str:
    return rows[0].location or rows[0].id
