"""The benchmarks' adapters: published schemas, sources, and schema changes."""

import json
from pathlib import Path

import pytest

from bench.protocol_fixtures import FEATURES, benchmark_rows, write_parquet
from care_train.config import build_config
from care_train.data import load_images
from care_train.data.columns import describe_kinds
from care_train.data.schema import IMAGE_PLACEHOLDER
from care_train.evaluation.benchmark_run import open_questions
from care_train.evaluation.benchmarks import BENCHMARKS

NAMES = list(BENCHMARKS)
COLORS = ["red", "green", "blue", "yellow"]


def _open(name: str, source: Path, seed: int = 0, **settings):
    sources = {"sources": {name: str(source)}}
    return open_questions(name, build_config({"seed": seed, "eval": sources | settings}))


def _questions(name: str, source: Path) -> list:
    opened = _open(name, source)
    return [opened.read(place) for place in range(len(opened.ids))]


def _write_json(rows: list[dict], path: Path) -> Path:
    """Images as files beside it, named by relative paths."""
    plain = []
    for number, row in enumerate(rows):
        values = dict(row)
        for column, value in row.items():
            if hasattr(value, "save"):
                values[column] = f"{number}_{column}.png"
                value.save(path.parent / values[column])
        plain.append(values)
    path.write_text("".join(json.dumps(row) + "\n" for row in plain))
    return path


@pytest.mark.parametrize("name", NAMES)
def test_a_downloaded_repository_is_read(name, repositories, tmp_path):
    """Every benchmark's published columns become questions whose images can be opened; JSON lines
    with image paths are the same questions."""
    questions = _questions(name, repositories[name])
    assert len(questions) == len(benchmark_rows()[name]) * (2 if name == "mmmu" else 1)
    rows = [dict.fromkeys(FEATURES[name]) | row for row in benchmark_rows()[name]]
    others = {q.sample.id: q for q in _questions(name, _write_json(rows, tmp_path / "rows.jsonl"))}
    for question in questions:
        images = load_images(question.sample)
        assert images and all(image.mode == "RGB" for image in images)
        assert question.sample.prompt.count(IMAGE_PLACEHOLDER) in (0, len(images))
        assert question.sample.answer and question.sample.location.startswith(name)
        if other := others.get(question.sample.id):
            for field in ("options", "kind", "right", "keys"):
                assert getattr(other, field) == getattr(question, field)
            assert other.sample.prompt == question.sample.prompt
            pairs = zip(load_images(other.sample), images, strict=True)
            assert all(one.tobytes() == image.tobytes() for one, image in pairs)
    assert {q.sample.id for q in questions} >= others.keys()
    if name == "mmmu":
        # The subjects are configurations of one data set; each is a group.
        assert {question.group for question in questions} == {"Math", "Art"}
    if name == "mathverse":
        # A question within the image: its options come from `question_for_eval`.
        assert questions[-1].group == "Vision Only" and questions[-1].options == tuple(COLORS)


def _refused(name: str, changes: dict, folder: Path) -> str:
    """Why a benchmark whose first row is changed is not opened; `...` takes a column away."""
    row = dict.fromkeys(FEATURES[name]) | benchmark_rows()[name][0] | changes
    row = {key: value for key, value in row.items() if value is not ...}
    with pytest.raises(ValueError) as info:
        _open(name, _write_json([row], folder / "rows.jsonl"))
    assert str(info.value).startswith(f"{name}: rows.jsonl: row 1")
    return str(info.value)


@pytest.mark.parametrize("name", NAMES)
def test_a_changed_column_is_named(name, tmp_path):
    """A column of another type, or one that the publishers drop: column, got and wanted."""
    for column, kinds in BENCHMARKS[name].columns.items():
        for value, got in (({"x": 1}, "an object with 'x'"), (..., "none")):
            message = _refused(name, {column: value}, tmp_path)
            assert f": column {column!r}: got {got}" in message
            assert f", wanted {describe_kinds(kinds)}" in message


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("mathvista", {"choices": "['red']"}, "column 'choices': got \"['red']\", wanted"),
        ("mathvista", {"decoded_image": None}, "column 'decoded_image': got nothing, wanted"),
        ("mathvista", {"answer": "purple"}, "wanted one of 'choices'"),
        ("mathverse", {"answer": 14}, "column 'answer': got 14, wanted"),
        ("mathverse", {"image": "nowhere.png"}, "nowhere.png"),
        ("math_vision", {"answer": ""}, "column 'answer': got empty text, wanted"),
        ("math_vision", {"answer": "F"}, "the letter of one of 4 options"),
        ("mmmu", {"options": "['red', 'blue'"}, "wanted text that spells a list of texts"),
        ("mmmu", {"answer": "Z"}, "the letter of one of 4 options"),
        ("mmmu", {"image_2": None}, "the image that <image 2> names"),
        ("mmmu_pro_vision", {"options": "[1, 2]"}, "wanted text that spells a list of texts"),
    ],
)
def test_values_that_cannot_be_scored_are_named(name, changes, message, tmp_path):
    """A key among no options, broken option lists, missing images: before the first answer."""
    assert message in _refused(name, changes, tmp_path)


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ([COLORS], COLORS),
        ([*COLORS[:3], ["blue", "dark blue"]], (*COLORS[:3], "blue, dark blue")),
    ],
)
def test_a_list_within_a_list_of_options_is_read(options, wanted, tmp_path):
    """A few published rows of MMMU-Pro: alone the list that is meant, among others one option."""
    row = benchmark_rows()["mmmu_pro_standard"][1] | {"options": repr(options)}
    path = write_parquet("mmmu_pro_standard", [row], tmp_path / "rows.parquet")
    (question,) = _questions("mmmu_pro_standard", path)
    assert question.options == tuple(wanted) and question.right == {1}
    assert f"(D) {wanted[3]}" in question.sample.prompt


