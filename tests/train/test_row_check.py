"""All rows are measured before the first step: none too long, missing or damaged stops it later."""

import json
import logging
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from care_train.config import DataSettings
from care_train.data import load_samples
from care_train.data.answers import AnswerType
from care_train.training.session import usable_rows
from care_train.training.sft import check_lengths
from tests.train.builders import encoder_of, image_sample, load, make_session, text_sample
from tests.train.runs import errors_of

SHORT, LONG = text_sample(0), text_sample(1, prompt="what color? " * 200)


def _session(tiny_folder, **values):
    return make_session(tiny_folder(), values)


@pytest.mark.parametrize(
    ("kind", "pixels"),
    [
        ("tiny-qwen2", None),
        ("tiny-qwen2.5-vl", 64 * 64),
        ("tiny-qwen3-vl", None),
        ("tiny-qwen3-vl", [512 * 512, 2**24]),
    ],
)
@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(sizes=st.lists(st.tuples(st.integers(8, 700), st.integers(8, 700)), max_size=3))
def test_a_prompt_is_as_long_as_measured(tiny_folder, kind, pixels, sizes):
    """Image sizes alone tell how many tokens the processor will make, any bounds on pixels."""
    loaded = load(tiny_folder(kind), image_pixels=pixels)
    images = tuple(Image.new("RGB", size) for size in sizes if loaded.processor is not None)
    sample = image_sample(images=images, prompt="what is this?")
    encoder = encoder_of(loaded, max_prompt_tokens=10**6)
    assert encoder.num_tokens(sample) == len(encoder.encode([sample])[0].token_ids)


def test_an_upright_photo_has_the_tokens_of_its_stored_size(tiny_folder, tmp_path):
    """EXIF turns it by 90 degrees only when it is decoded; the count is the same."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (400, 90)).save(tmp_path / "turned.jpg", exif=exif)
    sample = image_sample(images=(tmp_path / "turned.jpg",))
    encoder = encoder_of(load(tiny_folder()))
    prompt = encoder.encode([sample])[0]
    assert prompt.images[0].size == (90, 400)
    assert encoder.num_tokens(sample) == len(prompt.token_ids)


def test_long_rows_are_named_or_dropped(tiny_folder, tmp_path, caplog):
    """Rows, tokens, the limit, the longest, and what to do, before anything was trained. With
    `prompt.overlong=drop` a warning and a line per row; never of held-out rows, never all. A
    warning too where the prompt hides the options that a key names."""
    wanted = r"rows\.jsonl: row 2: the prompt has \d+ tokens, wanted at most 200\n.*longest has"
    with pytest.raises(ValueError, match=wanted):
        usable_rows(_session(tiny_folder), [SHORT, LONG], "data")
    session = _session(tiny_folder, prompt={"overlong": "drop"})
    with caplog.at_level(logging.WARNING):
        rows, lengths = usable_rows(session, [SHORT, LONG, SHORT], "data", tmp_path)
    assert list(rows) == [SHORT, SHORT]
    assert lengths == [session.encoder.num_tokens(SHORT)] * 2
    [line] = (tmp_path / "data.dropped.jsonl").read_text().splitlines()
    tokens = session.encoder.num_tokens(LONG)
    assert json.loads(line) == {"row": LONG.location, "id": LONG.id, "tokens": tokens}
    assert "data: 1 of 3 rows are left out" in caplog.text
    usable_rows(session, [SHORT, replace(SHORT, answer="B", options=("x", "y"))], "data")
    assert "data: of 1 of 2 rows (the first: rows.jsonl: row 1) the key names" in caplog.text
    for held_out in (([SHORT, LONG], "eval.data"), ([LONG], "data", tmp_path)):
        with pytest.raises(ValueError, match="wanted at most 200"):
            usable_rows(session, *held_out)


def test_rows_from_a_file_stay_lazy(tiny_folder, tmp_path):
    """What is kept is read again from the file when asked for."""
    rows = [{"prompt": s.prompt, "answer": "red"} for s in (LONG, SHORT)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    samples = load_samples(DataSettings(path=str(tmp_path / "rows.jsonl")))
    session = _session(tiny_folder, prompt={"overlong": "drop"})
    kept, _ = usable_rows(session, samples, "data", tmp_path)
    assert type(kept) is type(samples)
    assert [sample.location for sample in kept] == ["rows.jsonl: row 2"]


def test_rows_that_are_no_prompts_are_named_together(tiny_folder, tmp_path):
    """A missing image, a strip that no processor scales, a special token, a key that the verifier
    cannot read: each with its row."""
    rows = [
        image_sample(index=0, images=(tmp_path / "none.png",)),
        image_sample(index=1),
        image_sample(index=2, images=(Image.new("RGB", (2000, 4)),)),
        text_sample(3, prompt="<|image_pad|>"),
        text_sample(4, answer="{}", answer_type=AnswerType.FUNCTION),
    ]
    with pytest.raises(ValueError) as error:
        usable_rows(_session(tiny_folder), rows, "data")
    head, *lines = str(error.value).splitlines()
    assert head == "data: 4 rows cannot be used:"
    for row, line, wanted in zip(
        (1, 3, 4, 5),
        lines,
        ("no such file", "2000 x 4 pixels", "<|image_pad|>", "which only a reward function can"),
        strict=True,
    ):
        assert line.startswith(f"rows.jsonl: row {row}: ") and wanted in line


def test_a_cold_start_row_over_the_micro_batch_is_named(tiny_folder):
    """Prompt and the longer of response and repair, against `train.micro_batch_tokens`."""
    plain = text_sample(0, rationale="it is red")
    long = text_sample(0, rationale="it is red " * 80)
    repair = text_sample(1, rationale="it is red", failed_rationale="it is blue " * 80)
    for first, share, row in ((long, 0.0, "row 1"), (plain, 0.5, "row 2")):
        values = {"sft": {"repair_share": share}, "train": {"micro_batch_tokens": 224}}
        session = _session(tiny_folder, **values)
        rows, lengths = usable_rows(session, [first, repair], "sft.data")
        wanted = rf"train.micro_batch_tokens: got 224, wanted at least \d+, .*{row}"
        with pytest.raises(ValueError, match=wanted):
            check_lengths(session, rows, lengths)
    check_lengths(_session(tiny_folder, train={"micro_batch_tokens": 4096}), rows, lengths)


@pytest.mark.parametrize("overlong", ["error", "drop"])
def test_ranks_measure_their_shares_and_agree(overlong, tiny_folder, color_rows, tmp_path):
    """Two ranks: both stop with the row's name before the first step and leave no folder, or both
    learn without it."""
    long = {"prompt": LONG.prompt, "answer": "red", "rationale": "it is red", "id": "long"}
    path = color_rows.with_name("one_long.jsonl")
    path.write_text(color_rows.read_text() + json.dumps(long))
    errors = errors_of(
        *("sft", "prompt.max_prompt_tokens=200", "prompt.system=null"),
        *(f"model.path={tiny_folder()}", f"sft.data.path={path}", f"prompt.overlong={overlong}"),
        *("sft.steps=2", "sft.batch_size=8", f"output_dir={tmp_path}", "name=run"),
        status=2 if overlong == "error" else 0,
        ranks=2,
    )
    if overlong == "error":
        assert "one_long.jsonl: row 17: the prompt has" in errors[0]
        assert not list(tmp_path.iterdir())
    else:
        assert (tmp_path / "run" / "sft.data.dropped.jsonl").is_file()
