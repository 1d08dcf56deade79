"""Every source's published schema goes through the build, and a changed one is named."""

import base64
import io
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from care_train.config import DataSettings, PromptSettings, RewardSettings
from care_train.data import Sample, load_images, load_samples
from care_train.verifier import Verifier
from tests.data import published
from tests.data.published import build_from, drawing, quarantine, write_jsonl


def samples_of(output: Path) -> list[Sample]:
    return list(load_samples(DataSettings(path=str(output / "train.parquet"))))


def same_pixels(image: Image.Image, number: int) -> bool:
    return image.tobytes() == drawing(number).tobytes()


def test_chartqa(tmp_path: Path):
    """Human questions alone, the label's one key, 5 % for numbers but not for years."""
    source = {"name": "chartqa", "adapter": "chartqa", "path": str(published.chartqa(tmp_path))}
    source |= {"where": {"human_or_machine": "human"}, "expected_rows": 3}
    manifest, output = build_from(tmp_path, [source])
    samples = samples_of(output)
    assert [(s.prompt, s.answer) for s in samples] == [
        ("How high is bar 0?", "14"),
        ("How high is bar 1?", "2015"),
        ("How high is bar 2?", "Yes"),
    ]
    assert [s.columns["answer_type"] for s in samples] == ["relaxed", None, None]
    assert all(same_pixels(load_images(s)[0], i) for i, s in enumerate(samples))
    counts = manifest["counts"]["sources"]["chartqa"]
    assert (counts["read"], counts["filtered"], counts["usable"]) == (4, 1, 3)
    assert samples[1].location == "train.parquet: row 2"
    assert samples[1].columns["origin"] == "data/train-00000-of-00001.parquet: row 2"
    assert samples[1].source == "chartqa"


def test_geometry3k(tmp_path: Path):
    """LaTeX keys, images in a list, other columns kept; different figures under one text stay."""
    source = {"name": "geo", "adapter": "geometry3k", "path": str(published.geometry3k(tmp_path))}
    _, output = build_from(tmp_path, [source])
    samples = samples_of(output)
    assert [s.answer for s in samples] == ["2 \\sqrt { 221 }", "12", "x = 5"]
    assert samples[0].columns["ground_truth"] == "A"
    assert same_pixels(load_images(samples[2])[0], 12)


def test_virl39k(tmp_path: Path):
    """Relative image paths, boxed keys, several images or none; its other columns stay."""
    source = {"name": "virl", "adapter": "virl39k", "path": str(published.virl39k(tmp_path / "v"))}
    _, output = build_from(tmp_path, [source])
    samples = samples_of(output)
    assert [s.answer for s in samples] == ["B", "\\frac{1}{2}", "4"]
    assert [len(s.images) for s in samples] == [1, 2, 0]
    assert samples[0].columns["options"] == ["red", "blue"]
    assert (samples[1].columns["qid"], samples[1].columns["PassRate_7BBase"]) == ("q1", 0.25)
    assert same_pixels(load_images(samples[1])[1], 26)


def test_virl39k_images_in_its_zip(tmp_path: Path):
    """ViRL39K ships images.zip: it is read as it is, no folder of 40,000 files needed."""
    import shutil

    folder = published.virl39k(tmp_path / "v")
    shutil.make_archive(str(folder / "images"), "zip", folder, "images")
    shutil.rmtree(folder / "images")
    source = {"name": "virl", "adapter": "virl39k", "path": str(folder)}
    for image_dir in ([], [str(folder / "images.zip")]):
        output = tmp_path / str(len(image_dir))
        manifest, _ = build_from(tmp_path, [source | {"image_dir": image_dir}], output=output)
        assert manifest["counts"]["total"]["kept"] == 3