def test_keys_that_name_no_option_are_counted(tmp_path):
    """They stop no run: only a judge can find an answer to them right, and the results say so."""
    rows = benchmark_rows()["mathverse"]
    keys = ("(B)", "14", "B, C", "green")
    rows = [rows[i % 3] | {"answer": key, "sample_index": str(i)} for i, key in enumerate(keys)]
    opened = _open("mathverse", write_parquet("mathverse", rows, tmp_path / "rows.parquet"))
    assert opened.num_odd_keys == 1
    assert [sorted(opened.read(i).right) for i in range(4)] == [[1], [], [], [1]]


def test_a_question_that_is_there_twice_is_asked_once(tmp_path, capsys):
    """Two copies of a table in one folder, as one file or with the rows in another order; two
    questions of one id would share their answers, and are refused."""
    rows = benchmark_rows()["mathvista"]
    for name, part in (("a", rows), ("b", rows), ("c", rows[::-1])):
        write_parquet("mathvista", part, tmp_path / f"data/testmini-{name}.parquet")
    assert _open("mathvista", tmp_path).ids == tuple(row["pid"] for row in rows)
    assert "mathvista: 4 questions are there twice: asked once" in capsys.readouterr().err
    assert len(_open("mathvista", tmp_path, max_samples=4).ids) == 4
    same = [row | {"pid": "1"} for row in rows]
    path = write_parquet("mathvista", same, tmp_path / "same.parquet")
    with pytest.raises(ValueError, match=r"row 2: id: got '1', already used by .*row 1"):
        _open("mathvista", path)


def test_mmmu_images_stand_where_they_are_named(repositories, tmp_path):
    """In question and options, in the order of mention; a second mention is words, and an image
    that is never named comes first."""
    questions = {q.sample.id: q for q in _questions("mmmu", repositories["mmmu"])}
    compared, options, twice, _ = (questions[f"validation_Math_{n}"].sample for n in (1, 2, 3, 4))
    assert compared.prompt.startswith("compare <image> and <image>: what color")
    red, green = (255, 0, 0), (0, 128, 0)
    assert [i.getpixel((32, 32)) for i in load_images(compared)] == [red, green]
    assert "(A) <image>\n(B) <image>" in options.prompt
    # The options name the second image first.
    assert [i.getpixel((32, 32)) for i in load_images(options)] == [green, red]
    assert twice.prompt.startswith("<image> what color is image 1? not that of <image>")
    row = benchmark_rows()["mmmu_pro_standard"][0] | {"question": "what color is the shape?"}
    path = write_parquet("mmmu_pro_standard", [row], tmp_path / "rows.parquet")
    (question,) = _questions("mmmu_pro_standard", path)
    assert question.sample.prompt.startswith("<image>what color")
    assert len(question.options) == 10


def test_the_hub_is_asked_for_published_ids(repositories, monkeypatch):
    """Without a source the published id's tables of its split are downloaded and read.

    There is no network here: the library's calls are recorded, their answers are local copies.
    """
    asked = []

    def download(source, allow_patterns, **options):
        asked.append((source, allow_patterns))
        return str(
            repositories[{"MMMU/MMMU_Pro": "mmmu_pro_standard", "MMMU/MMMU": "mmmu"}[source]]
        )

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    for name in ("mmmu_pro_standard", "mmmu"):
        assert open_questions(name, build_config({})).ids == _open(name, repositories[name]).ids
    assert asked == [("MMMU/MMMU_Pro", ["*test*"]), ("MMMU/MMMU", ["*validation*"])]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere/at/all", "eval.sources.mathvista: nowhere/at/all does not exist"),
        ("none.jsonl", "no rows of split"),
    ],
)
def test_sources_that_cannot_be_read_are_named(source, message, tmp_path, monkeypatch):
    """The path and what was wanted, in one line."""
    monkeypatch.chdir(tmp_path)
    Path("none.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=message):
        _open("mathvista", Path(source))


def test_max_samples_takes_some_by_seed(repositories):
    """The same few for one seed; of the whole set, not its beginning alone."""
    chosen = [_open("mmmu", repositories["mmmu"], s, max_samples=3).ids for s in (0, 0, 1, 2)]
    assert chosen[0] == chosen[1] and len(chosen[0]) == 3
    assert len(set(chosen)) > 1
