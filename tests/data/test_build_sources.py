"""Every source's published schema goes through the build, and a changed one is named."""

import base64
import io
import shutil
from pathlib import Path
from typing import Any, get_args

import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from care_train.config import Adapter, PromptSettings, RewardSettings
from care_train.data import Sample, load_images
from care_train.data.columns import describe_kinds
from care_train.data.prepare import ADAPTERS
from care_train.verifier import Verifier
from tests.data import published
from tests.data.published import build_from, drawing, load, quarantine, write_jsonl

TALK = [
    {"from": "human", "value": "q?"},
    {"from": "gpt", "value": "<think>so</think><answer>1</answer>"},
]


def same_pixels(image: Image.Image, number: int) -> bool:
    return image.tobytes() == drawing(number).tobytes()


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], list[Sample]]:
    """The three sets of Table 4 in one file."""
    folder = tmp_path_factory.mktemp("built")
    sources: list[dict[str, Any]] = [
        {"name": name, "adapter": name, "path": str(getattr(published, name)(folder / name))}
        for name in ("chartqa", "geometry3k", "virl39k")
    ]
    sources[0] |= {"where": {"human_or_machine": "human"}, "expected_rows": 3}
    manifest, output = build_from(folder, sources)
    return manifest["counts"], list(load(output))


def test_published_rows(built):
    """Human questions alone; keys as they are, or out of their box; images in the row, in a list or
    at relative paths, several or none; other columns kept."""
    counts, samples = built
    chartqa, geometry, virl = samples[:3], samples[3:6], samples[6:]
    assert [s.prompt for s in chartqa] == [f"How high is bar {i}?" for i in range(3)]
    assert [s.answer for s in chartqa] == ["14", "2015", "Yes"]
    # 5 % for numbers, but not for years.
    assert [s.columns["answer_type"] for s in chartqa] == ["relaxed", None, None]
    assert chartqa[1].location == "train.parquet: row 2"
    assert chartqa[1].columns["origin"] == "data/train-00000-of-00001.parquet: row 2"
    assert chartqa[1].source == "chartqa"
    # Different figures under one text stay.
    assert [s.answer for s in geometry] == ["2 \\sqrt { 221 }", "12", "x = 5"]
    assert geometry[0].columns["ground_truth"] == "A" and geometry[0].options == ()
    assert [s.answer for s in virl] == ["B", "\\frac{1}{2}", "4"]
    assert [len(s.images) for s in samples] == [1, 1, 1, 1, 1, 1, 1, 2, 0]
    assert virl[0].columns["options"] == ["red", "blue"]
    assert (virl[1].columns["qid"], virl[1].columns["PassRate_7BBase"]) == ("q1", 0.25)
    for sample, number in ((chartqa[2], 2), (geometry[2], 12), (virl[1], 26)):
        assert same_pixels(load_images(sample)[-1], number)
    one = counts["sources"]["chartqa"]
    assert (one["read"], one["filtered"], one["usable"], one["expected_rows"]) == (4, 1, 3, 3)
    assert [counts["sources"][name]["usable_share"] for name in counts["sources"]] == [33.3] * 3
    total = {"kept": 9, "filtered": 1, "read": 10}
    assert counts["total"] | total == counts["total"]


def test_virl39k_images_in_its_zip(tmp_path: Path):
    """ViRL39K ships images.zip: it is read as it is, no folder of 40,000 files needed."""
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
    samples = load(output)
    assert [s.rationale for s in samples] == ["It is purple. Wait, yes.", "So A."]
    assert [s.answer for s in samples] == ["purple", "A"]
    assert same_pixels(load_images(samples[1])[0], 41)
    [row] = quarantine(output)
    assert (row["file"], row["row"], row["reason"]) == (names[1], 2, "no_tags")
    assert "row 2: conversations: got a response without a <think> span" in row["detail"]


@pytest.mark.parametrize(
    ("key", "right", "wrong"),
    [
        ("14", ["14.6"], ["15"]),  # ChartQA's 5 %
        ("2015", [], ["2016"]),  # but not for years
        ("Yes", ["yes"], []),
        ("B", ["blue", "(B) blue"], ["A", "red"]),  # options from the prompt
        ("\\frac{1}{2}", ["0.5"], ["2"]),
        ("x = 5", ["5"], ["6"]),
        ("2 \\sqrt { 221 }", ["2\\sqrt{221}"], []),
    ],
)
def test_built_rows_are_scored_by_their_kind(built, key, right, wrong):
    """What the build writes, or leaves to be inferred, is what the verifier goes by."""
    verifier = Verifier(PromptSettings(), RewardSettings())
    [sample] = [sample for sample in built[1] if sample.answer == key]
    for answer in right + wrong:
        text = f"<think>so</think> <answer>{answer}</answer>"
        assert verifier.score(text, sample).accuracy == (answer in right), answer


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    drawing(number).save(buffer, "PNG")
    return buffer.getvalue()


