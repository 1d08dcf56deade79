"""Small data sets in the published schemas (docs/data.md), with images drawn here."""

import json
from pathlib import Path
from typing import Any

import datasets
from PIL import Image, ImageDraw

from care_train.config import load_build_settings
from care_train.data.building import build

TEXT, IMAGE = datasets.Value("string"), datasets.Image()
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
    features = datasets.Features(
        image=IMAGE,
        query=TEXT,
        label=datasets.List(TEXT),
        human_or_machine=datasets.ClassLabel(names=["human", "machine"]),
    )
    rows = [
        {
            "image": drawing(i),
            "query": f"How high is bar {i}?",
            "label": [label],
            "human_or_machine": h,
        }
        for i, (label, h) in enumerate([("14", 0), ("2015", 0), ("Yes", 0), ("3.5", 1)])
    ]
    return _parquet(rows, features, folder / "data" / "train-00000-of-00001.parquet").parent.parent


def geometry3k(folder: Path, **changes: Any) -> Path:
    """hiyouga/geometry3k: images, problem, answer; lately also id, choices, ground_truth."""
    columns: dict[str, Any] = {"images": datasets.List(IMAGE), "problem": TEXT, "answer": TEXT}
    columns |= {"id": datasets.Value("int64"), "choices": datasets.List(TEXT), "ground_truth": TEXT}
    rows = [
        {
            "images": [drawing(10 + i)],
            "problem": "<image>Find x.",
            "answer": answer,
            "id": i,
            "choices": ["1", "2"],
            "ground_truth": "A",
        }
        for i, answer in enumerate(["2 \\sqrt { 221 }", "12", "x = 5"])
    ]
    path = folder / "data" / "train-00000-of-00001.parquet"
    return _parquet(rows, datasets.Features(columns | changes), path).parent.parent


def virl39k(folder: Path) -> Path:
    """TIGER-Lab/ViRL39K: one Parquet file beside images/, whose paths `image` lists."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "images").mkdir()
    rows = []
    cases = [("<image>Which is tallest?\nA. red\nB. blue", "\\boxed{B}", 1)]
    cases += [("<image><image>How do they differ?", "\\boxed{\\frac{1}{2}}", 2), ("2+2?", "4", 0)]
    for i, (question, answer, count) in enumerate(cases):
        names = [f"images/{i}-{n}.png" for n in range(count)]
        for n, name in enumerate(names):
            drawing(20 + 5 * i + n).save(folder / name)
        row = {"question": question, "answer": answer, "image": names, "qid": f"q{i}"}
        rates = {"PassRate_32BTrained": 0.5, "PassRate_7BBase": 0.25}
        rows.append(row | rates | {"category": "STEM", "source": "MM-Math"})
    rate = datasets.Value("float64")
    features = datasets.Features(
        question=TEXT,
        answer=TEXT,
        PassRate_32BTrained=rate,
        PassRate_7BBase=rate,
        category=TEXT,
        source=TEXT,
        qid=TEXT,
        image=datasets.List(TEXT),
    )
    return _parquet(rows, features, folder / "39Krelease.parquet").parent


def vision_r1_cold(folder: Path) -> Path:
    """Osilly/Vision-R1-cold: two .json lists of other columns and roles, images beside them."""
    for name, number in (("llava_cot_images/coco/1.png", 40), ("mulberry_images/geo/2.png", 41)):
        (folder / name).parent.mkdir(parents=True)
        drawing(number).save(folder / name)

    def talk(user: str, assistant: str, question: str, response: str) -> list[dict[str, str]]:
        return [{"from": user, "value": question}, {"from": assistant, "value": response}]

    llava = [
        {
            "id": "llava-1",
            "image": "llava_cot_images/coco/1.png",
            "conversations": talk(
                *("human", "gpt", "<image>\nWhat colour is the first bar?"),
                "<think>\nIt is purple. Wait, yes.\n</think>\n\n"
                "<answer> **Final Answer:** purple </answer>",
            ),
        }
    ]
    mulberry = [
        {
            "images": "mulberry_images/geo/2.png",
            "conversations": talk(
                *("user", "assistant", "<image>Is it 80? Choices:\nA: 80\nB: 60"),
                "<think>So A.</think><answer>Final Answer:A</answer>",
            ),
        },
        {
            "images": "mulberry_images/geo/2.png",
            "conversations": talk("user", "assistant", "<image>How?", "No tags at all."),
        },
    ]
    (folder / "vision_r1_llava_cot_full.json").write_text(json.dumps(llava))
    (folder / "vision_r1_mulberry_sft_full.json").write_text(json.dumps(mulberry))
    return folder


def _parquet(rows: list[dict[str, Any]], features: datasets.Features, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {name: [row[name] for row in rows] for name in features}
    datasets.Dataset.from_dict(columns, features=features).to_parquet(path)
    return path


def build_from(
    folder: Path, sources: list[dict[str, Any]], **settings: Any
) -> tuple[dict[str, Any], Path]:
    """(manifest, the output's folder) of a build in this process, by way of a configuration."""
    output = settings.pop("output", folder / "built")
    config = {"output": str(output), "workers": 1, "sources": sources} | settings
    path = folder / "build.yaml"
    path.write_text(json.dumps(config))
    return build(load_build_settings(path)), output


def quarantine(output: Path) -> list[dict[str, Any]]:
    """The rejected rows."""
    return [json.loads(line) for line in (output / "quarantine.jsonl").read_text().splitlines()]


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    """Rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
