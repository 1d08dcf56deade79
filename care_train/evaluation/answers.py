"""Which option an answer names, and whether a free-form answer equals its key."""

import re
from collections.abc import Sequence
from dataclasses import replace

from care_train.evaluation.question import Judgement, letters
from care_train.verifier import AnswerType, Item, WorkerPool, normalize, verify_batch
from care_train.verifier.answers import MAX_ANSWER_CHARS


def judge_free_form(
    predicted: str, expected: str, is_exact: bool = False, answer_type: AnswerType | None = None
) -> Judgement:
    """Right by the benchmark's own rule, or else as the verifier reads it: `settle` asks it.

    Args:
        predicted: the answer span's text.
        expected: the key.
        is_exact: what the benchmark's own exact match says.
        answer_type: how the verifier compares them; None infers it from the key.
    """
    vote = normalize(predicted[:MAX_ANSWER_CHARS])
    if is_exact:
        return Judgement(1.0, True, "exact match", vote)
    return Judgement(0.0, False, "", vote, (Item(predicted, expected, answer_type),))


def settle(judgements: Sequence[Judgement], pool: WorkerPool | None = None) -> list[Judgement]:
    """Ask the verifier (Eq. 1) what the judgements leave open, all at once; in order.

    Args:
        judgements: of a batch.
        pool: compares what needs algebra, several at a time; None: this process's own.
    """
    items = [item for judgement in judgements for item in judgement.asked]
    verdicts = iter(verify_batch(items, pool))
    settled = []
    for judgement in judgements:
        found = [next(verdicts) for _ in judgement.asked]
        if found:
            best = max(found, key=lambda verdict: verdict.accuracy)
            judgement = replace(judgement, accuracy=best.accuracy, reason=best.reason, asked=())
        settled.append(judgement)
    return settled


def judge_choice(place: int | None, expected: str, predicted: str) -> Judgement:
    """Compare the place of the option that an answer names with the key's letter."""
    if place is None:
        return Judgement(0.0, False, f"{_shorten(predicted)} names no option", "")
    letter = letters(place + 1)[-1]
    if letter == expected.strip().upper():
        return Judgement(1.0, True, f"chose {letter}", letter)
    return Judgement(0.0, False, f"chose {letter}, wanted {expected.strip()}", letter)


def choose(predicted: str, options: Sequence[str]) -> int | None:
    """The place of the option that an answer names; None where it names none.

    MMMU's rule (eval_utils.py: parse_multi_choice_response) on the answer span: letters in
    brackets, then letters alone, then option texts within the answer; of several the last. Two
    things differ: an answer that is an option's text as a whole is that option ("A triangle" is not
    option A), and one that names no option is wrong, where theirs draws one at random.
    """
    text = predicted.strip().strip(",.!?;:'\"*$ ")
    if len(text) > MAX_ANSWER_CHARS or not text:
        return None
    folded = normalize(text)
    whole = [
        i for i, option in enumerate(options) if len(folded) > 1 and normalize(option) == folded
    ]
    if len(whole) == 1:
        return whole[0]
    allowed = letters(len(options))
    for pattern in (rf"[(\[{{]([{allowed}])[)\]}}]", rf"(?<!\w)([{allowed}])(?!\w)"):
        found = re.findall(pattern, text) if allowed else []
        if found:
            return allowed.index(found[-1])
    if text.upper() in allowed:
        return allowed.index(text.upper())
    named = [(text.lower().rfind(option.lower()), i) for i, option in enumerate(options) if option]
    inside = [(start, i) for start, i in named if start >= 0]
    return max(inside)[1] if inside else None


def edit_distance(one: str, other: str) -> int:
    """Levenshtein's: insertions, deletions and substitutions, each 1."""
    above = list(range(len(other) + 1))
    for row, left in enumerate(one, start=1):
        current = [row]
        for column, right in enumerate(other, start=1):
            substituted = above[column - 1] + (left != right)
            current.append(min(above[column] + 1, current[-1] + 1, substituted))
        above = current
    return above[-1]


def _shorten(text: str) -> str:
    text = " ".join(text.split())
    return repr(text if len(text) <= 60 else text[:60] + "...")
