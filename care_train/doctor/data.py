"""Checks of the data: batches, rows readable, prompts short enough, rewards right and fast."""

import random
import time
from collections.abc import Sequence
from pathlib import Path

from care_train.config import source_of
from care_train.data import Sample, load_images, load_samples
from care_train.data.answers import AnswerType
from care_train.doctor import Finding, Subject, error, ok, spread, warning
from care_train.models.prompts import PromptEncoder
from care_train.verifier import Verifier
from care_train.verifier.score import check_key

_NUM_ROWS = 32
_MEASURE_SECONDS = 20.0
"""For prompt lengths: a run measures all rows at its start."""
_MAX_REWARD_SECONDS = 0.05
"""Per response: more would be felt beside generation."""


def check_batches(subject: Subject) -> Finding:
    """Prompts divide over ranks and mini-batches, and there are enough of them."""
    config, ranks, train = subject.config, subject.ranks, subject.config.train
    unit = train.mini_batches * ranks
    if train.prompts_per_step % unit:
        nearest = max(1, round(train.prompts_per_step / unit)) * unit
        return error(
            f"train.prompts_per_step = {train.prompts_per_step} does not divide over "
            f"{train.mini_batches} mini-batches x {ranks} ranks",
            f"set train.prompts_per_step={nearest}",
        )
    if subject.samples and len(subject.samples) < train.prompts_per_step:
        return warning(
            f"{len(subject.samples)} rows for {train.prompts_per_step} prompts per step: a step "
            "repeats rows",
            "lower train.prompts_per_step or add rows",
        )
    size = config.rollout.vllm.tensor_parallel_size
    if config.rollout.vllm_in_process and ranks % size:
        return error(
            f"rollout.vllm.tensor_parallel_size = {size} does not divide {ranks} ranks",
            "set it to a divisor",
        )
    return ok(
        f"{train.prompts_per_step // ranks} prompts x {config.rollout.group_size} responses per "
        f"rank and step, {train.micro_batch_size} sequences at a time"
    )


def check_rows(subject: Subject) -> Finding:
    """Training rows become prompts of allowed length; of some the images are decoded too."""
    prompt, rows = subject.config.prompt, subject.rows
    encoder = PromptEncoder(subject.model, prompt)
    lengths = _prompt_lengths(encoder, rows)
    short = [place for place in sorted(lengths) if lengths[place] <= prompt.max_prompt_tokens]
    found, fix = f"{len(lengths)} of {len(rows)} measured: ", ""
    if len(short) < len(lengths):
        place = min(lengths.keys() - set(short))
        found += (
            f"{len(lengths) - len(short)} prompts over prompt.max_prompt_tokens = "
            f"{prompt.max_prompt_tokens} ({rows[place].where}: {lengths[place]}, the longest: "
            f"{max(lengths.values())})"
        )
        fix = "raise it, lower model.image_pixels, or leave them out with prompt.overlong=drop"
        if prompt.overlong == "error" or not short:
            return error(found, fix)
        found += ", which will be left out; the others: "
    some = [rows[place] for place in spread(short, _NUM_ROWS)]
    start = time.perf_counter()
    encoder.encode(some)
    seconds = (time.perf_counter() - start) / len(some)
    found += (
        f"prompts of {min(lengths.values())} to {max(lengths[i] for i in short)} tokens; "
        f"{len(some)} read with {sum(len(row.images) for row in some)} images, "
        f"{1000 * seconds:.0f} ms each"
    )
    return warning(found, fix) if fix else ok(found)


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
    config, held_out, trained = subject.config, subject.config.held_out, subject.config.data
    if held_out is None:
        return warning("none: a run is not evaluated", "set eval.data to held-out rows")
    samples = load_samples(held_out, config.seed, "eval.data")
    rows = spread(samples, _NUM_ROWS)
    for row in rows:
        load_images(row)
    own, held = source_of(trained.path), source_of(held_out.path)
    # A file has no splits.
    is_same_split = held.split == (own.split or "train") or Path(held.path).is_file()
    if held.path == own.path and is_same_split:
        return warning(
            "eval.data is the training data: accuracy will be that of seen rows",
            "set eval.data to held-out rows",
        )
    return ok(f"{len(samples)} rows; {len(rows)} read with their images")


def check_prompt(subject: Subject) -> Finding:
    """The policy is told, or was taught, to write what the verifier reads, and is shown the options
    that a letter stands for."""
    prompt = subject.config.prompt
    marks = [f"<{prompt.think_tag}>", *_answer_marks(subject)[:1]]
    texts = [prompt.system or "", prompt.suffix or "", *(row.prompt for row in subject.rows[:1])]
    lacking = [mark for mark in marks if not any(mark in text for text in texts)]
    if lacking:
        return warning(
            "neither prompt.system, prompt.suffix nor the first row names " + " and ".join(lacking),
            "name the tags in prompt.system, unless a cold start has taught them",
        )
    for row in spread(subject.rows, _NUM_ROWS):
        if not prompt.is_boxed and "\\boxed" in row.prompt:
            return warning(
                f"{row.where}: asks for \\boxed{{}}, and the verifier reads {marks[1]}",
                "set prompt.tags=[think,boxed], or take that out of the prompt",
            )
        if row.hides_options:
            return warning(
                f"{row.where}: the key is {row.answer[:60]!r}, and no option is in the prompt",
                "write the options into the prompt, unless its image shows them",
            )
    return ok(f"names {' and '.join(marks)}")


def _answer_marks(subject: Subject) -> tuple[str, str]:
    """What stands before an answer in a response, and behind it."""
    prompt = subject.config.prompt
    if prompt.is_boxed:
        return "\\boxed{", "}"
    return f"<{prompt.answer_tag}>", f"</{prompt.answer_tag}>"


def check_rewards(subject: Subject) -> Finding:
    """The verifier gives each key full marks in a well-formed response, and quickly."""
    config = subject.config
    think, (opening, closing) = config.prompt.think_tag, _answer_marks(subject)
    verifier = Verifier(config.prompt, config.reward)
    rows = spread(subject.rows, _NUM_ROWS)
    for row in rows:
        check_key(row, config.reward)
    # What a response should say to keys that only a function reads is the function's affair.
    rows = [row for row in rows if row.answer_type is not AnswerType.FUNCTION]
    if not rows:
        return ok("keys that reward.functions alone read")
    start = time.perf_counter()
    scores = [
        verifier.score(f"<{think}>so</{think}> {opening}{row.right_answer}{closing}", row)
        for row in rows
    ]
    seconds = (time.perf_counter() - start) / len(rows)
    failed = [row for row, score in zip(rows, scores, strict=True) if score.reward < 1]
    if failed:
        return error(
            f"{failed[0].where}: its own answer {failed[0].answer[:60]!r} scores less than 1 in "
            "a well-formed response",
            "correct reward.functions, or the answer where it is no bare one"
            if config.reward.own_functions
            else f"take {opening} and <{think}> out of the answers: keys are the bare answer",
        )
    if seconds > _MAX_REWARD_SECONDS:
        return warning(f"{1000 * seconds:.0f} ms per response", "shorten the answers")
    return ok(f"keys score 1, {1e6 * seconds:.0f} us per response")
