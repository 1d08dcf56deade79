"""Small data sets with the published schemas of the paper's protocol, drawn here.

    python -m bench.protocol_fixtures runs/fixtures

writes a cold-start file in Vision-R1-cold's conversations, rows for reinforcement learning, and the
six benchmarks as their repositories hold them: a few questions each about coloured shapes.
"""

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Image, List, Value, disable_progress_bars
from PIL import Image as PillowImage
from PIL import ImageDraw

COLORS = ("red", "green", "blue", "yellow")
SHAPES = ("circle", "square")

_TEXT, _IMAGE, _TEXTS = Value("string"), Image(), List(Value("string"))


def _texts(*names: str) -> dict[str, Any]:
    return dict.fromkeys(names, _TEXT)


_MMMU = (
    _texts("id", "question", "options", "explanation")
    | {f"image_{number}": _IMAGE for number in range(1, 8)}
    | _texts("img_type", "answer", "topic_difficulty")
)

FEATURES = {
    "mathvista": Features(
        _texts("pid", "question", "image")
        | {"decoded_image": _IMAGE, "choices": _TEXTS, "unit": _TEXT, "precision": Value("float64")}
        | _texts("answer", "question_type", "answer_type")
        | {
            "metadata": {
                **_texts("category", "context", "grade"),
                **dict.fromkeys(("img_height", "img_width"), Value("int64")),
                **{"language": _TEXT, "skills": _TEXTS},
                **_texts("source", "split", "task"),
            }
        }
        | _texts("query")
    ),
    "mathverse": Features(
        _texts("sample_index", "problem_index", "problem_version", "question")
        | {"image": _IMAGE}
        | _texts("answer", "question_type")
        | {"metadata": _texts("split", "source", "subject", "subfield")}
        | _texts("query_wo", "query_cot", "question_for_eval")
    ),
    "math_vision": Features(
        _texts("id", "question")
        | {"options": _TEXTS, "image": _TEXT, "decoded_image": _IMAGE}
        | _texts("answer", "solution")
        | {"level": Value("int64"), "subject": _TEXT}
    ),
    "mmmu": Features(_MMMU | _texts("question_type", "subfield")),
    "mmmu_pro_standard": Features(_MMMU | _texts("subject")),
    "mmmu_pro_vision": Features(
        {"id": _TEXT, "image": _IMAGE} | _texts("options", "answer", "subject")
    ),
}
"""The published columns and types of each benchmark (the data sets' cards on the Hub)."""

FILES = {
    "mathvista": "MathVista/data/testmini-00000-of-00001.parquet",
    "mathverse": "MathVerse/testmini.parquet",
    "math_vision": "MathVision/data/test-00000-of-00001.parquet",
    "mmmu": "MMMU/{subject}/validation-00000-of-00001.parquet",
    "mmmu_pro_standard": "MMMU_Pro/standard (10 options)/test-00000-of-00001.parquet",
    "mmmu_pro_vision": "MMMU_Pro/vision/test-00000-of-00001.parquet",
}
"""Where a downloaded repository has the rows."""


