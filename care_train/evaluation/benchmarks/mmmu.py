"""MMMU and both splits of MMMU-Pro: rows as questions, and what is right."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from care_train.data import ImageRef, Sample
from care_train.data.schema import IMAGE_PLACEHOLDER
from care_train.evaluation.question import (
    Question,
    decode_texts,
    image_ref,
    lettered_options,
    list_options,
)
from care_train.verifier import normalize_mmmu

Row = Mapping[str, Any]

_MMMU_IMAGES = tuple(f"image_{number}" for number in range(1, 8))


def mmmu_question(row: Row, location: str, base_dir: Path) -> Question:
    """Question and options with each image where `<image n>` names it first.

    Later mentions keep their words, and images never named come before the text.
    """
    options = decode_texts(row["options"], column="options", location=location)
    is_open = row.get("question_type", "multiple-choice") == "open"
    if is_open:
        text = f"{row['question']}\nAnswer the question using a single word or phrase."
    else:
        hint = "Answer with the option's letter from the given choices."
        text = f"{row['question']}\n{list_options(options)}\n{hint}"
    prompt, images = _mmmu_images(text, row, location, base_dir)
    return Question(
        Sample(row["id"], prompt, row["answer"], images, source="mmmu", location=location),
        options=options,
        right=frozenset() if is_open else lettered_options(row["answer"], options, location),
        keys=_mmmu_keys(row["answer"], location) if is_open else (),
        kind="open" if is_open else "choice",
        group=row.get("subject") or row["id"].split("_", 1)[-1].rsplit("_", 1)[0],
    )


def mmmu_pro_vision_question(row: Row, location: str, base_dir: Path) -> Question:
    """The screenshot that holds question, options and figures."""
    options = decode_texts(row["options"], column="options", location=location)
    return Question(
        Sample(
            row["id"],
            "Answer the multiple-choice question in the image with the letter of its option.",
            row["answer"],
            (image_ref(row["image"], base_dir, location),),
            source="mmmu_pro_vision",
            location=location,
        ),
        options=options,
        right=lettered_options(row["answer"], options, location),
        kind="choice",
        group=row["subject"],
    )


def _mmmu_images(
    text: str, row: Row, location: str, base_dir: Path
) -> tuple[str, tuple[ImageRef, ...]]:
    if IMAGE_PLACEHOLDER in text:
        raise ValueError(f"{location}: column 'question': {IMAGE_PLACEHOLDER} without a number")
    available = {name: row[name] for name in _MMMU_IMAGES if row.get(name) is not None}
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

    text = re.sub(r"<image ([1-7])>", place, text)
    unnamed = [name for name in available if name not in named]
    images = tuple(image_ref(available[name], base_dir, location) for name in (*unnamed, *named))
    return IMAGE_PLACEHOLDER * len(unnamed) + text, images


def _mmmu_keys(answer: str, location: str) -> tuple[str, ...]:
    """The key, or several that are right as well, spelled as a Python list; "[0, 1]" is one key."""
    try:
        return decode_texts(answer, column="answer", location=location)
    except ValueError:
        return (answer,)


# Before these words an open answer is not over yet.
_LEAD_INS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ", "=")
_NUMBER = re.compile(
    r"-?\b\d{1,3}(?:,\d{3})+\b|-?\d+(?:\.\d+)?[eE][+-]?\d+"
    r"|-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"
)


def match_mmmu(predicted: str, question: Question) -> bool:
    """Whether an open answer holds the key, or one of several.

    Source: github.com/MMMU-Benchmark/MMMU, mmmu/utils/eval_utils.py and mmmu-pro/evaluate.py.
    """
    return any(_mmmu_holds(predicted, normalize_mmmu(key)) for key in question.keys)


def _mmmu_holds(predicted: str, key: str) -> bool:
    """A number of the answer equals the key at two decimals, or one of its phrases holds it."""
    phrases = _mmmu_phrases(predicted)
    said = {normalize_mmmu(t) for phrase in phrases for t in (phrase, *_NUMBER.findall(phrase))}
    if key in said or _NUMBER.fullmatch(key):
        return key in said
    # A single character is no evidence inside a word.
    parts = (f" {key}", f"{key} ") if len(key) == 1 else (key,)
    return any(part in phrase for phrase in phrases for part in parts)


def _mmmu_phrases(predicted: str) -> list[str]:
    """What follows the last lead-in of each sentence, or the answer as a whole."""
    text = predicted.strip().strip(".")
    found = []
    for sentence in re.split(r"\.\s(?=[A-Z])|\n", text):
        sentence = sentence.lower()
        tails = [sentence.split(word)[-1].strip() for word in _LEAD_INS if word in sentence]
        if tails and (tail := min(tails, key=len)).strip(":,.!?;'"):
            found.append(tail)
    return found or [text.lower()]
