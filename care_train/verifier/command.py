"""`care-train verify`: verdicts of the lines on standard input, in order, as they come."""

import json
import queue
import sys
import threading
from collections.abc import Iterator
from typing import Any, TextIO

from care_train.data import Sample
from care_train.settings import Config
from care_train.verifier.responses import Response, item_of
from care_train.verifier.score import Score, Verifier

_BATCH = 256
_WANTED = '{"response": text, "answer": text}, with optional type, options and tolerance'


def verify_lines(config: Config, source: TextIO, target: TextIO) -> None:
    """Score each JSON line as training would; write one JSON line for each.

    Lines that are there already are scored together, and each line as soon as it comes.

    Args:
        config: prompt's tags and the reward.
        source: lines with `response` and `answer`; optionally `type`, `options`, `tolerance`,
            `prompt` and other columns, which reward functions get.
        target: gets `acc`, `fmt`, `reason`, `fmt_reason` and `reward`.

    Raises:
        ValueError: a bad line, after the verdicts of those before it.
    """
    verifier = Verifier(config.prompt, config.reward)
    for lines in _batches(source):
        responses, fault = [], None
        for number, line in lines:
            try:
                responses.append(_read(line, f"standard input: line {number}"))
            except ValueError as error:
                fault = error
                break
        for score in verifier.score_batch(responses):
            target.write(json.dumps(_record(score), ensure_ascii=False) + "\n")
        target.flush()
        if fault is not None:
            raise fault


def run(config: Config) -> None:
    """From standard input to standard output."""
    verify_lines(config, sys.stdin, sys.stdout)


def _batches(source: TextIO) -> Iterator[list[tuple[int, str]]]:
    """Numbered lines that are not blank: those there now, at least one, at most a batch."""
    lines: queue.Queue[tuple[int, str] | UnicodeDecodeError | None] = queue.Queue(4 * _BATCH)

    def read() -> None:
        try:
            for number, line in enumerate(source, start=1):
                if line.strip():
                    lines.put((number, line))
        except UnicodeDecodeError as error:
            lines.put(error)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    more = True
    while more:
        batch, entry = [], lines.get()
        while isinstance(entry, tuple):
            batch.append(entry)
            if len(batch) == _BATCH or lines.empty():
                break
            entry = lines.get()
        more = isinstance(entry, tuple)
        if batch:
            yield batch
        if isinstance(entry, UnicodeDecodeError):
            raise ValueError(f"standard input: got bytes that are no UTF-8 ({entry}), wanted text")


def _read(line: str, place: str) -> Response:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{place}: got no JSON ({error}), wanted {_WANTED}") from None
    except RecursionError:
        raise ValueError(f"{place}: got JSON nested too deeply, wanted {_WANTED}") from None
    if not isinstance(row, dict):
        raise ValueError(f"{place}: got a {type(row).__name__}, wanted {_WANTED}")
    response = _text(row, "response", place)
    columns: dict[str, Any] = {k: v for k, v in row.items() if k not in ("response", "answer")}
    if "type" in columns:
        columns["answer_type"] = columns.pop("type")
    sample = Sample(
        id=place,
        prompt=str(row.get("prompt", "")),
        answer=_text(row, "answer", place),
        location=place,
        columns=columns,
    )
    # A wrong column is an error of this line, not of the batch.
    item_of("", sample)
    return Response(response, sample)


def _text(row: dict[str, Any], field: str, place: str) -> str:
    value = row.get(field)
    if isinstance(value, bool) and field == "answer":
        return "yes" if value else "no"
    if isinstance(value, (int, float)) and not isinstance(value, bool) and field == "answer":
        return str(value)
    if not isinstance(value, str):
        got = "nothing" if field not in row else f"a {type(value).__name__}"
        raise ValueError(f"{place}: {field}: got {got}, wanted text: {_WANTED}")
    return value


def _record(score: Score) -> dict[str, Any]:
    return {
        "acc": score.accuracy,
        "fmt": score.format_score,
        "reason": score.reason,
        "fmt_reason": score.format_reason,
        "reward": score.reward,
    }
