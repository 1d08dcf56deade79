"""MMMU's validation split and both splits of MMMU-Pro (Yue et al., 2024; 2025).

Schemas: huggingface.co/datasets/MMMU/MMMU (30 subjects, 900 questions) and MMMU/MMMU_Pro (1,730
questions). Normalisation: the authors' evaluation (github.com/MMMU-Benchmark/MMMU,
mmmu/utils/eval_utils.py and mmmu-pro/evaluate.py).
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from care_train.data import ImageRef, Sample
from care_train.data.schema import IMAGE_PLACEHOLDER
from care_train.evaluation.answers import choose, judge_choice, judge_free_form
from care_train.evaluation.columns import ENCODED_TEXTS, FILLED_TEXT, IMAGE, optional
from care_train.evaluation.question import (
    Benchmark,
    Judgement,
    Question,
    decode_texts,
    image_ref,
    letters,
    list_options,
)
from care_train.verifier import normalize_mmmu
from care_train.verifier.answers import MAX_ANSWER_CHARS

_IMAGE_COLUMNS = tuple(f"image_{number}" for number in range(1, 8))
_REFERENCE = re.compile(r"<image ([1-7])>")
_CHOICE_HINT = "Answer with the option's letter from the given choices."
_OPEN_HINT = "Answer the question using a single word or phrase."
_VISION_HINT = "Answer the multiple-choice question in the image with the letter of its option."

# Before these words an open answer is not over yet.
_LEAD_INS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ", "=")
_NUMBER = re.compile(
    r"-?\b\d{1,3}(?:,\d{3})+\b|-?\d+(?:\.\d+)?[eE][+-]?\d+"
    r"|-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"
)


def to_question(row: Mapping[str, Any], location: str, base_dir: Path) -> Question:
    """Question and options with each image where `<image n>` names it first.

    Later mentions keep their words, and images never named come before the text.
    """
    options = decode_texts(row["options"], column="options", location=location)
    is_open = row.get("question_type", "multiple-choice") == "open"
    if is_open:
        text = f"{row['question']}\n{_OPEN_HINT}"
    else:
        text = f"{row['question']}\n{list_options(options, '({letter}) {text}')}\n{_CHOICE_HINT}"
        _check_letter(row["answer"], options, location)
    prompt, images = _interleave(text, row, location, base_dir)
    return Question(
        Sample(
            id=row["id"],
            prompt=prompt,
            answer=row["answer"],
            images=images,
            source="mmmu",
            location=location,
        ),
        options=options,
        kind="open" if is_open else "choice",
        group=row.get("subject") or row["id"].split("_", 1)[-1].rsplit("_", 1)[0],
    )


def to_vision_question(row: Mapping[str, Any], location: str, base_dir: Path) -> Question:
    """The screenshot that holds question, options and figures."""
    options = decode_texts(row["options"], column="options", location=location)
    _check_letter(row["answer"], options, location)
    return Question(
        Sample(
            id=row["id"],
            prompt=_VISION_HINT,
            answer=row["answer"],
            images=(image_ref(row["image"], base_dir, location),),
            source="mmmu_pro_vision",
            location=location,
        ),
        options=options,
        kind="choice",
        group=row["subject"],
    )


def judge(predicted: str, question: Question) -> Judgement:
    """The option that the answer names, or an open answer that holds the key."""
    expected = question.sample.answer
    if question.kind == "choice":
        return judge_choice(choose(predicted, question.options), expected, predicted)
    keys = _keys(expected)
    if len(predicted) <= MAX_ANSWER_CHARS and _holds(predicted, keys):
        return judge_free_form(predicted, expected, is_exact=True)
    judgements = [judge_free_form(predicted, key) for key in keys]
    return replace(judgements[0], asked=tuple(item for one in judgements for item in one.asked))


def _interleave(
    text: str, row: Mapping[str, Any], location: str, base_dir: Path
) -> tuple[str, tuple[ImageRef, ...]]:
    if IMAGE_PLACEHOLDER in text:
        raise ValueError(f"{location}: column 'question': {IMAGE_PLACEHOLDER} without a number")
    available = {name: row[name] for name in _IMAGE_COLUMNS if row.get(name) is not None}
    named: list[str] = []

    def place(match: re.Match[str]) -> str:
        name = f"image_{match[1]}"
        if name not in available:
            raise ValueError(
                f"{location}: column {name!r}: got null, wanted the image that {match[0]} names"
            )
        if name in named:
            return f"image {match[1]}"
        named.append(name)
        return IMAGE_PLACEHOLDER

    text = _REFERENCE.sub(place, text)
    unnamed = [name for name in available if name not in named]
    images = tuple(image_ref(available[name], base_dir, location) for name in (*unnamed, *named))
    return IMAGE_PLACEHOLDER * len(unnamed) + text, images


def _check_letter(answer: str, options: tuple[str, ...], location: str) -> None:
    if len(answer) != 1 or answer not in letters(len(options)):
        raise ValueError(
            f"{location}: column 'answer': got {answer!r}, wanted the letter of one of "
            f"{len(options)} options"
        )


def _keys(expected: str) -> tuple[str, ...]:
    """An open question's key, or several that are right as well, spelled as a Python list."""
    if not expected.strip().startswith("["):
        return (expected,)
    return decode_texts(expected, column="answer", location="mmmu")


