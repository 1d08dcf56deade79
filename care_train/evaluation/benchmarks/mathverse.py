"""MathVerse testmini (Zhang et al., 2024): 788 problems in five versions, from text to figure.

Schema: huggingface.co/datasets/AI4Math/MathVerse. The authors have a language model compare every
answer with its key (github.com/ZrrSkywalker/MathVerse, evaluation/score_answer_s2.py), or take them
for strings; here choices are compared by letter and other answers by the verifier.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from care_train.data import Sample
from care_train.evaluation.answers import choose, judge_choice, judge_free_form
from care_train.evaluation.columns import FILLED_TEXT, IMAGE, TEXT
from care_train.evaluation.question import Benchmark, Judgement, Question, image_ref, letters

_OPTION = re.compile(r"^\(?([A-H])\)?\s*[:.)]\s*(.*)$")


def to_question(row: Mapping[str, Any], location: str, base_dir: Path) -> Question:
    """The published query that asks for reasoning first, after the image."""
    return Question(
        Sample(
            id=row["sample_index"],
            prompt=row["query_cot"],
            answer=row["answer"],
            images=(image_ref(row["image"], base_dir, location),),
            source="mathverse",
            location=location,
        ),
        # The question is within the image in one version; this column always spells it.
        options=_options(row["question_for_eval"]),
        kind="choice" if row["question_type"] == "multi-choice" else "free-form",
        group=row["problem_version"],
    )


def judge(predicted: str, question: Question) -> Judgement:
    """By letter, or as the verifier reads a free-form answer."""
    expected = question.sample.answer
    if question.kind == "choice":
        # Where the choices are in the image alone, letters still are what is asked for.
        options = question.options or ("",) * 4
        return judge_choice(choose(predicted, options), expected, predicted)
    return judge_free_form(predicted, expected, predicted.strip() == expected.strip())


def _options(question: str) -> tuple[str, ...]:
    """The lines after `Choices:`, where their letters run from A."""
    _, separator, choices = question.partition("Choices:")
    found = [_OPTION.match(line.strip()) for line in choices.splitlines() if line.strip()]
    matches = [match for match in found if match]
    if not separator or "".join(match[1] for match in matches) != letters(len(matches)):
        return ()
    return tuple(match[2].strip() for match in matches)


MATHVERSE = Benchmark(
    name="mathverse",
    title="MathVerse mini",
    dataset="AI4Math/MathVerse",
    split="testmini",
    subsets=("testmini",),
    columns={
        "sample_index": FILLED_TEXT,
        "problem_version": FILLED_TEXT,
        "image": IMAGE,
        "answer": FILLED_TEXT,
        "question_type": FILLED_TEXT,
        "query_cot": FILLED_TEXT,
        "question_for_eval": TEXT,
    },
    to_question=to_question,
    judge=judge,
)
