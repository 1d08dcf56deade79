"""MathVista testmini (Lu et al., 2024): 1,000 questions about figures, charts and diagrams.

Schema: huggingface.co/datasets/AI4Math/MathVista. Normalisation: the authors' evaluation
(github.com/lupantech/MathVista, evaluation/calculate_score.py). Their first step has a language
model read the answer out of the response; here the answer span says what it is.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from care_train.data import Sample
from care_train.evaluation.answers import edit_distance, judge_choice, judge_free_form
from care_train.evaluation.columns import FILLED_TEXT, IMAGE, NUMBER_OR_NULL, TEXTS, optional
from care_train.evaluation.question import Benchmark, Judgement, Question, image_ref, letters
from care_train.verifier import AnswerType

_MAX_COMPARED = 256
"""Characters of an answer that are compared with the options."""


def to_question(row: Mapping[str, Any], location: str, base_dir: Path) -> Question:
    """The published query, which ends with question, unit and choices, after the image."""
    precision, options = row["precision"], tuple(row["choices"] or ())
    if row["question_type"] == "multi_choice" and row["answer"] not in options:
        raise ValueError(
            f"{location}: column 'answer': got {row['answer']!r}, wanted one of 'choices' "
            f"{list(options)}"
        )
    return Question(
        Sample(
            id=row["pid"],
            prompt=row["query"],
            answer=row["answer"],
            images=(image_ref(row["decoded_image"], base_dir, location),),
            source="mathvista",
            location=location,
        ),
        options=options,
        kind="choice" if row["question_type"] == "multi_choice" else row["answer_type"],
        precision=None if precision is None else int(precision),
        group=row["answer_type"],
    )


def judge(predicted: str, question: Question) -> Judgement:
    """Exact match of the normalised answer; numbers and lists also as the verifier reads them."""
    expected = question.sample.answer
    if question.kind == "choice":
        place = _nearest_option(predicted, question.options)
        letter = letters(question.options.index(expected) + 1)[-1]
        return judge_choice(place, letter, predicted)
    normalized = _normalize_number(predicted, question)
    # Numbers are inferred from the key; a list in brackets could be an interval.
    answer_type = AnswerType.LIST if question.kind == "list" else None
    return judge_free_form(predicted, expected, normalized == expected.strip(), answer_type)


def _nearest_option(predicted: str, options: tuple[str, ...]) -> int | None:
    """The letter in brackets, the letter alone, or else the option of the least edit distance."""
    text = predicted.strip()
    if not text:
        return None
    in_brackets = re.search(r"\(([a-zA-Z])\)", text)
    letter = in_brackets[1].upper() if in_brackets else text.rstrip(".").upper()
    if letter and len(letter) == 1 and letter in letters(len(options)):
        return letters(len(options)).index(letter)
    distances = [edit_distance(text[:_MAX_COMPARED], option) for option in options]
    return distances.index(min(distances))


def _normalize_number(predicted: str, question: Question) -> str:
    """An integer cut from a decimal, a float rounded to the question's precision, or the text."""
    text = predicted.strip()
    if question.kind not in ("integer", "float"):
        return text
    try:
        value = float(text)
        return str(int(value)) if question.kind == "integer" else _rounded(value, question)
    except (ValueError, OverflowError):
        return ""


def _rounded(value: float, question: Question) -> str:
    return str(round(value, question.precision or 0))


MATHVISTA = Benchmark(
    name="mathvista",
    title="MathVista mini",
    dataset="AI4Math/MathVista",
    split="testmini",
    columns={
        "pid": FILLED_TEXT,
        "query": FILLED_TEXT,
        "decoded_image": IMAGE,
        "choices": optional(TEXTS),
        "precision": NUMBER_OR_NULL,
        "answer": FILLED_TEXT,
        "question_type": FILLED_TEXT,
        "answer_type": FILLED_TEXT,
    },
    to_question=to_question,
    judge=judge,
)
