"""MathVista, MathVerse and MATH-Vision: rows as questions, and what is right."""

import re

from care_train.data import Sample
from care_train.evaluation.question import (
    Benchmark,
    Question,
    ReadImages,
    Row,
    choose_option,
    lettered_options,
    letters,
    list_options,
    right_options,
)
from care_train.verifier import AnswerType
from care_train.verifier.notation import unwrap


def _mathvista_question(row: Row, location: str, images: ReadImages) -> Question:
    """The published query, which ends with question, unit and choices, after the image."""
    precision, options = row["precision"], tuple(row["choices"] or ())
    is_choice = row["question_type"] == "multi_choice"
    if is_choice and row["answer"] not in options:
        raise ValueError(
            f"{location}: column 'answer': got {row['answer']!r}, wanted one of 'choices' "
            f"{list(options)}"
        )
    return Question(
        Sample(
            row["pid"],
            row["query"],
            row["answer"],
            images(row["decoded_image"]),
            source="mathvista",
            location=location,
            # Numbers are inferred from the key; a list in brackets could be an interval.
            answer_type=AnswerType.LIST if row["answer_type"] == "list" else None,
        ),
        options=options,
        # Two options may share the text that is the key: either is right.
        right=frozenset(i for i, o in enumerate(options) if is_choice and o == row["answer"]),
        kind="choice" if is_choice else row["answer_type"],
        precision=None if precision is None else int(precision),
        group=row["answer_type"],
    )


def _match_mathvista(predicted: str, question: Question) -> bool:
    """An integer cut from a decimal, a float rounded to the key's precision, or the text as it is.

    Source: github.com/lupantech/MathVista, evaluation/calculate_score.py. The authors' first step,
    a language model that reads the answer out of the response, is the answer span's here.
    """
    normalized = predicted.strip()
    if question.kind in ("integer", "float"):
        try:
            value = float(normalized)
            rounded = int(value) if question.kind == "integer" else value
            normalized = str(round(rounded, question.precision or 0))
        except (ValueError, OverflowError):
            normalized = ""
    return normalized == question.sample.answer.strip()


def _choose_mathvista(predicted: str, question: Question) -> int:
    """The option that an answer names, or else the one of the least edit distance.

    The authors' language model reads the letter out of "**B**" or "Option B".
    """
    # Imported here: no other benchmark needs it.
    from rapidfuzz.distance import Levenshtein

    place = choose_option(predicted, question)
    if place is not None:
        return place
    distances = [Levenshtein.distance(unwrap(predicted), option) for option in question.options]
    return distances.index(min(distances))


_MATHVERSE_OPTION = re.compile(r"\(?([A-H])\)?\s*[:.)]\s*(.*)")
_MATHVERSE_UNLISTED = {"true": ("True", "False"), "false": ("True", "False")}
_MATHVERSE_UNLISTED |= {"yes": ("Yes", "No"), "no": ("Yes", "No")}


def _mathverse_question(row: Row, location: str, images: ReadImages) -> Question:
    """The published query that asks for reasoning first, after the image.

    Most keys of multiple-choice questions are letters; some are an option's text. A key that is
    neither is compared as text, and may go to the judge.
    """
    is_choice = row["question_type"] == "multi-choice"
    # The question is within the image in one version; this column always spells it. Where it lists
    # no choices, the letters still are what is asked for.
    options = _mathverse_options(row["question_for_eval"])
    options = options or _MATHVERSE_UNLISTED.get(row["answer"].strip().lower(), ("",) * 4)
    right = right_options(row["answer"], options) if is_choice else frozenset()
    return Question(
        Sample(
            row["sample_index"],
            row["query_cot"],
            row["answer"],
            images(row["image"]),
            source="mathverse",
            location=location,
            answer_type=AnswerType.TEXT if is_choice and not right else None,
        ),
        options=options if is_choice else (),
        right=right,
        kind="choice" if is_choice else "free-form",
        group=row["problem_version"],
        problem=str(row.get("problem_index", "")),
        is_odd=is_choice and not right,
    )


def _mathverse_options(question: str) -> tuple[str, ...]:
    """The lines after `Choices:`, where their letters run from A."""
    lines = question.partition("Choices:")[2].splitlines()
    found = [_MATHVERSE_OPTION.fullmatch(line.strip()) for line in lines]
    matches = [match for match in found if match]
    if "".join(match[1] for match in matches) != letters(len(matches)):
        return ()
    return tuple(match[2].strip() for match in matches)


