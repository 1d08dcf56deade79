"""A corpus for `bench.data`: three sources in their published schemas, with planted defects.

Every image is drawn here. What happens to each row is known beforehand, so that the build's counts
can be checked one by one.
"""

import hashlib
import io
import json
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy
from PIL import Image, ImageDraw

_SIZE = (160, 120)
_BLOCK = 1000
_NUM_BACKGROUNDS = 64

# Shares of the paper's Table 4.
_CHART, _GEOMETRY = 0.153, 0.043

# Places, modulo 200, of the ViRL39K rows that are not what they should be.
_PLANTED = {
    7: "duplicate of chartqa",
    57: "duplicate of chartqa",
    19: "near_duplicate of geometry3k",
    119: "near_duplicate of geometry3k",
    31: "conflicting_answer of chartqa",
    43: "empty_answer",
    61: "image_missing",
    71: "image_unreadable",
    89: "image_too_large",
    103: "placeholders",
}


@dataclass(frozen=True)
class Corpus:
    """Where it lies and what must come of it."""

    folder: Path
    sizes: dict[str, int]
    expected: dict[str, dict[str, int]]
    """By source: rejected and duplicate rows by reason, kept rows, images of those."""


def make_corpus(folder: Path, rows: int, workers: int) -> Corpus:
    """Write the corpus, in blocks spread over processes."""
    sizes = {"chartqa": round(rows * _CHART), "geometry3k": round(rows * _GEOMETRY)}
    sizes["virl39k"] = rows - sum(sizes.values())
    for name in sizes:
        (folder / name / "data").mkdir(parents=True, exist_ok=True)
    tasks = [
        (folder, name, start, min(start + _BLOCK, size), sizes)
        for name, size in sizes.items()
        for start in range(0, size, _BLOCK)
    ]
    expected: dict[str, Counter[str]] = {name: Counter() for name in sizes}
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        for name, counts in pool.map(_write_block, *zip(*tasks, strict=True)):
            expected[name].update(counts)
    return Corpus(folder, sizes, {name: dict(counts) for name, counts in expected.items()})


def _write_block(
    folder: Path, name: str, start: int, stop: int, sizes: dict[str, int]
) -> tuple[str, Counter[str]]:
    import datasets

    features = _features(datasets)[name]
    counts: Counter[str] = Counter()
    make_row = {
        "chartqa": _chart_row,
        "geometry3k": _geometry_row,
        "virl39k": partial(_virl_row, sizes=sizes, folder=folder / name),
    }[name]
    rows = [make_row(i, counts) for i in range(start, stop)]
    datasets.disable_progress_bars()
    data = datasets.Dataset.from_list(rows, features=features)
    data.to_parquet(folder / name / "data" / f"train-{start:06}.parquet")
    return name, counts


def _features(datasets: Any) -> dict[str, Any]:
    text, image = datasets.Value("string"), datasets.Image()
    chart = {
        "image": image,
        "query": text,
        "label": datasets.List(text),
        "human_or_machine": datasets.ClassLabel(names=["human", "machine"]),
    }
    geometry = {"images": datasets.List(image), "problem": text, "answer": text}
    rates = dict.fromkeys(("PassRate_32BTrained", "PassRate_7BBase"), datasets.Value("float64"))
    virl = {
        **dict.fromkeys(("question", "answer"), text),
        **rates,
        **dict.fromkeys(("category", "source", "qid"), text),
        "image": datasets.List(text),
    }
    named = {"chartqa": chart, "geometry3k": geometry, "virl39k": virl}
    return {name: datasets.Features(columns) for name, columns in named.items()}


def _chart_row(i: int, counts: Counter[str]) -> dict[str, Any]:
    counts.update(kept=1, images=1)
    return {
        "image": {"bytes": _jpeg(f"chart/{i}"), "path": None},
        "query": _chart_query(i),
        "label": [_answer(f"chart/{i}")],
        "human_or_machine": 0,
    }


def _geometry_row(i: int, counts: Counter[str]) -> dict[str, Any]:
    counts.update(kept=1, images=1)
    image = {"bytes": _jpeg(f"geometry/{i}"), "path": None}
    answer = _answer(f"geometry/{i}")
    return {"images": [image], "problem": "<image>Find x.", "answer": answer}