def draw(
    color: str, shape: str = "square", size: int = 64, box: tuple[int, int, int, int] | None = None
) -> PillowImage.Image:
    """A shape in a colour on white, in `box` or all but the margin."""
    image = PillowImage.new("RGB", (size, size), "white")
    pen, box = ImageDraw.Draw(image), box or (size // 8, size // 8, size * 7 // 8, size * 7 // 8)
    (pen.ellipse if shape == "circle" else pen.rectangle)(box, fill=color)
    return image


def mathvista_rows() -> list[dict[str, Any]]:
    """Multiple choice, integer, float and list questions."""
    hint = "Hint: Please answer the question"
    asked: list[tuple[str, list[str] | None, float | None, str, str, str]] = [
        ("what color is the shape?", [*COLORS], None, "red", "multi_choice", "text"),
        ("how many shapes are there?", None, None, "1", "free_form", "integer"),
        ("what share of the shapes is red?", None, 1.0, "0.5", "free_form", "float"),
        ("which sides are equal?", None, None, "[1, 2]", "free_form", "list"),
    ]
    rows = []
    for number, (question, choices, precision, answer, kind, answer_type) in enumerate(asked, 1):
        listed = "".join(
            f"\n({letter}) {text}" for letter, text in zip("ABCDEFGH", choices or (), strict=False)
        )
        form = "provide the correct option letter, e.g., A, B, C, D" if choices else "the value"
        rows.append(
            {
                "pid": str(number),
                "question": question,
                "image": f"images/{number}.jpg",
                "decoded_image": draw("red"),
                "choices": choices,
                "unit": None,
                "precision": precision,
                "answer": answer,
                "question_type": kind,
                "answer_type": answer_type,
                "metadata": {"skills": ["arithmetic"], "img_height": 64, "split": "testmini"},
                "query": f"{hint} and {form}, at the end.\nQuestion: {question}"
                + (f"\nChoices:{listed}" if choices else ""),
            }
        )
    return rows


def mathverse_rows() -> list[dict[str, Any]]:
    """A problem in three versions, multiple choice and free-form; the last within the image."""
    choices = "\n".join(f"{letter}:{text}" for letter, text in zip("ABCD", COLORS, strict=True))
    whole = f"what color is the shape?\nChoices:\n{choices}"
    rows = []
    for index, version in enumerate(("Text Dominant", "Vision Intensive", "Vision Only")):
        is_free = index == 1
        question = "" if version == "Vision Only" else whole
        asked = "find the side." if is_free else question
        rows.append(
            {
                "sample_index": str(index + 1),
                "problem_index": "1",
                "problem_version": version,
                "question": asked,
                "image": draw("green"),
                "answer": "14" if is_free else "B",
                "question_type": "free-form" if is_free else "multi-choice",
                "metadata": {"split": "testmini", "subject": "Plane Geometry"},
                "query_wo": f"Please directly answer the question.\n{asked}",
                "query_cot": f"Please first conduct reasoning, and then answer.\n{asked}",
                "question_for_eval": "find the side." if is_free else whole,
            }
        )
    return rows


def math_vision_rows() -> list[dict[str, Any]]:
    """A multiple-choice problem, and two with numbers."""
    asked: list[tuple[str, list[str], str]] = [
        ("<image1> what color is the shape?", [*COLORS], "C"),
        ("how many corners has it? <image1>", [], "4"),
        ("what part is colored? <image1>", [], r"\frac{9}{16}"),
    ]
    return [
        {
            "id": str(number),
            "question": question,
            "options": options,
            "image": f"images/{number}.jpg",
            "decoded_image": draw("blue"),
            "answer": answer,
            "solution": None,
            "level": 1,
            "subject": "counting",
        }
        for number, (question, options, answer) in enumerate(asked, 1)
    ]


def mmmu_rows(subject: str) -> list[dict[str, Any]]:
    """Two images in the question, images as options, one image named twice, an open question."""
    images = {"image_1": draw("red"), "image_2": draw("green")}
    asked: list[tuple[str, Sequence[str], str, str]] = [
        ("compare <image 1> and <image 2>: what color is the second?", COLORS, "B", "choice"),
        ("which one is red?", ("<image 2>", "<image 1>"), "B", "choice"),
        ("<image 1> what color is <image 1>? not that of <image 2>", COLORS, "A", "choice"),
        ("<image 1> what color is the shape? <image 2>", (), "['red', 'dark red']", "open"),
    ]
    return [
        {
            "id": f"validation_{subject}_{number}",
            "question": question,
            "options": repr(list(options)),
            "explanation": "",
            **images,
            "img_type": "['Other']",
            "answer": answer,
            "topic_difficulty": "Easy",
            "question_type": "multiple-choice" if kind == "choice" else "open",
            "subfield": subject,
        }
        for number, (question, options, answer, kind) in enumerate(asked, 1)
    ]


def mmmu_pro_rows() -> list[dict[str, Any]]:
    """Ten options."""
    options = [*COLORS, "black", "white", "gray", "brown", "teal", "pink"]
    shared = {"options": repr(options), "explanation": "", "img_type": "['Other']"}
    return [
        shared
        | {
            "id": f"test_Math_{number}",
            "question": "<image 1> what color is the shape?",
            "image_1": draw(color),
            "answer": "ABCDEFGHIJ"[options.index(color)],
            "topic_difficulty": "Easy",
            "subject": "Math",
        }
        for number, color in enumerate(COLORS, 1)
    ]


def mmmu_pro_vision_rows() -> list[dict[str, Any]]:
    """The question as a screenshot."""
    rows = []
    for row in mmmu_pro_rows():
        screenshot = PillowImage.new("RGB", (128, 96), "white")
        screenshot.paste(row["image_1"], (0, 32))
        ImageDraw.Draw(screenshot).text((2, 2), "what color is the shape?", fill="black")
        kept = {key: row[key] for key in ("id", "options", "answer", "subject")}
        rows.append(kept | {"image": screenshot})
    return rows


def benchmark_rows() -> dict[str, list[dict[str, Any]]]:
    """Rows of every benchmark by its name; MMMU's of one subject."""
    return {
        "mathvista": mathvista_rows(),
        "mathverse": mathverse_rows(),
        "math_vision": math_vision_rows(),
        "mmmu": mmmu_rows("Math"),
        "mmmu_pro_standard": mmmu_pro_rows(),
        "mmmu_pro_vision": mmmu_pro_vision_rows(),
    }


def write_benchmarks(folder: Path) -> dict[str, Path]:
    """Write every benchmark as its repository has it; the folders by the benchmarks' names."""
    for name, rows in benchmark_rows().items():
        subjects = {"Math": rows, "Art": mmmu_rows("Art")} if name == "mmmu" else {"": rows}
        for subject, part in subjects.items():
            write_parquet(name, part, folder / FILES[name].format(subject=subject))
    return {name: folder / file.split("/", 1)[0] for name, file in FILES.items()}


def write_parquet(name: str, rows: Sequence[dict[str, Any]], path: Path) -> Path:
    """Write rows with a benchmark's published features; columns a row lacks are null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = [dict.fromkeys(FEATURES[name]) | row for row in rows]
    Dataset.from_list(whole, features=FEATURES[name]).to_parquet(path)
    return path


def write_training(folder: Path, count: int = 64, seed: int = 0) -> None:
    """Rows of both training stages and held-out ones, with their images.

    Three quarters are for training: `cold_start.json` has Vision-R1-cold's conversations,
    `train.jsonl` rows without rationales. `cold_start_test.json` and `test.jsonl` are the rest.
    """
    rng = random.Random(seed)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    conversations, rows = [], []
    for number in range(count):
        color, shape = rng.choice(COLORS), rng.choice(SHAPES)
        image = f"images/{number}.png"
        # In other places: those that look the same are duplicates to `care-train data build`.
        left, top, side = rng.randrange(14), rng.randrange(14), rng.randrange(44, 50)
        box = (left, top, left + side, top + side)
        draw(color, shape, box=box).save(folder / image)
        question = "what color is the shape?"
        thought = f"the shape is a {color} {shape}"
        turns = [
            {"from": "human", "value": f"<image>{question}"},
            {"from": "gpt", "value": f"<think>{thought}</think> <answer>{color}</answer>"},
        ]
        conversations.append({"image": image, "conversations": turns})
        rows.append({"problem": question, "answer": color, "images": [image]})
    end = count * 3 // 4
    for name, part in (("", slice(end)), ("_test", slice(end, None))):
        (folder / f"cold_start{name}.json").write_text(json.dumps(conversations[part]))
        lines = [json.dumps(row) + "\n" for row in rows[part]]
        (folder / f"{name.removeprefix('_') or 'train'}.jsonl").write_text("".join(lines))


def main() -> None:
    """Write all of it."""
    parser = argparse.ArgumentParser(description="Write the fixtures of the whole protocol.")
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    disable_progress_bars()
    write_training(folder)
    write_benchmarks(folder)
    print(f"{folder}: {', '.join(sorted({path.name for path in folder.iterdir()}))}")


if __name__ == "__main__":
    main()