def test_vision_r1_cold(tmp_path: Path):
    """Both files' columns and roles; rationale and key from the tags; a row without is named."""
    folder = published.vision_r1_cold(tmp_path / "cold")
    names = ("vision_r1_llava_cot_full.json", "vision_r1_mulberry_sft_full.json")
    source = {"name": "cold", "adapter": "vision_r1_cold", "path": [str(folder / n) for n in names]}
    _, output = build_from(tmp_path, [source], clean={"require_rationale": True})
    samples = samples_of(output)
    assert [s.rationale for s in samples] == ["It is purple. Wait, yes.", "So A."]
    assert [s.answer for s in samples] == ["purple", "A"]
    assert same_pixels(load_images(samples[1])[0], 41)
    [row] = quarantine(output)
    assert (row["file"], row["row"], row["reason"]) == (names[1], 2, "no_tags")
    assert "row 2: conversations: got a response without a <think> span" in row["detail"]


ANSWERS = [
    # ChartQA's 5 %, but not for years; case; no list of options.
    *[("14", "14.6", 1), ("14", "15", 0), ("2015", "2016", 0), ("Yes", "yes", 1)],
    # Options from the prompt, by letter or text; fractions.
    *[("B", "blue", 1), ("B", "(B) blue", 1), ("B", "A", 0), ("B", "red", 0)],
    *[("\\frac{1}{2}", "0.5", 1), ("\\frac{1}{2}", "2", 0)],
    # Geometry's equations and roots.
    *[("x = 5", "5", 1), ("x = 5", "6", 0), ("2 \\sqrt { 221 }", "2\\sqrt{221}", 1)],
]


@pytest.fixture(scope="module")
def built_samples(tmp_path_factory: pytest.TempPathFactory):
    """The three sets of Table 4 in one file, by their keys."""
    folder = tmp_path_factory.mktemp("built")
    sources = [
        {"name": name, "adapter": name, "path": str(getattr(published, name)(folder / name))}
        for name in ("chartqa", "geometry3k", "virl39k")
    ]
    return {sample.answer: sample for sample in samples_of(build_from(folder, sources)[1])}


@pytest.mark.parametrize(("key", "answer", "accuracy"), ANSWERS)
def test_built_rows_are_scored_by_their_kind(built_samples, key, answer, accuracy):
    """What the build writes, or leaves to be inferred, is what the verifier goes by."""
    verifier = Verifier(PromptSettings(), RewardSettings())
    text = f"<think>so</think> <answer>{answer}</answer>"
    assert verifier.score(text, built_samples[key]).accuracy == accuracy


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    drawing(number).save(buffer, "PNG")
    return buffer.getvalue()


def user_rows(folder: Path) -> list[dict[str, Any]]:
    """One question in each shape that rows come in, each with the same picture and key."""
    drawing(1).save(folder / "a.png")
    encoded = base64.b64encode(png(1)).decode()
    parts = [{"type": "image"}, {"type": "text", "text": "why?"}]
    url = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encoded}"}}
    return [
        {"prompt": "why?", "answer": "x", "image": "a.png"},
        {"problem": "why?", "answer": "x", "images": ["a.png"]},
        {"prompt": "why?", "answer": "x", "image": encoded},
        {"prompt": "why?", "answer": "x", "images": [f"data:image/png;base64,{encoded}"]},
        {"prompt": "why?", "answer": "x", "images": [{"bytes": None, "path": "a.png"}]},
        {
            "prompt": [{"role": "user", "content": "<image>why?"}],
            "images": ["a.png"],
            "answer": "x",
        },
        {
            "data_source": "hiyouga/geometry3k",
            "prompt": [
                {"role": "system", "content": "Think."},
                {"role": "user", "content": "<image>why?"},
            ],
            "images": [{"image": str(folder / "a.png")}],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": "x"},
            "extra_info": {"index": 0},
        },
        {"prompt": [{"role": "user", "content": parts}], "image": "a.png", "solution": "x"},
        {"prompt": [{"role": "user", "content": [url, parts[1]]}], "answer": "x"},
        {
            "messages": [
                {"role": "user", "content": parts},
                {"role": "assistant", "content": "<think>so</think><answer>x</answer>"},
            ],
            "images": ["a.png"],
        },
        {
            "prompt": [{"role": "user", "content": parts}],
            "completion": [{"role": "assistant", "content": "<answer>x</answer>"}],
            "images": ["a.png"],
        },
        {"prompt": "why?", "image": "a.png", "solution": "<think>so</think>\n<answer> x </answer>"},
    ]


