"""fmt of Eq. 1: does a response have the form asked for? (Sec. 3.1)"""


def format_score(text: str, think_tag: str = "think", answer_tag: str = "answer") -> float:
    """1.0 for exactly one think span followed by exactly one answer span, else 0.0.

    Both must hold text, and only whitespace may stand around them. Each tag occurs once, so
    nested, repeated and unclosed spans score 0. Takes time linear in the text.
    """
    text = text.strip()
    tags = [f"<{think_tag}>", f"</{think_tag}>", f"<{answer_tag}>", f"</{answer_tag}>"]
    if any(text.count(tag) != 1 for tag in tags):
        return 0.0
    starts = [text.find(tag) for tag in tags]
    if starts != sorted(starts):
        return 0.0
    before, rest = text.split(tags[0])
    think, rest = rest.split(tags[1])
    between, rest = rest.split(tags[2])
    answer, after = rest.split(tags[3])
    outside = f"{before}{between}{after}"
    return float(not outside.strip() and bool(think.strip()) and bool(answer.strip()))
