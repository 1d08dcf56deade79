"""Text alone, one image and several images in one batch, through the trainer."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from care_train.cli import main
from care_train.config import DataSettings
from care_train.data import load_samples
from care_train.training.sft import response_text, target_sequence
from tests.train.builders import full_log_probs, load, make_session
from tests.train.runs import records

KINDS = ("tiny-qwen2.5-vl", "tiny-qwen3-vl")

SMALL = (
    *("prompt.system=null", "prompt.max_prompt_tokens=512", "eval.greedy=false"),
    *("logging.report_to=[]", "logging.progress=false", "logging.samples_every=1"),
)


@pytest.fixture(scope="module")
def mixed_rows(tmp_path_factory) -> Path:
    """Two rows of text, two of an image, two of two images of other sizes, in turn."""
    folder = tmp_path_factory.mktemp("mixed_rows")
    rows = []
    for number, color in enumerate(("red", "green")):
        sizes = ((64, 64), (96, 64))
        for which, size in enumerate(sizes):
            Image.new("RGB", size, color).save(folder / f"{number}_{which}.png")
        first, second = (f"{number}_{which}.png" for which in (0, 1))
        asked = {"answer": color, "rationale": f"the image is {color}"}
        rows += [
            {"prompt": f"is the image {color}?"} | asked,
            {"prompt": "what color is the image?", "images": [first]} | asked,
            {"prompt": "<image> what color is <image> the image?", "images": [first, second]}
            | asked,
        ]
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module", params=KINDS)
def cold(request, mixed_rows, tiny_folder, tmp_path_factory) -> tuple[str, Path]:
    """(kind, run) of a cold start each of whose steps has all six rows in one micro-batch."""
    out = tmp_path_factory.mktemp("mixed_cold")
    own = ("sft.steps=30", "sft.batch_size=6", "sft.learning_rate=5e-3", "sft.warmup_steps=0")
    arguments = (f"sft.data.path={mixed_rows}", f"model.path={tiny_folder(request.param)}")
    assert main(["sft", *SMALL, *own, *arguments, f"output_dir={out}", "name=cold"]) == 0
    return request.param, out / "cold"


def test_a_cold_start_step_of_mixed_rows(cold, mixed_rows, tiny_folder):
    """The first step's loss is that of the plain model on each row alone, and it falls."""
    kind, run = cold
    session = make_session(tiny_folder(kind), {"prompt": {"max_prompt_tokens": 512}})
    total, tokens, images = 0.0, 0, []
    for sample in load_samples(DataSettings(path=str(mixed_rows))):
        (prompt,) = session.encoder.encode([sample])
        sequence = target_sequence(
            session, prompt, "", response_text(session.config.prompt, sample)
        )
        inputs = {}
        if prompt.image_grid_thw is not None:
            image_id = session.loaded.image_token_id
            marks = [[int(token == image_id) for token in sequence.token_ids]]
            inputs = {"pixel_values": prompt.pixel_values, "image_grid_thw": prompt.image_grid_thw}
            inputs["mm_token_type_ids"] = torch.tensor(marks)
        images.append(0 if prompt.image_grid_thw is None else len(prompt.image_grid_thw))
        rows = full_log_probs(session.loaded, sequence.token_ids, inputs)
        places = range(sequence.response_start - 1, len(sequence.token_ids) - 1)
        own = [rows[p, t] for p, t in zip(places, sequence.response_ids, strict=True)]
        total, tokens = total - float(sum(own)), tokens + len(own)
    assert images == [0, 1, 2] * 2
    losses = [record["loss"] for record in records(run, "sft")]
    assert losses[0] == pytest.approx(total / tokens, rel=1e-4)
    assert losses[-1] < 0.3 * losses[0]


def test_a_reinforcement_step_of_mixed_rows(cold, mixed_rows, tmp_path):
    """One batch of CARE over all six rows: every group is sampled and trained on, old and new
    policy agree in the first step, and the weights change, the vision tower's too."""
    _, run = cold
    own = ("train.steps=2", "train.prompts_per_step=6", "train.learning_rate=1e-3")
    own += ("train.warmup_steps=0", "rollout.group_size=4", "rollout.max_new_tokens=24")
    # Half of each group is right, whatever was said: none is skipped.
    reward = tmp_path / "reward.py"
    code = "def half(completions, **rest):\n    return [i % 2 for i, _ in enumerate(completions)]\n"
    reward.write_text(code)
    own += (f"reward.functions=[{{function: '{reward}:half'}}]",)
    paths = [f"data.path={mixed_rows}", f"eval.data={mixed_rows}"]
    arguments = [*SMALL, *own, *paths, f"model.path={run / 'final'}"]
    assert main(["train", *arguments, f"output_dir={tmp_path}", "name=care"]) == 0
    first = records(tmp_path / "care")[0]
    assert (first["groups"], first["groups_skipped"]) == (6, 0)
    assert first["sampled_sequences"] == 30 and first["trained_sequences"] >= 18
    assert abs(first["kl"]) < 1e-6 and first["clipped_low"] == first["clipped_high"] == 0
    folders = (run / "final", tmp_path / "care" / "final")
    before, after = (dict(load(folder).model.named_parameters()) for folder in folders)
    changed = {name for name, weight in before.items() if not torch.equal(weight, after[name])}
    assert any("visual" in name for name in changed)
    assert any("language_model" in name for name in changed)