@pytest.mark.parametrize("number", range(12))
def test_user_rows(tmp_path: Path, number: int):
    """Paths, base64, HF dicts, EasyR1's, verl's and TRL's rows: build and trainer read the same."""
    path = write_jsonl(tmp_path / "rows.jsonl", [user_rows(tmp_path)[number]])
    _, output = build_from(tmp_path, [{"name": "mine", "path": str(path)}])
    for sample in (samples_of(output)[0], load_samples(DataSettings(path=str(path)))[0]):
        assert sample.prompt.removeprefix("<image>") == "why?"
        assert sample.answer == "x"
        assert [same_pixels(image, 1) for image in load_images(sample)] == [True]
    if "reward_model" in user_rows(tmp_path)[number]:
        assert samples_of(output)[0].columns["system"] == "Think."
        assert samples_of(output)[0].columns["data_source"] == "hiyouga/geometry3k"


def test_all_user_rows_are_one(tmp_path: Path):
    """The same question in twelve shapes is one row, and eleven named duplicates."""
    rows = user_rows(tmp_path)
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    manifest, output = build_from(tmp_path, [{"name": "mine", "path": str(path)}])
    assert manifest["counts"]["total"]["kept"] == 1
    assert manifest["counts"]["sources"]["mine"]["duplicates"] == {"duplicate of mine": 11}
    assert {row["detail"].split(": ")[-1] for row in quarantine(output)} == {
        "repeats mine/rows.jsonl/1"
    }


def test_text_image_and_multi_image_rows_mix(tmp_path: Path):
    """Rows of all kinds lie in one file, each with its own number of images."""
    sources = [
        {"name": "virl", "adapter": "virl39k", "path": str(published.virl39k(tmp_path / "v"))},
        {"name": "geo", "adapter": "geometry3k", "path": str(published.geometry3k(tmp_path / "g"))},
    ]
    manifest, output = build_from(tmp_path, sources)
    assert [len(s.images) for s in samples_of(output)] == [1, 2, 0, 1, 1, 1]
    total = manifest["counts"]["total"]
    assert (total["kept"], total["text_only"], total["multi_image"]) == (6, 1, 1)
    assert total["images"] == 6
    shares = [manifest["counts"]["sources"][name]["usable_share"] for name in ("virl", "geo")]
    assert shares == [50.0, 50.0]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"path": "no/such/file.parquet"}, "sources.s.path: no/such/file.parquet does not exist"),
        ({"path": "{folder}/bad.jsonl"}, "bad.jsonl: row 1: not JSON"),
        (
            {"path": "{folder}/r.jsonl", "where": {"x": 1}},
            "where: r.jsonl: got column 'x', wanted one",
        ),
    ],
)
def test_unusable_sources_are_named(tmp_path: Path, source: dict[str, Any], message: str):
    """A source that cannot be opened: key, path, got and wanted."""
    (tmp_path / "bad.jsonl").write_text("not this\n")
    write_jsonl(tmp_path / "r.jsonl", [{"prompt": "q", "answer": "1"}])
    path = source["path"].format(folder=tmp_path)
    with pytest.raises(ValueError) as error:
        build_from(tmp_path, [source | {"name": "s", "path": path}])
    assert message.format(folder=tmp_path) in str(error.value)


def test_a_missing_hub_data_set_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Without network, the id, the cause and the command that downloads it elsewhere."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    source = {"name": "geo", "adapter": "geometry3k", "path": "hiyouga/no-such-geometry"}
    with pytest.raises(
        ValueError, match="hf download hiyouga/no-such-geometry --repo-type dataset"
    ):
        build_from(tmp_path, [source])
