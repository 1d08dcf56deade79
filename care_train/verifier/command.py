"""`care-train verify`: verdicts of the lines on standard input, in order, as they come."""

import json
import queue
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from care_train.config import Config
from care_train.data import sample_from_row
from care_train.data.answers import AnswerType
from care_train.data.columns import describe
from care_train.data.rows import named_columns, parsed
from care_train.verifier.responses import Response
from care_train.verifier.score import Verifier, check_key

_BATCH = 256


def verify_lines(config: Config, source: TextIO, target: TextIO) -> None:
    """Score each JSON line as training would; write one JSON line for each.

    Lines that are there already are scored together, and each line as soon as it comes.

    Args:
        config: prompt's tags and the reward.
        source: lines with `response` and `answer`; optionally `type`, `options`, `tolerance`,
            `prompt` and other columns, which reward functions get.
        target: gets `acc`, `fmt`, `reason`, `fmt_reason` and `reward`.

    Raises:
        ValueError: a bad line, after the verdicts of those before it, or no line at all.
    """
    verifier, is_empty = Verifier(config.prompt, config.reward), True
    for batch in _batches(source):
        is_empty = False
        responses, fault = [], None
        try:
            for number, line in batch:
                response = _read(line, f"standard input: line {number}")
                check_key(response.sample, config.reward)
                responses.append(response)
        except ValueError as error:
            fault = error
        for score in verifier.score_batch(responses):
            record = {
                "acc": score.accuracy,
                "fmt": score.format_score,
                "reason": score.reason,
                "fmt_reason": score.format_reason,
                "reward": score.reward,
            }
            target.write(json.dumps(record, ensure_ascii=False) + "\n")
        target.flush()
        if fault is not None:
            raise fault
    if is_empty:
        wanted = '{"response": text, "answer": text}, with optional type, options and tolerance'
        raise ValueError(f"standard input: got no line, wanted {wanted} on each")


def _batches(source: TextIO) -> Iterator[list[tuple[int, str]]]:
    """Numbered lines that are not blank: those there now, at least one, at most a batch."""
    lines: queue.Queue[tuple[int, str] | Exception | None] = queue.Queue(4 * _BATCH)

    def read() -> None:
        try:
            for number, line in enumerate(source, start=1):
                if line.strip():
                    lines.put((number, line))
            lines.put(None)
        except UnicodeDecodeError as error:
            lines.put(error)

    threading.Thread(target=read, daemon=True).start()
    batch: list[tuple[int, str]] = []
    while True:
        entry = lines.get()
        if isinstance(entry, tuple):
            batch.append(entry)
        if batch and (len(batch) == _BATCH or lines.empty() or not isinstance(entry, tuple)):
            yield batch
            batch = []
        if entry is None:
            return
        if isinstance(entry, Exception):
            raise ValueError(f"standard input: got bytes that are no UTF-8 ({entry}), wanted text")


def _read(line: str, place: str) -> Response:
    # Some editors begin a file with a byte order mark.
    content = line.removeprefix("\ufeff").encode(errors="surrogatepass")
    row = named_columns(parsed(content), at=place, labels={})
    response = row.pop("response", None)
    if not isinstance(response, str):
        raise ValueError(
            f"{place}: response: got {describe(response)} beside {', '.join(row) or 'nothing'}, "
            "wanted text"
        )
    if "type" in row:
        row["answer_type"] = kind = row.pop("type")
        if kind is not None and kind not in list(AnswerType):
            raise ValueError(
                f"{place}: type: got {describe(kind)}, wanted one of {', '.join(AnswerType)}"
            )
    sample = sample_from_row(row, location=place, base_dir=Path(), id=place, needs_prompt=False)
    return Response(response, sample)
