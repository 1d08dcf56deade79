"""The verifier against labelled pairs, math-verify alone and exact match; and under attack.

    python -m bench.verifier

Two sets of pairs. Those of verifier_forms.py are made by rule, in the forms in which public data
sets write keys: their labels follow from the rules and were not read off any verdict.

Pairs are in verifier_pairs.jsonl: key, answer, its label (right or wrong), and the type where the
row of a data set would give one. Labels were read by the developers. No change to the verifier was
made for those marked `held_out`. Prints tables, then one JSON object:

- precision, recall: of our verdicts; held_out_* of the held-out pairs alone
- math_verify_*, exact_*: of math-verify alone, in the better of two ways to call it, and of text
  that is the same
- forms_*: the same of the pairs made by rule, by whether the question has options; attacks and
  attacks_accepted: answers made to be several answers, and those that were counted as right
- per_second: verdicts per second on one core, the mix of the pairs; in_process_per_second: of those
  that need no algebra; symbolic_per_second: of those that do
- hangs: hostile answers whose verdict took more processor time in this process than the limit and
  half a second, or in a worker more than 20 limits by the clock;
  crashes: those that raised; leaked_processes: workers alive after the pool is closed
- timeouts, worker_crashes: verdicts that cost a worker, as they should

A precision of null: nothing was accepted. Ends with 1 after a hang, crash or leak, and with 2 where
there are fewer than 400 pairs or the verifier's own precision cannot be measured.
"""

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from bench.hostile import hostile_answers
from bench.verifier_forms import Pair, attacks, formed_pairs
from care_train.reporting import track
from care_train.verifier import AnswerType, Item, WorkerPool, verify_batch
from care_train.verifier.verify import verify_in_process

MIN_PAIRS = 400
PAIRS = Path(__file__).parent / "verifier_pairs.jsonl"
KEYS = (
    *("B", "5", "x^2+1", "{1, 2}", "yes", "blue"),
    *("\\frac{\\sqrt{2}}{2}", "(1, 2)", "3.46", "x > 3"),
)
"""What hostile answers are compared with, one of each kind."""

_SLACK_SECONDS = 0.5
_WALL_FACTOR = 20.0
"""The limit is of processor time; by the clock a worker that gets none of it is ended here."""
_BATCH = 250
_SECONDS = 3.0


def read_pairs(path: Path = PAIRS) -> list[Pair]:
    """All pairs, in order."""
    pairs = []
    for line in path.read_text().splitlines():
        row = json.loads(line)
        kind = AnswerType(row["type"]) if "type" in row else None
        item = Item(row["predicted"], row["answer"], kind, tuple(row.get("options", ())))
        pairs.append(Pair(item, row["correct"], row["category"], row.get("held_out", False)))
    return pairs


def precision_recall(
    pairs: Sequence[Pair], verdicts: Sequence[bool]
) -> tuple[float | None, float | None]:
    """Share of accepted answers that are right, share of right answers that are accepted.

    None where there are none to take a share of.
    """
    accepted_right = sum(v and p.correct for p, v in zip(pairs, verdicts, strict=True))
    right = sum(pair.correct for pair in pairs)
    accepted = sum(verdicts)
    return (
        accepted_right / accepted if accepted else None,
        accepted_right / right if right else None,
    )


def math_verify_verdicts(pairs: Sequence[Pair]) -> list[bool]:
    """math-verify on key and answer, as they are or as inline math: whichever has the better F1."""
    from math_verify import (
        ExprExtractionConfig,
        LatexExtractionConfig,
        StringExtractionConfig,
        parse,
        verify,
    )

    letters = StringExtractionConfig(strings=tuple("ABCDEFGHIJ"))
    targets = [LatexExtractionConfig(), ExprExtractionConfig(), letters]

    def run(form: str) -> list[bool]:
        return [
            verify(
                parse(form.format(pair.item.expected), targets),
                parse(form.format(pair.item.predicted), targets),
            )
            for pair in pairs
        ]

    def f1(verdicts: list[bool]) -> float:
        precision, recall = precision_recall(pairs, verdicts)
        return 0.0 if not precision or not recall else precision * recall / (precision + recall)

    return max((run("{}"), run("${}$")), key=f1)


