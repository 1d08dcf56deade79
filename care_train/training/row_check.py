"""Before the first step: every row's prompt is short enough, every image there and of its size."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path

from care_train.data import Sample, join_errors, samples_at
from care_train.distributed import gather, is_main, rank, world_size
from care_train.reporting import track
from care_train.reporting.files import write_file
from care_train.training.session import Session

logger = logging.getLogger(__name__)


def usable_rows(
    session: Session, samples: Sequence[Sample], key: str, run_dir: Path | None = None
) -> tuple[Sequence[Sample], list[int]]:
    """The rows whose prompts are within `prompt.max_prompt_tokens`, and how long each prompt is.

    A collective call: each rank reads its share of the rows. No pixel is decoded.

    Args:
        session: the model's encoder, and the settings.
        samples: all rows.
        key: the setting they come from, for messages.
        run_dir: where the rows that `prompt.overlong=drop` leaves out are listed; None: a prompt
            that is too long is an error whatever that says.

    Raises:
        ValueError: rows that can be no prompt, or too long a one.
    """
    prompt = session.config.prompt
    lengths = _prompt_lengths(session, samples, key)
    kept = [place for place, length in enumerate(lengths) if length <= prompt.max_prompt_tokens]
    if len(kept) == len(samples):
        return samples, lengths
    long = sorted(set(range(len(samples))) - set(kept))
    if run_dir is None or prompt.overlong == "error" or not kept:
        raise ValueError(_too_long(session, samples, lengths, long, key))
    if is_main():
        _list_dropped(samples, lengths, long, key, run_dir / f"{key}.dropped.jsonl")
    return samples_at(samples, kept), [lengths[place] for place in kept]


def _prompt_lengths(session: Session, samples: Sequence[Sample], key: str) -> list[int]:
    own = range(rank(), len(samples), world_size())
    lengths, errors = [], []
    enabled = session.config.logging.progress and is_main()
    for place in track(iter(own), f"measuring the prompts of {key}", enabled):
        try:
            lengths.append(session.encoder.num_tokens(samples[place]))
        except ValueError as error:
            errors.append((place, str(error)))
    parts = gather((lengths, errors))
    found = sorted(error for _, part in parts for error in part)
    if found:
        raise ValueError(join_errors(key, [error for _, error in found]))
    size = world_size()
    return [parts[place % size][0][place // size] for place in range(len(samples))]


def _too_long(
    session: Session, samples: Sequence[Sample], lengths: list[int], long: list[int], key: str
) -> str:
    limit, longest = session.config.prompt.max_prompt_tokens, max(lengths)
    errors = [
        f"{samples[place].location}: the prompt has {lengths[place]} tokens, wanted at most {limit}"
        for place in long
    ]
    return (
        f"{join_errors(key, errors)}\nraise prompt.max_prompt_tokens (the longest has {longest}), "
        "lower model.max_pixels, drop the rows, or leave them out of training with "
        "prompt.overlong=drop (prompts and images are never truncated)"
    )


def _list_dropped(
    samples: Sequence[Sample], lengths: list[int], long: list[int], key: str, path: Path
) -> None:
    rows = [
        {"row": samples[place].location, "id": samples[place].id, "tokens": lengths[place]}
        for place in long
    ]
    write_file(path, "".join(json.dumps(row) + "\n" for row in rows))
    logger.warning(
        "warning: %s: %d of %d rows are left out, over prompt.max_prompt_tokens: the run's folder "
        "lists them in %s",
        *(key, len(long), len(samples), path.name),
    )
