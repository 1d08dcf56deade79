"""The cold start: held-out loss, rows without a rationale, LoRA, chat templates and tags."""

import json
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken

from care_train.cli import main
from care_train.config import DataSettings
from care_train.data import load_samples
from care_train.data.digits import digits_sample
from care_train.models.prompts import TokenText
from care_train.training.sft import response_text, sft_target, target_sequence
from care_train.verifier import format_score
from tests.train.builders import (
    encoder_of,
    image_sample,
    load,
    make_config,
    make_session,
    response_log_probs,
    text_sample,
)
from tests.train.runs import records, summary

SMALL = (
    "prompt.system=null",
    "sft.batch_size=8",
    "sft.learning_rate=3e-3",
    "logging.report_to=[]",
)


CHANGING = ("wall_seconds", "command")


def _sft(folder: Path, rows: Path, out: Path, *arguments: str) -> Path:
    done = main(
        [
            *("sft", *SMALL, f"sft.data.path={rows}", f"model.path={folder}"),
            *(f"output_dir={out}", "name=cold", *arguments),
        ]
    )
    assert done == 0
    return out / "cold"


def test_the_held_out_loss_is_that_of_the_plain_model(tiny_folder, mixed_rows, tmp_path):
    """Mean negative log-likelihood per response token, EOS included, over packs of text and images
    together; every `train.eval_every` steps and after the last; in the summary too; it falls. Packs
    are learnt as padded rows are."""
    run = _sft(
        tiny_folder(),
        mixed_rows,
        tmp_path,
        *("sft.steps=25", "train.eval_every=10", f"sft.eval_data={mixed_rows}"),
        *("train.micro_batch_size=3", "train.packing=true", "train.micro_batch_tokens=300"),
        *("prompt.max_prompt_tokens=200", "rollout.max_new_tokens=50"),
    )
    losses = {r["step"]: r["eval_loss"] for r in records(run, None) if "eval_loss" in r}
    assert list(losses) == [10, 20, 25] and losses[25] < 0.8 * losses[10]
    assert summary(run)["eval_loss"] == losses[25]
    padded = _sft(tiny_folder(), mixed_rows, tmp_path / "padded", "sft.steps=1")
    one, two = (records(folder, None)[0] for folder in (run, padded))
    for name in ("loss", "grad_norm"):
        assert one[name] == pytest.approx(two[name], rel=1e-3)
    session = make_session(run / "final", {"prompt": {"max_prompt_tokens": 2048}})
    log_probs, images = [], set()
    for sample in load_samples(DataSettings(path=str(mixed_rows))):
        (prompt,) = session.encoder.encode([sample])
        text = response_text(session.config.prompt, sample)
        sequence = target_sequence(session, prompt, "", text)
        log_probs.append(response_log_probs(session.loaded, sequence))
        images.add(0 if prompt.image_grid_thw is None else len(prompt.image_grid_thw))
    assert images == {0, 1, 2}
    assert losses[25] == pytest.approx(-float(torch.cat(log_probs).mean()), rel=1e-4)


def test_rows_without_a_rationale(tiny_folder, color_rows, tmp_path, caplog, capfd):
    """They are not learnt, which is said and lands in the summary; a held-out file of them is an
    error, not a loss of nothing. `--resume` of the run that is done writes the same summary again.
    """
    rows = [json.loads(line) for line in color_rows.read_text().splitlines()]
    bare = color_rows.with_name("bare.jsonl")
    bare.write_text(json.dumps({"prompt": "?", "answer": "red"}))
    for row in rows[:6]:
        del row["rationale"]
    partly = color_rows.with_name("partly.jsonl")
    partly.write_text("\n".join(map(json.dumps, rows)))
    summaries = []
    for more in ((), ("resume=true",)):
        held_out = (f"sft.eval_data={color_rows}", *more)
        run = _sft(tiny_folder(), partly, tmp_path, "sft.steps=1", *held_out)
        summaries.append({k: v for k, v in summary(run).items() if k not in CHANGING})
    assert summaries[0] == summaries[1] and {"loss", "eval_loss"} <= summaries[0].keys()
    assert (summaries[0]["rows"], summaries[0]["rows_without_rationale"]) == (16, 6)
    assert "6 of 16 cold-start rows have no rationale" in caplog.text
    arguments = [*SMALL, f"model.path={tiny_folder()}", f"output_dir={tmp_path}", "name=bare"]
    data = (f"sft.data.path={color_rows}", f"sft.eval_data={bare}")
    assert main(["sft", *arguments, *data]) == 2
    assert "rationale: got none in 1 rows" in capfd.readouterr().err


def _with_template(loaded, template: str):
    loaded.tokenizer.chat_template = template
    if loaded.processor is not None:
        loaded.processor.chat_template = template
    return loaded


def _published(name: str) -> str:
    """A model's own template, as TRL ships it for comparison."""
    return files("trl").joinpath("chat_templates", name).read_text()