_PREFIXES = {"ours": "", "math-verify": "math_verify_", "exact": "exact_"}


def print_scores(
    title: str,
    pairs: Sequence[Pair],
    totals: Mapping[str, Sequence[int]],
    verdicts: Mapping[str, Sequence[bool]],
) -> dict[str, float | None]:
    """Print each judge's precision and recall by category and in `totals`, places of some pairs.

    Returns:
        Those of `totals`, whose names begin their keys.
    """
    groups: dict[str, list[int]] = {}
    for place, pair in enumerate(pairs):
        groups.setdefault(pair.category, []).append(place)
    heads = "".join(f"{judge + ' P / R':>20}" for judge in verdicts)
    print(f"{title:<26}{'pairs':>6}{'right':>6}{heads}")
    figures: dict[str, float | None] = {}
    for name, places in {**groups, **totals}.items():
        chosen = [pairs[place] for place in places]
        line = f"{name or 'all':<26}{len(chosen):>6}{sum(pair.correct for pair in chosen):>6}"
        for judge, said in verdicts.items():
            scores = precision_recall(chosen, [said[place] for place in places])
            shown = ["-" if score is None else f"{score:.3f}" for score in scores]
            line += f"{shown[0]:>12} /{shown[1]:>6}"
            if name in totals:
                prefix = f"{name}{_PREFIXES[judge]}"
                figures |= {f"{prefix}precision": scores[0], f"{prefix}recall": scores[1]}
        print(line)
    return figures


def compare_pairs(pairs: Sequence[Pair], pool: WorkerPool) -> dict[str, Any]:
    """Precision and recall of the three on pairs read by hand, by type."""
    said = [pair.item.predicted.strip() == pair.item.expected.strip() for pair in pairs]
    held_out = [place for place, pair in enumerate(pairs) if pair.held_out]
    totals = {"": range(len(pairs)), "held_out_": held_out}
    return {"pairs": len(pairs)} | _compare("read by hand", pairs, totals, pool, exact=said)


def compare_forms(pool: WorkerPool) -> dict[str, Any]:
    """Precision and recall on the pairs made by rule, by style; accepted attacks are listed."""
    pairs = formed_pairs()
    totals = {
        "forms_choice_": [place for place, pair in enumerate(pairs) if pair.item.options],
        "forms_short_": [place for place, pair in enumerate(pairs) if not pair.item.options],
        "forms_all_": range(len(pairs)),
    }
    figures = _compare("made by rule", pairs, totals, pool)
    hostile = list(attacks())
    answers = zip(hostile, verify_batch(hostile, pool), strict=True)
    accepted = [item for item, verdict in answers if verdict.accuracy]
    for item in accepted:
        print(f"  attack accepted: {item.predicted!r} for {item.expected!r}")
    counts = {"forms": len(pairs), "attacks": len(hostile), "attacks_accepted": len(accepted)}
    return figures | counts


def _compare(
    title: str,
    pairs: Sequence[Pair],
    totals: Mapping[str, Sequence[int]],
    pool: WorkerPool,
    **others: Sequence[bool],
) -> dict[str, float | None]:
    """`print_scores` of our verifier, math-verify and `others`; our wrong verdicts one by one."""
    found = verify_batch([pair.item for pair in pairs], pool)
    ours = [verdict.accuracy == 1.0 for verdict in found]
    verdicts = {"ours": ours, "math-verify": math_verify_verdicts(pairs), **others}
    figures = print_scores(title, pairs, totals, verdicts)
    for pair, right in zip(pairs, ours, strict=True):
        if right != pair.correct:
            kind = "wrongly accepted" if right else "missed"
            print(f"  {kind}: {pair.item.predicted!r} for {pair.item.expected!r}")
    return figures