def _match_mathverse(predicted: str, question: Question) -> bool:
    """The same string.

    The authors have a language model compare every answer with its key
    (github.com/ZrrSkywalker/MathVerse, evaluation/score_answer_s2.py), or take both for strings.
    """
    return predicted.strip() == question.sample.answer.strip()


# Dropped before comparing: sizes, degrees, dollar signs, units that the keys leave out.
_DROPPED = re.compile(
    r"\\[,!;:]|\\left|\\right|\\text|\\mbox|\^\{?\\circ\}?|°|\\?\$|\\?%|\{?m\}?\^3|\{?units\}?"
    r"|\{?km\}?"
)
_BOXED = re.compile(r".*\\boxed\{(.*)\}", re.DOTALL)


def _math_vision_question(row: Row, location: str, images: ReadImages) -> Question:
    """The question and its choices after the image, which holds all the question's pictures."""
    options, prompt, key = tuple(row["options"]), row["question"], row["answer"]
    if options:
        prompt = f"{prompt}\nChoices:\n{list_options(options)}\nThe answer is one letter."
    shown = images(row["decoded_image"])
    return Question(
        Sample(row["id"], prompt, key, shown, source="math_vision", location=location),
        options=options,
        right=lettered_options([key], options, location) if options else frozenset(),
        group=row["subject"],
    )


def _match_math_vision(predicted: str, question: Question) -> bool:
    """The same LaTeX without what does not count, or the same number at two decimals.

    Source: github.com/mathllm/MATH-V, evaluation/utils.py, which evaluates model output as code;
    here the verifier reads what is symbolic.
    """
    value = _math_vision_value(predicted)
    return value != "" and value == _math_vision_value(question.sample.answer)


def _choose_math_vision(predicted: str, question: Question) -> int | None:
    """The option that an answer names, or whose value it is.

    The key's own text is right even where it is another option's letter, as in the authors' code.
    """
    texts, text = list(map(_math_vision_text, question.options)), _math_vision_text(predicted)
    place = next((i for i in question.right if texts[i] == text), None)
    place = choose_option(predicted, question) if place is None else place
    if place is None:
        same = _math_vision_value(predicted)
        found = [i for i, o in enumerate(question.options) if _math_vision_value(o) == same]
        place = found[0] if len(found) == 1 else None
    return place


def _math_vision_text(text: str) -> str:
    boxed = _BOXED.match(text)
    text = _DROPPED.sub("", "".join((boxed[1] if boxed else text).lower().split()))
    text = text.split("=")[-1].split("\\approx")[-1].rstrip(".")
    return re.sub(r"\\[dt]frac", r"\\frac", text)


def _math_vision_value(text: str) -> str | float:
    """A number or fraction at two decimals; other text without what does not count."""
    text = _math_vision_text(text)
    fraction = re.fullmatch(r"(-?)\\frac\{(\d{1,12})\}\{(\d{1,12})\}", text)
    fraction = fraction or re.fullmatch(r"(-?)(\d{1,12})/(\d{1,12})", text)
    if fraction and int(fraction[3]):
        return round(float(f"{fraction[1]}1") * int(fraction[2]) / int(fraction[3]), 2)
    decimal = re.fullmatch(r"[+-]?(?:\d{1,15}(?:\.\d{0,15})?|\.\d{1,15})", text)
    return round(float(text), 2) if decimal else text


MATH_BENCHMARKS = (
    Benchmark(
        name="mathvista",
        title="MathVista mini",
        dataset="AI4Math/MathVista",
        split="testmini",
        columns=dict.fromkeys(("pid", "query", "answer", "question_type", "answer_type"), "filled")
        | {"decoded_image": "image", "choices": "texts or null", "precision": "number or null"},
        to_question=_mathvista_question,
        matches=_match_mathvista,
        choose=_choose_mathvista,
    ),
    Benchmark(
        name="mathverse",
        title="MathVerse mini",
        dataset="AI4Math/MathVerse",
        split="testmini",
        subsets=("testmini",),
        columns=dict.fromkeys(
            ("sample_index", "problem_version", "query_cot", "answer", "question_type"), "filled"
        )
        | {"image": "image", "question_for_eval": "text"},
        to_question=_mathverse_question,
        matches=_match_mathverse,
    ),
    Benchmark(
        name="math_vision",
        title="MATH-Vision full",
        dataset="MathLLMs/MathVision",
        split="test",
        columns=dict.fromkeys(("id", "question", "answer", "subject"), "filled")
        | {"options": "texts", "decoded_image": "image"},
        to_question=_math_vision_question,
        matches=_match_math_vision,
        choose=_choose_math_vision,
    ),
)