THINKING = "{{- '<|im_start|>assistant\\n' }}"


@pytest.mark.parametrize(
    ("kind", "template", "system"),
    [
        (
            "tiny-qwen2.5-vl",
            "qwen2_5_vl.jinja",
            # Qwen2.5-VL's template has a system message where none is given.
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n",
        ),
        ("tiny-qwen3-vl", "qwen3_vl.jinja", ""),
    ],
)
def test_published_templates_end_where_the_response_begins(kind, template, system, tiny_folder):
    """Qwen2.5-VL's and Qwen3-VL Instruct's own templates: the response has both tags itself."""
    loaded = _with_template(load(tiny_folder(kind)), _published(template))
    sample = image_sample(prompt="<image>what color?")
    (prompt,) = encoder_of(loaded).encode([sample])
    text = loaded.tokenizer.decode(prompt.token_ids)
    images = "<|image_pad|>" * 4
    assert text == (
        f"{system}<|im_start|>user\n<|vision_start|>{images}<|vision_end|>what color?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("opening", ["<think>\\n", "<think>\\n\\n</think>\\n\\n"])
def test_a_template_that_begins_to_think_leaves_that_to_the_response(opening, tiny_folder):
    """Qwen3-VL Thinking's prompt ends with `<think>`; a second one would break every response, and
    after it another tag, as for Qwen3-VL Instruct, is refused."""
    plain = _published("qwen3_vl.jinja")
    thinking = plain.replace(THINKING, THINKING.replace("assistant\\n", f"assistant\\n{opening}"))
    assert thinking != plain
    prompts = []
    for template in (plain, thinking):
        loaded = _with_template(load(tiny_folder("tiny-qwen3-vl")), template)
        prompts.append(encoder_of(loaded).encode([text_sample(), image_sample()]))
    assert [p.token_ids for p in prompts[0]] == [p.token_ids for p in prompts[1]]
    with pytest.raises(ValueError, match=r"prompt.tags: got 'reasoning'.*begins every"):
        encoder_of(loaded, tags=["reasoning", "answer"])


@pytest.mark.parametrize("tag", ["think", "reasoning"])
def test_what_the_cold_start_teaches_is_what_the_verifier_wants(tag, tiny_folder):
    """Tags are shared: the learnt text is well-formed by reinforcement learning's own rule."""
    config = make_config({"prompt": {"tags": [tag, "answer"]}})
    sample = text_sample(rationale="it is red")
    prefix, response = sft_target(config, sample, step=0)
    assert prefix == "" and format_score(response, tag) == 1.0
    wrong = text_sample(rationale="it is red", failed_rationale="it is blue")
    repair = make_config({"prompt": {"tags": [tag, "answer"]}, "sft": {"repair_share": 1.0}})
    prefix, response = sft_target(repair, wrong, step=0)
    assert prefix.startswith(f"<{tag}>it is blue") and format_score(prefix + response, tag) == 1.0


def test_shares_of_rows_are_learnt_as_slips_and_repairs():
    """The same rows in every step; a row without a wrong answer of its own never slips. Repairs are
    a share of all rows, of those that slip too: a policy that slips learns to repair."""
    rows = [digits_sample(3, "train", row) for row in range(1, 201)]
    config = make_config({"sft": {"slip_share": 0.5}})
    slipped = [sft_target(config, row, 0)[1] != response_text(config.prompt, row) for row in rows]
    assert 60 < sum(slipped) < 140
    for row, slips in zip(rows, slipped, strict=True):
        response = sft_target(config, row, 7)[1]
        answer = row.columns["failed_answer"] if slips else row.answer
        rationale = row.failed_rationale if slips else row.rationale
        assert response == f"<think>{rationale}</think> <answer>{answer}</answer>"
    plain = text_sample(rationale="it is red", failed_rationale="it is blue")
    both = make_config({"sft": {"slip_share": 1.0, "repair_share": 0.3}})
    assert sft_target(make_config({"sft": {"slip_share": 1.0}}), plain, 0)[1] == response_text(
        both.prompt, plain
    )
    assert 40 < sum(sft_target(both, row, 0)[0] != "" for row in rows) < 80


def test_tags_that_are_tokens_are_learnt_as_tokens(tiny_folder, tmp_path):
    """Qwen3 has `<think>` as one token, no special one: encoded as it, and read back whole."""
    loaded = load(tiny_folder("tiny-qwen3-vl"))
    tags = [AddedToken(tag, special=False) for tag in ("<think>", "</think>")]
    loaded.tokenizer.add_tokens(tags)
    text = response_text(make_config().prompt, text_sample(rationale="it is red"))
    ids = encoder_of(loaded).encode_text(text)
    for tag in ("<think>", "</think>"):
        assert ids.count(loaded.tokenizer.convert_tokens_to_ids(tag)) == 1
    assert TokenText(loaded.tokenizer).decode(ids)[0] == text
