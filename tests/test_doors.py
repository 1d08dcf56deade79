"""A script as a new user would write it, for each way in: one small task, trained to a gain.

All but the notebook begin with the same cold-started tiny model, which names an image's colour in
part of its samples. `python -m bench.trl_curves` compares the trainers; here each has to learn.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from datasets import Dataset, load_dataset
from PIL import Image

from care_train import CareConfig, CareTrainer
from tests.conftest import COLORS
from tests.wheels import install_wheel

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
GAIN = 0.15
"""At least; one standard error of an accuracy over 64 questions is 0.06."""
SETTINGS: dict[str, Any] = {
    "prompt": {"system": None},
    "rollout": {"group_size": 8, "max_new_tokens": 24},
    "sft": {"steps": 25, "batch_size": 8, "learning_rate": 3e-3, "warmup_steps": 0},
    "train": {"steps": 40, "prompts_per_step": 8, "learning_rate": 4e-4, "warmup_steps": 0},
    "eval": {"greedy": False},
    "logging": {"progress": False, "report_to": []},
}


def in_answer(completions: list, answer: list[str], **columns: Any) -> list[float]:
    """1.0 where the text between the answer tags is the row's answer."""
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    found = [text.rpartition("<answer>")[2].partition("</answer>")[0].strip() for text in texts]
    return [float(text == key) for text, key in zip(found, answer, strict=True)]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 images as files, a JSONL line each."""
    folder, lines = tmp_path_factory.mktemp("rows"), []
    for index in range(64):
        color = COLORS[index % len(COLORS)]
        Image.new("RGB", (56, 56), color).save(folder / f"{index}.png")
        row = {"prompt": "what color is the image?", "answer": color, "images": [f"{index}.png"]}
        lines.append(json.dumps(row | {"rationale": f"the image is {color}"}) + "\n")
    (folder / "rows.jsonl").write_text("".join(lines))
    return folder / "rows.jsonl"


@pytest.fixture(scope="module")
def start(rows: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The model that all of them train."""
    config = CareConfig(output_dir=str(tmp_path_factory.mktemp("start")), **SETTINGS)
    trainer = CareTrainer("tiny-qwen2.5-vl", config=config)
    trainer.cold_start(read(rows))
    return trainer.config.model.path


def read(rows: Path) -> list[dict[str, Any]]:
    """The lines, with the images opened."""
    found = [json.loads(line) for line in rows.read_text().splitlines()]
    return [row | {"images": [Image.open(rows.parent / row["images"][0])]} for row in found]


def command_line(rows: Path, start: str, folder: Path) -> list[str]:
    """The arguments of `care-train` for a configuration file that a user wrote."""
    config = {**SETTINGS, "eval": {"greedy": False, "data": str(rows)}}
    config |= {"data": {"path": str(rows)}, "model": {"path": start}}
    (folder / "mine.yaml").write_text(json.dumps(config))
    return ["train", "--config", "mine.yaml", "name=mine"]


def check_summary(summary: dict[str, Any]) -> None:
    assert summary["accuracy_after"] > summary["accuracy_before"] + GAIN, summary


def test_the_command_line(rows: Path, start: str, tmp_path: Path) -> None:
    """`care-train train` on rows and a model of the user's."""
    command = [sys.executable, "-m", "care_train", *command_line(rows, start, tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run(command, cwd=tmp_path, env=environment, check=True)
    check_summary(json.loads((tmp_path / "runs/mine/summary.json").read_text()))


def test_the_wheel_in_an_empty_folder(rows: Path, start: str, tmp_path: Path) -> None:
    """The same, by the installed package alone."""
    site, empty = install_wheel(tmp_path), tmp_path / "empty"
    empty.mkdir()
    arguments = command_line(rows, start, empty)
    environment = os.environ | {"PYTHONPATH": str(site)}
    command = [sys.executable, "-m", "care_train", *arguments]
    subprocess.run(command, cwd=empty, env=environment, check=True)
    assert (site / "care_train" / "configs" / "care.yaml").is_file()
    check_summary(json.loads((empty / "runs/mine/summary.json").read_text()))


def test_python(rows: Path, start: str, tmp_path: Path) -> None:
    """`CareTrainer` on a `Dataset` with a callable as reward."""
    trainer = CareTrainer(
        start,
        in_answer,
        CareConfig(output_dir=str(tmp_path), **SETTINGS),
        train_dataset=Dataset.from_list(read(rows)),
        eval_dataset=read(rows),
    )
    check_summary(trainer.train())


def test_trl(rows: Path, start: str, tmp_path: Path) -> None:
    """`CareGRPOTrainer` in the place of `GRPOTrainer`; the gain is in the rewards that TRL logs."""
    trl = pytest.importorskip("trl", reason="trl is not installed: pip install 'trl>=1.16,<1.17'")
    from care_train.integrations.trl import CareGRPOTrainer

    data = load_dataset("json", data_files=str(rows), split="train", cache_dir=str(tmp_path))
    images = [[Image.open(rows.parent / name) for name in names] for names in data["images"]]
    prompts = [[{"role": "user", "content": prompt}] for prompt in data["prompt"]]
    columns = {"prompt": prompts, "images": images, "answer": data["answer"]}
    from transformers import AutoProcessor

    trainer = CareGRPOTrainer(
        model=start,
        reward_funcs=in_answer,
        args=trl.GRPOConfig(
            output_dir=str(tmp_path),
            use_cpu=True,
            bf16=False,
            per_device_train_batch_size=64,
            num_generations=8,
            max_completion_length=24,
            max_steps=40,
            learning_rate=4e-4,
            lr_scheduler_type="constant",
            epsilon_high=0.28,
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_dict(columns),
        processing_class=AutoProcessor.from_pretrained(start, padding_side="left"),
    )
    trainer.train()
    rewards = [log["reward"] for log in trainer.state.log_history if "reward" in log]
    assert fmean(rewards[-5:]) > fmean(rewards[:5]) + GAIN, rewards


def test_a_notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`examples/quickstart.ipynb` as it is, from weights that know nothing: better than a guess."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    monkeypatch.delenv("STEPS", raising=False)
    notebook = nbformat.read(ROOT / "examples" / "quickstart.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, resources={"metadata": {"path": tmp_path}}).execute()
    summary = json.loads((tmp_path / "runs/colors/summary.json").read_text())
    assert summary["accuracy_after"] > 1 / len(COLORS) + GAIN, summary