def _holds(predicted: str, keys: tuple[str, ...]) -> bool:
    """A number of the answer equals the key at two decimals, or one of its phrases holds it."""
    phrases = _phrases(predicted)
    said = {normalize_mmmu(t) for phrase in phrases for t in (phrase, *_NUMBER.findall(phrase))}
    for key in map(normalize_mmmu, keys):
        if key in said:
            return True
        if not _NUMBER.fullmatch(key) and any(_within(key, phrase) for phrase in phrases):
            return True
    return False


def _within(key: str, phrase: str) -> bool:
    # A single character is no evidence inside a word.
    return phrase == key or (
        f" {key}" in phrase or f"{key} " in phrase if len(key) == 1 else key in phrase
    )


def _phrases(predicted: str) -> list[str]:
    """What follows the last lead-in of each sentence, or the answer as a whole."""
    text = predicted.strip().strip(".")
    found = []
    for sentence in re.split(r"\.\s(?=[A-Z])|\n", text):
        sentence = sentence.lower()
        tails = [sentence.split(word)[-1].strip() for word in _LEAD_INS if word in sentence]
        if tails and (tail := min(tails, key=len)).strip(":,.!?;'"):
            found.append(tail)
    return found or [text.lower()]


_MMMU_COLUMNS = {
    "id": FILLED_TEXT,
    "question": FILLED_TEXT,
    "options": ENCODED_TEXTS,
    "answer": FILLED_TEXT,
} | {name: optional(IMAGE) for name in _IMAGE_COLUMNS}

MMMU = Benchmark(
    name="mmmu",
    title="MMMU val",
    dataset="MMMU/MMMU",
    split="validation",
    columns=_MMMU_COLUMNS | {"question_type": FILLED_TEXT},
    to_question=to_question,
    judge=judge,
)

MMMU_PRO_STANDARD = Benchmark(
    name="mmmu_pro_standard",
    title="MMMU-Pro standard",
    dataset="MMMU/MMMU_Pro",
    split="test",
    subsets=("standard (10 options)",),
    columns=_MMMU_COLUMNS | {"subject": FILLED_TEXT},
    to_question=to_question,
    judge=judge,
)

MMMU_PRO_VISION = Benchmark(
    name="mmmu_pro_vision",
    title="MMMU-Pro vision",
    dataset="MMMU/MMMU_Pro",
    split="test",
    subsets=("vision",),
    columns={
        "id": FILLED_TEXT,
        "image": IMAGE,
        "options": ENCODED_TEXTS,
        "answer": FILLED_TEXT,
        "subject": FILLED_TEXT,
    },
    to_question=to_vision_question,
    judge=judge,
)
