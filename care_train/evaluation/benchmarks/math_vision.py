"""MATH-Vision (Wang et al., 2024), all 3,040 competition problems of its test split.

Schema: huggingface.co/datasets/MathLLMs/MathVision. Normalisation: the authors' evaluation
(github.com/mathllm/MATH-V, evaluation/utils.py), whose symbolic part is the verifier's here: theirs
evaluates model output as code.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from care_train.data import Sample
from care_train.evaluation.answers import choose, judge_choice, judge_free_form
from care_train.evaluation.columns import FILLED_TEXT, IMAGE, TEXTS
from care_train.evaluation.question import (
    Benchmark,
    Judgement,
    Question,
    image_ref,
    letters,
    list_options,
)
from care_train.verifier.answers import MAX_ANSWER_CHARS

_DECIMALS = 2
"""Numbers are equal that round to the same at so many decimals."""

# Dropped before comparing: sizes, degrees, dollar signs, units that the keys leave out.
_DROPPED = re.compile(
    r"\\[,!;:]|\\left|\\right|\\text|\\mbox|\^\{?\\circ\}?|°|\\?\$|\\?%|\{?m\}?\^3|\{?units\}?"
    r"|\{?km\}?"
)
_BOXED = re.compile(r".*\\boxed\{(.*)\}", re.DOTALL)


def to_question(row: Mapping[str, Any], location: str, base_dir: Path) -> Question:
    """The question and its choices after the image, which holds all the question's pictures."""
    options = tuple(row["options"])
    prompt = row["question"]
    if options:
        listed = list_options(options, "({letter}) {text}")
        prompt = f"{prompt}\nChoices:\n{listed}\nThe answer is one letter."
        if row["answer"] not in letters(len(options)):
            raise ValueError(
                f"{location}: column 'answer': got {row['answer']!r}, wanted the letter of one of "
                f"{len(options)} options"
            )
    return Question(
        Sample(
            id=row["id"],
            prompt=prompt,
            answer=row["answer"],
            images=(image_ref(row["decoded_image"], base_dir, location),),
            source="math_vision",
            location=location,
        ),
        options=options,
        group=row["subject"],
    )


def judge(predicted: str, question: Question) -> Judgement:
    """The letter or the option's value; other answers normalised, and to two decimals."""
    expected = question.sample.answer
    text = predicted if len(predicted) > MAX_ANSWER_CHARS else unboxed(predicted)
    if not question.options:
        return judge_free_form(text, expected, _same(text, expected))
    place = choose(text, question.options)
    if place is None:
        same = [i for i, option in enumerate(question.options) if _same(text, option)]
        place = same[0] if len(same) == 1 else None
    return judge_choice(place, expected, predicted)


def unboxed(text: str) -> str:
    r"""What \boxed{} holds, where an answer has one."""
    match = _BOXED.match(text)
    return match[1] if match else text


def _same(predicted: str, expected: str) -> bool:
    if len(predicted) > MAX_ANSWER_CHARS:
        return False
    got, wanted = _normalize(predicted), _normalize(expected)
    if not got or not wanted:
        return False
    numbers = _number(got), _number(wanted)
    if None not in numbers:
        return round(numbers[0] or 0.0, _DECIMALS) == round(numbers[1] or 0.0, _DECIMALS)
    return got == wanted


def _normalize(text: str) -> str:
    text = _DROPPED.sub("", "".join(text.lower().split()))
    text = text.split("=")[-1].split("\\approx")[-1].rstrip(".")
    return re.sub(r"\\[dt]frac", r"\\frac", text)


def _number(text: str) -> float | None:
    fraction = re.fullmatch(r"(-?)\\frac\{(\d{1,12})\}\{(\d{1,12})\}", text)
    fraction = fraction or re.fullmatch(r"(-?)(\d{1,12})/(\d{1,12})", text)
    if fraction and int(fraction[3]):
        return float(f"{fraction[1]}1") * int(fraction[2]) / int(fraction[3])
    decimal = re.fullmatch(r"[+-]?(?:\d{1,15}(?:\.\d{0,15})?|\.\d{1,15})", text)
    return float(text) if decimal else None


MATH_VISION = Benchmark(
    name="math_vision",
    title="MATH-Vision full",
    dataset="MathLLMs/MathVision",
    split="test",
    columns={
        "id": FILLED_TEXT,
        "question": FILLED_TEXT,
        "options": TEXTS,
        "decoded_image": IMAGE,
        "answer": FILLED_TEXT,
        "subject": FILLED_TEXT,
    },
    to_question=to_question,
    judge=judge,
)
