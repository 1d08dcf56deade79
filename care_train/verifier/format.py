"""fmt of Eq. 1: does a response have the form asked for? (Sec. 3.1)"""

import re


def format_score(text: str, think_tag: str = "think", answer_tag: str = "answer") -> float:
    """1.0 for exactly one think span followed by exactly one answer span, else 0.0.

    Both must hold text, and only whitespace may stand around them. Each tag occurs once, so
    nested, repeated and unclosed spans score 0. Takes time linear in the text.
    """
    return float(not format_fault(text, think_tag, answer_tag))


def format_fault(text: str, think_tag: str = "think", answer_tag: str = "answer") -> str:
    """What is wrong with a response's form, or "" where its `format_score` is 1."""
    text = text.strip()
    tags = [f"<{think_tag}>", f"</{think_tag}>", f"<{answer_tag}>", f"</{answer_tag}>"]
    for tag in tags:
        if (count := text.count(tag)) != 1:
            return f"{count} {tag}, wanted 1"
    starts = [text.find(tag) for tag in tags]
    if starts != sorted(starts):
        return "tags out of order"
    before, rest = text.split(tags[0])
    think, rest = rest.split(tags[1])
    between, rest = rest.split(tags[2])
    answer, after = rest.split(tags[3])
    if before.strip() or between.strip() or after.strip():
        return "text outside the spans"
    if not think.strip() or not answer.strip():
        return "an empty span"
    return ""


_BOX = "\\boxed{"


def boxed_answer(text: str) -> str | None:
    """What the last `\\boxed{}` of a response holds; None where it has none, or an unclosed one."""
    _, box, rest = text.rpartition(_BOX)
    depth = 1 if box else 0
    for place, character in enumerate(rest if box else ""):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return rest[:place].strip()
    return None


def boxed_fault(text: str, think_tag: str = "think") -> str:
    """What is wrong with the form "rationale in its tags, then `\\boxed{}`", or "".

    EasyR1's rule (examples/reward_function/math.py): the response begins with the opening tag; the
    closing one, a box and a closing brace follow in this order, whatever stands between them. Space
    around `<`, `>` and `/` does not count.
    """
    pieces = re.split("([<>/])", text.strip())
    text = "".join(piece.strip() for piece in pieces)
    if not text.startswith(f"<{think_tag}>"):
        return f"does not begin with <{think_tag}>"
    place = 0
    for wanted in (f"<{think_tag}>", f"</{think_tag}>", _BOX, "}"):
        found = text.find(wanted, place)
        if found < 0:
            return f"no {wanted} behind the {place} characters before"
        place = found + len(wanted)
    return ""
