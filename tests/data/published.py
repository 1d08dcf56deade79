"""Small data sets in the published schemas (docs/data.md), with images drawn here."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
from PIL import Image, ImageDraw

from care_train.config import DataSettings, load_build_settings
from care_train.data import Sample, load_samples
from care_train.data.build import build

TEXT, IMAGE = datasets.Value("string"), datasets.Image()
INTEGER, FLOAT = datasets.Value("int64"), datasets.Value("float64")
COLORS = ("red", "green", "blue", "orange", "purple", "teal")


def drawing(number: int, size: tuple[int, int] = (96, 72)) -> Image.Image:
    """A picture that looks like no other one's."""
    image = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(image)
    for bar in range(6):
        height = 8 + (number * 37 + bar * bar * 29 + bar * number * 13) % 60
        box = (6 + 15 * bar, size[1] - height, 16 + 15 * bar, size[1])
        draw.rectangle(box, fill=COLORS[(number + bar) % len(COLORS)])
    return image


def chartqa(folder: Path) -> Path:
    """HuggingFaceM4/ChartQA: image, query, label (a list), human_or_machine (a class label)."""
    _parquet(
        folder / "data" / "train-00000-of-00001.parquet",
        image=(IMAGE, [drawing(i) for i in range(4)]),
        query=(TEXT, [f"How high is bar {i}?" for i in range(4)]),
        label=(datasets.List(TEXT), [["14"], ["2015"], ["Yes"], ["3.5"]]),
        human_or_machine=(datasets.ClassLabel(names=["human", "machine"]), [0, 0, 0, 1]),
    )
    return folder


def geometry3k(folder: Path) -> Path:
    """hiyouga/geometry3k: images, problem, answer; lately also id, choices, ground_truth."""
    _parquet(
        folder / "data" / "train-00000-of-00001.parquet",
        images=(datasets.List(IMAGE), [[drawing(10 + i)] for i in range(3)]),
        problem=(TEXT, ["<image>Find x."] * 3),
        answer=(TEXT, ["2 \\sqrt { 221 }", "12", "x = 5"]),
        id=(INTEGER, [0, 1, 2]),
        choices=(datasets.List(TEXT), [["1", "2"]] * 3),
        ground_truth=(TEXT, ["A"] * 3),
    )
    return folder


def virl39k(folder: Path) -> Path:
    """TIGER-Lab/ViRL39K: one Parquet file beside images/, whose paths `image` lists."""
    (folder / "images").mkdir(parents=True)
    for number in (20, 25, 26):
        drawing(number).save(folder / "images" / f"{number}.png")
    choice, compare = (
        "<image>Which is tallest?\nA. red\nB. blue",
        "<image><image>How do they differ?",
    )
    _parquet(
        folder / "39Krelease.parquet",
        question=(TEXT, [choice, compare, "2+2?"]),
        answer=(TEXT, ["\\boxed{B}", "\\boxed{\\frac{1}{2}}", "4"]),
        PassRate_32BTrained=(FLOAT, [0.5] * 3),
        PassRate_7BBase=(FLOAT, [0.25] * 3),
        category=(TEXT, ["STEM"] * 3),
        source=(TEXT, ["MM-Math"] * 3),
        qid=(TEXT, ["q0", "q1", "q2"]),
        image=(datasets.List(TEXT), [["images/20.png"], ["images/25.png", "images/26.png"], []]),
    )
    return folder


def vision_r1_cold(folder: Path) -> Path:
    """Osilly/Vision-R1-cold: two .json lists of other columns and roles, images beside them."""
    coco, geo = "llava_cot_images/coco/1.png", "mulberry_images/geo/2.png"
    for name, number in ((coco, 40), (geo, 41)):
        (folder / name).parent.mkdir(parents=True)
        drawing(number).save(folder / name)

    def talk(user: str, asked: str, assistant: str, said: str) -> list[dict[str, str]]:
        return [{"from": user, "value": asked}, {"from": assistant, "value": said}]

    color = "<image>\nWhat colour is the first bar?"
    purple = (
        "<think>\nIt is purple. Wait, yes.\n</think>\n\n<answer> **Final Answer:** purple </answer>"
    )
    choice, a = (
        "<image>Is it 80? A: 80\nB: 60",
        "<think>So A.</think><answer>Final Answer:A</answer>",
    )
    llava = [{"id": "1", "image": coco, "conversations": talk("human", color, "gpt", purple)}]
    mulberry = [
        {"images": geo, "conversations": talk("user", choice, "assistant", a)},
        {"images": geo, "conversations": talk("user", "<image>How?", "assistant", "No tags.")},
    ]
    (folder / "vision_r1_llava_cot_full.json").write_text(json.dumps(llava))
    (folder / "vision_r1_mulberry_sft_full.json").write_text(json.dumps(mulberry))
    return folder


def _parquet(path: Path, **columns: tuple[Any, list[Any]]) -> None:
    """Columns of (type, values), as the datasets library writes them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    features = datasets.Features({name: kind for name, (kind, _) in columns.items()})
    values = {name: values for name, (_, values) in columns.items()}
    datasets.Dataset.from_dict(values, features=features).to_parquet(path)


def build_from(
    folder: Path, sources: list[dict[str, Any]], **settings: Any
) -> tuple[dict[str, Any], Path]:
    """(manifest, the output's folder) of a build in this process, by way of a configuration."""
    output = settings.pop("output", folder / "built")
    config = {"output": str(output), "workers": 1, "sources": sources} | settings
    path = folder / "build.yaml"
    path.write_text(json.dumps(config))
    return build(load_build_settings(path)), output


def load(path: Path | str, key: str = "data", seed: int = 0, **settings: Any) -> Sequence[Sample]:
    """The rows of a file or folder, such as a build's, or of a data set by its name."""
    return load_samples(DataSettings(path=str(path), **settings), seed, key)


def quarantine(output: Path) -> list[dict[str, Any]]:
    """The rejected rows."""
    return [json.loads(line) for line in (output / "quarantine.jsonl").read_text().splitlines()]


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    """Rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