def _virl_row(i: int, counts: Counter[str], sizes: dict[str, int], folder: Path) -> dict[str, Any]:
    planted = _PLANTED.get(i % 200, "")
    key, answer = f"virl/{i}", _answer(f"virl/{i}")
    # One question for thousands of images, as in real sets.
    question, images = "<image>What is the largest value?", [_jpeg(key)]
    if planted == "duplicate of chartqa" or planted.startswith("conflicting"):
        chart = i % sizes["chartqa"]
        question, images = f"<image>{_chart_query(chart)}", [_jpeg(f"chart/{chart}")]
        answer = _answer(f"chart/{chart}") + ("" if planted.startswith("dup") else "7")
    elif planted == "near_duplicate of geometry3k":
        diagram = i % sizes["geometry3k"]
        question, answer = "<image>Find x", _answer(f"geometry/{diagram}")
        images = [_jpeg(f"geometry/{diagram}", quality=70)]
    elif planted == "empty_answer":
        answer = ""
    elif planted == "image_unreadable":
        images = [images[0][:200]]
    elif planted == "image_too_large":
        images = [_bomb()]
    elif planted == "placeholders":
        question = "<image><image>What is the largest value?"
    elif i % 10 == 4:
        question, images = f"What is {i} plus {i}?", []
    elif i % 10 == 5:
        question, images = "<image><image>Which is higher?", [*images, _jpeg(f"{key}/second")]
    names = [f"images/{i // _BLOCK:03}/{i:06}-{n}.jpg" for n in range(len(images))]
    for name, data in zip(names, images, strict=True):
        path = folder / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if planted != "image_missing":
            path.write_bytes(data)
    counts.update({planted: 1} if planted else {"kept": 1, "images": len(images)})
    return {
        "question": question,
        "answer": f"\\boxed{{{answer}}}" if answer else "",
        "PassRate_32BTrained": 0.5,
        "PassRate_7BBase": 0.25,
        "category": "Broader STEM Topics",
        "source": "drawn",
        "qid": f"drawn-{i}",
        "image": names,
    }


def _chart_query(i: int) -> str:
    return f"What is the value of bar {i % 7} in chart {i}?"


def _answer(key: str) -> str:
    return str(_seed(key) % 100)


def _seed(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest())


def _jpeg(key: str, quality: int = 85) -> bytes:
    buffer = io.BytesIO()
    _drawing(key).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def _drawing(key: str) -> Image.Image:
    """Bars and lines over a grainy background, so that a file has about 7 kB."""
    rng = numpy.random.default_rng(_seed(key))
    image = _background(int(rng.integers(_NUM_BACKGROUNDS))).copy()
    draw = ImageDraw.Draw(image)
    width, height = _SIZE
    for place, bar in enumerate(rng.integers(10, height - 10, size=8)):
        color = tuple(int(value) for value in rng.integers(0, 256, size=3))
        left = 10 + place * (width - 20) // 8
        draw.rectangle((left, height - int(bar), left + 18, height), fill=color)
    points = rng.integers(0, width, size=12).tolist()
    draw.line([(x % width, y % height) for x, y in zip(points[::2], points[1::2], strict=True)], 0)
    return image


@cache
def _background(number: int) -> Image.Image:
    grain = numpy.random.default_rng(number).integers(200, 256, size=(*_SIZE[::-1], 3))
    return Image.fromarray(grain.astype(numpy.uint8))


def _bomb() -> bytes:
    """A small PNG that says it has a hundred million pixels."""
    buffer = io.BytesIO()
    Image.new("1", (10_000, 10_000)).save(buffer, "PNG")
    return buffer.getvalue()


def build_config(corpus: Corpus, output: Path) -> str:
    """The build's configuration file for the corpus; JSON is YAML."""
    sources = [
        {"name": name, "adapter": name, "path": str(corpus.folder / name / "data")}
        for name in corpus.sizes
    ]
    return json.dumps({"output": str(output), "sources": sources})