def user_rows(folder: Path) -> list[dict[str, Any]]:
    """One question in each shape that rows come in, each with the same picture and key."""
    drawing(1).save(folder / "a.png")
    encoded = base64.b64encode(png(1)).decode()
    url = f"data:image/png;base64,{encoded}"
    text = {"type": "text", "text": "why?"}
    parts = [{"type": "image"}, text]
    plain, key = {"prompt": "why?", "answer": "x"}, {"answer": "x"}

    def turn(role: str, content: Any) -> dict[str, Any]:
        return {"role": role, "content": content}

    response = turn("assistant", "<think>so</think><answer>x</answer>")
    verl = {
        "data_source": "hiyouga/geometry3k",
        "prompt": [turn("system", "Think."), turn("user", "<image>why?")],
        "images": [{"image": str(folder / "a.png")}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": "x"},
        "extra_info": {"index": 0},
    }
    return [
        verl,
        plain | {"image": "a.png"},
        key | {"problem": "why?", "images": ["a.png"]},
        plain | {"image": encoded},
        plain | {"images": [url]},
        plain | {"images": [{"bytes": None, "path": "a.png"}]},
        key | {"prompt": [turn("user", "<image>why?")], "images": ["a.png"]},
        {"prompt": [turn("user", parts)], "image": "a.png", "solution": "x"},
        key | {"prompt": [turn("user", [{"type": "image_url", "image_url": {"url": url}}, text])]},
        {"messages": [turn("user", parts), response], "images": ["a.png"]},
        {"prompt": [turn("user", parts)], "completion": [response], "images": ["a.png"]},
        {"prompt": "why?", "image": "a.png", "solution": "<think>so</think>\n<answer> x </answer>"},
    ]


def test_user_rows(tmp_path: Path):
    """Paths, base64, HF dicts, EasyR1's, verl's and TRL's rows: build and trainer read the same,
    and the same question in twelve shapes is one row and eleven named duplicates."""
    path = write_jsonl(tmp_path / "rows.jsonl", user_rows(tmp_path))
    source = {"name": "mine", "path": str(path)}
    output = build_from(tmp_path, [source], output=tmp_path / "all", dedup={"enabled": False})[1]
    built, read = list(load(output)), list(load(path))
    assert len(built) == len(read) == 12
    for sample in built + read:
        assert sample.prompt.removeprefix("<image>") == "why?"
        assert sample.answer == "x"
        assert [same_pixels(image, 1) for image in load_images(sample)] == [True]
    assert built[0].columns["system"] == read[0].columns["system"] == "Think."
    assert built[0].columns["data_source"] == "hiyouga/geometry3k"
    manifest, output = build_from(tmp_path, [source])
    assert manifest["counts"]["total"]["kept"] == 1
    assert manifest["counts"]["sources"]["mine"]["duplicates"] == {"duplicate of mine": 11}
    assert {row["detail"].split(": ")[-1] for row in quarantine(output)} == {
        "repeats mine/rows.jsonl/1"
    }


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"path": "no/such/file.parquet"}, "sources.s.path: no/such/file.parquet does not exist"),
        ({"path": "bad.jsonl"}, "bad.jsonl: row 1: not JSON"),
        ({"path": "r.jsonl", "where": {"x": 1}}, "where: r.jsonl: got column 'x', wanted one"),
        (
            {"path": "acme/none", "adapter": "geometry3k"},
            "hf download acme/none --repo-type dataset",
        ),
    ],
)
def test_unusable_sources_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: dict[str, Any], message: str
):
    """Key, path, got and wanted; of a data set of the Hub, here without network, its download."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    Path("bad.jsonl").write_text("not this\n")
    write_jsonl(Path("r.jsonl"), [{"prompt": "q", "answer": "1"}])
    with pytest.raises(ValueError) as error:
        build_from(tmp_path, [source | {"name": "s"}])
    assert message in str(error.value)


def test_adapters_are_settings():
    """The settings accept every adapter and no other."""
    assert set(get_args(Adapter)) == set(ADAPTERS)


@pytest.mark.parametrize("name", ["chartqa", "geometry3k", "virl39k"])
def test_every_changed_column_is_named(tmp_path: Path, name: str):
    """Of another type, or gone where it is required: source, file, column, the type got, or the
    columns there are, and what was wanted, before any output."""
    [path] = getattr(published, name)(tmp_path / name).rglob("*.parquet")
    source = {"name": "s", "adapter": name, "path": str(path)}
    # Without the datasets library's note of what the columns were.
    whole = parquet.read_table(path).replace_schema_metadata(None)
    for column, kinds in ADAPTERS[name].columns.items():
        required = column.removesuffix("?")
        left = whole.drop_columns([required])
        odd = left.append_column(required, pyarrow.array([{"x": 1}] * len(left)))
        cases = [(odd, "an object with 'x', "), (left, "none (the columns are ")]
        for table, got in cases[: 1 if column.endswith("?") else 2]:
            parquet.write_table(table, path)
            with pytest.raises(ValueError) as error:
                build_from(tmp_path, [source])
            said = str(error.value)
            assert said.startswith(
                f"source s ({name}): {path.name}: column {required!r}: got {got}"
            )
            assert f"wanted {describe_kinds(kinds)}" in said
    optional = [column[:-1] for column in ADAPTERS[name].columns if column.endswith("?")]
    parquet.write_table(whole.drop_columns(optional), path)
    assert build_from(tmp_path, [source])[0]["counts"]["total"]["kept"]


@pytest.mark.parametrize(
    ("adapter", "row", "column", "value"),
    [
        ("virl39k", {"question": "q?", "answer": "1", "image": []}, "answer", ["a", "b"]),
        ("vision_r1_cold", {"conversations": TALK}, "conversations", "q?"),
    ],
)
def test_changed_json_schemas_are_named(tmp_path: Path, adapter, row, column, value):
    """Without a schema in the file, the first row tells; a later odd row is quarantined."""
    path = write_jsonl(tmp_path / "v.jsonl", [row | {column: value}, row])
    source = {"name": "s", "adapter": adapter, "path": str(path)}
    wanted = rf"{adapter}\): v\.jsonl: column '{column}': got .*, wanted"
    with pytest.raises(ValueError, match=wanted):
        build_from(tmp_path, [source])
    write_jsonl(path, [row, row | {column: value}])
    _, output = build_from(tmp_path, [source], overwrite=True)
    [odd] = quarantine(output)
    assert (odd["row"], odd["reason"]) == (2, "column_type")
    assert f"{adapter}: v.jsonl: row 2: column {column!r}: got {value!r}" in odd["detail"]