def throughput(pairs: Sequence[Pair]) -> dict[str, float]:
    """Verdicts per second on one core: one process works at a time."""
    items = [pair.item for pair in pairs]
    symbolic = [item for item in items if verify_in_process(item) is None]
    plain = [item for item in items if verify_in_process(item) is not None]
    pool = WorkerPool(workers=1)
    figures = {}
    for name, chosen in (("", items), ("in_process_", plain), ("symbolic_", symbolic)):
        verify_batch(symbolic[:1], pool)
        start, count = time.perf_counter(), 0
        while time.perf_counter() - start < _SECONDS:
            verify_in_process.cache_clear()
            count += len(verify_batch(chosen, pool))
        figures[f"{name}per_second"] = round(count / (time.perf_counter() - start), 1)
    pool.close()
    figures["share_symbolic"] = len(symbolic) / len(items)
    return figures


def attack(count: int, timeout: float) -> dict[str, Any]:
    """Hostile answers against keys of every kind."""
    before = set(psutil.Process().children(recursive=True))
    pool = WorkerPool(workers=2, timeout=timeout)
    items = [Item(text, KEYS[i % len(KEYS)]) for i, text in enumerate(hostile_answers(count))]
    limit = timeout + _SLACK_SECONDS
    hangs = crashes = accepted = to_worker = 0
    start = time.perf_counter()
    for first in track(range(0, count, _BATCH), "hostile answers", True):
        batch = items[first : first + _BATCH]
        waiting = []
        for item in batch:
            begun = time.process_time()
            try:
                verdict = verify_in_process(item)
            except Exception as error:  # the bench counts what must not happen
                print(f"  raised {error!r}: {item.predicted[:60]!r} for {item.expected!r}")
                crashes += 1
                continue
            hangs += time.process_time() - begun > limit
            accepted += verdict is not None and verdict.accuracy == 1.0
            waiting += [item] if verdict is None else []
        to_worker += len(waiting)
        accepted += sum(verdict.accuracy == 1.0 for verdict in pool.run(waiting))
    seconds = time.perf_counter() - start
    hangs += pool.longest > _WALL_FACTOR * timeout + _SLACK_SECONDS
    pool.close()
    leaked = [p for p in psutil.Process().children(recursive=True) if p not in before]
    return {
        "hostile": count,
        "hostile_seconds": round(seconds, 1),
        "to_worker": to_worker,
        "accepted": accepted,
        "timeouts": pool.timeouts,
        "worker_crashes": pool.crashes,
        "longest_seconds": round(pool.longest, 3),
        "timeout_seconds": timeout,
        "hangs": hangs,
        "crashes": crashes,
        "leaked_processes": len(leaked),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all parts and print the figures."""
    parser = argparse.ArgumentParser(description="precision, recall, speed, attack")
    parser.add_argument("--hostile", type=int, default=10_000, help="hostile answers")
    parser.add_argument("--timeout", type=float, default=1.0, help="seconds per hostile answer")
    options = parser.parse_args(arguments)
    pairs, pool = read_pairs(), WorkerPool()
    if len(pairs) < MIN_PAIRS:
        print(f"{PAIRS}: got {len(pairs)} pairs, wanted at least {MIN_PAIRS}", file=sys.stderr)
        return 2
    figures = compare_pairs(pairs, pool)
    if figures["precision"] is None:
        pool.close()
        print(
            f"precision: got no accepted answer among {len(pairs)} pairs, wanted at least one: "
            "there is nothing to measure",
            file=sys.stderr,
        )
        return 2
    figures |= compare_forms(pool)
    pool.close()
    figures |= throughput(pairs)
    figures |= attack(options.hostile, options.timeout)
    print(json.dumps(figures))
    bad = figures["hangs"] + figures["crashes"] + figures["leaked_processes"]
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
