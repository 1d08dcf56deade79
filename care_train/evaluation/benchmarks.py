"""MMMU and MMMU-Pro: rows as questions, and what is right; all six benchmarks of Table 1 by name.

Schemas: the data sets' cards on the Hugging Face Hub (Lu et al., 2024; Zhang et al., 2024; Wang et
al., 2024; Yue et al., 2024 and 2025), read in November 2026.
"""

import ast
import re
from typing import Any

from care_train.data import ImageRef, Sample
from care_train.data.answers import accepted_answers
from care_train.data.columns import describe
from care_train.data.schema import IMAGE_PLACEHOLDER
from care_train.evaluation.math_benchmarks import MATH_BENCHMARKS
from care_train.evaluation.question import (
    Benchmark,
    Question,
    ReadImages,
    Row,
    lettered_options,
    list_options,
)

_MMMU_IMAGES = tuple(f"image_{number}" for number in range(1, 8))
# Before these words an open answer is not over yet.
_LEAD_INS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ", "=")
_NUMBER = re.compile(
    r"-?\b\d{1,3}(?:,\d{3})+\b|-?\d+(?:\.\d+)?[eE][+-]?\d+"
    r"|-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"
)


def _mmmu_question(row: Row, location: str, images: ReadImages) -> Question:
    """Question and options with each image where `<image n>` names it first.

    Later mentions keep their words, and images never named come before the text.
    """
    options = _decode_texts(row["options"], "options", location)
    keys = accepted_answers(str(row["answer"]))
    is_open = row.get("question_type", "multiple-choice") == "open"
    if is_open:
        text = f"{row['question']}\nAnswer the question using a single word or phrase."
    else:
        hint = "Answer with the option's letter from the given choices."
        text = f"{row['question']}\n{list_options(options)}\n{hint}"
    prompt, shown = _mmmu_images(text, row, location, images)
    return Question(
        Sample(row["id"], prompt, str(row["answer"]), shown, source="mmmu", location=location),
        options=options,
        right=frozenset() if is_open else lettered_options(keys, options, location),
        keys=keys if is_open else (),
        kind="open" if is_open else "choice",
        group=row.get("subject") or row["id"].split("_", 1)[-1].rsplit("_", 1)[0],
    )


def _mmmu_pro_vision_question(row: Row, location: str, images: ReadImages) -> Question:
    """The screenshot that holds question, options and figures."""
    options = _decode_texts(row["options"], "options", location)
    keys = accepted_answers(str(row["answer"]))
    prompt = "Answer the multiple-choice question in the image with the letter of its option."
    key, shown = str(row["answer"]), images(row["image"])
    return Question(
        Sample(row["id"], prompt, key, shown, source="mmmu_pro_vision", location=location),
        options=options,
        right=lettered_options(keys, options, location),
        kind="choice",
        group=row["subject"],
    )


def _decode_texts(value: Any, column: str, location: str) -> tuple[str, ...]:
    """A list of texts, or the Python literal of one that MMMU stores in its place.

    A few published rows hold a list within the list: alone it is the list that is meant, among
    other items it is one item, whose parts are shown with commas between them.

    Raises:
        ValueError: the value is no such list.
    """
    texts = value
    if isinstance(texts, str):
        try:
            texts = ast.literal_eval(texts) if texts.strip() else []
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            texts = None
    while isinstance(texts, list) and len(texts) == 1 and isinstance(texts[0], list):
        texts = texts[0]
    if isinstance(texts, list):
        texts = [", ".join(map(str, one)) if isinstance(one, list) else one for one in texts]
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError(
            f"{location}: column {column!r}: got {describe(value)}, wanted text that "
            "spells a list of texts, such as \"['red', 'blue']\""
        )
    return tuple(texts)


def _mmmu_images(
    text: str, row: Row, location: str, images: ReadImages
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
    shown = images([available[name] for name in (*unnamed, *named)])
    return IMAGE_PLACEHOLDER * len(unnamed) + text, shown


def _match_mmmu(predicted: str, question: Question) -> bool:
    """Whether an open answer holds the key, or one of several.

    Source: github.com/MMMU-Benchmark/MMMU, mmmu/utils/eval_utils.py and mmmu-pro/evaluate.py.
    """
    return any(_mmmu_holds(predicted, _mmmu_value(key)) for key in question.keys)


def _mmmu_holds(predicted: str, key: str) -> bool:
    """A number of the answer equals the key at two decimals, or one of its phrases holds it."""
    phrases = _mmmu_phrases(predicted)
    said = {_mmmu_value(t) for phrase in phrases for t in (phrase, *_NUMBER.findall(phrase))}
    if key in said or _NUMBER.fullmatch(key):
        return key in said
    # A single character is no evidence inside a word.
    parts = (f" {key}", f"{key} ") if len(key) == 1 else (key,)
    return any(part in phrase for phrase in phrases for part in parts)


def _mmmu_value(text: str) -> str:
    """A number to two decimals, other text in lower case: `normalize_str` of eval_utils.py."""
    plain = text.strip()
    number = plain.replace(",", "")
    if re.fullmatch(r"[+-]?(?:[0-9]{1,300}(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]{1,2})?", number):
        return str(round(float(number), 2))
    return plain.lower()


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


_MMMU_COLUMNS = {
    **dict.fromkeys(("id", "question"), "filled"),
    "answer": "filled or texts",
    "options": "texts or spelled",
    **dict.fromkeys(_MMMU_IMAGES, "image or null"),
}
_MMMU_BENCHMARKS = (
    Benchmark(
        name="mmmu",
        title="MMMU val",
        dataset="MMMU/MMMU",
        split="validation",
        columns=_MMMU_COLUMNS | {"question_type": "filled"},
        to_question=_mmmu_question,
        matches=_match_mmmu,
    ),
    Benchmark(
        name="mmmu_pro_standard",
        title="MMMU-Pro standard",
        dataset="MMMU/MMMU_Pro",
        split="test",
        subsets=("standard (10 options)",),
        columns=_MMMU_COLUMNS | {"subject": "filled"},
        to_question=_mmmu_question,
        matches=_match_mmmu,
    ),
    Benchmark(
        name="mmmu_pro_vision",
        title="MMMU-Pro vision",
        dataset="MMMU/MMMU_Pro",
        split="test",
        subsets=("vision",),
        columns=dict.fromkeys(("id", "subject"), "filled")
        | {"answer": "filled or texts", "image": "image", "options": "texts or spelled"},
        to_question=_mmmu_pro_vision_question,
        matches=_match_mmmu,
    ),
)

BENCHMARKS = {benchmark.name: benchmark for benchmark in (*MATH_BENCHMARKS, *_MMMU_BENCHMARKS)}
"""In the order of Table 1."""
