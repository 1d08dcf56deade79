"""A script as a new user would write it, for each way in, trained to a gain on strips of digits.

All begin with the quickstart's cold start, which knows the digits and slips on most strips, and
train on `digits-2` for a few steps. `python -m bench.trl_curves` compares the trainers; here each
has to learn.
"""

import io
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
from care_train.config import CareSettings, ReflectionSettings
from care_train.data.digits import digits_sample
from tests.test_commands import install_wheel

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
STEPS, PROMPTS, QUESTIONS = 12, 32, 256
GAIN = 0.08
"""At least; one standard error of an accuracy over 256 questions is 0.03."""
CUE = "that was wrong, look again:"
CREDIT: dict[str, Any] = {"credit": "departure", "anchor": "all", "rescue": 0}
"""configs/care_plus.yaml's, as in the quickstart."""
SETTINGS: dict[str, Any] = {
    "prompt": {"system": None, "max_prompt_tokens": 128},
    "rollout": {"group_size": 8, "max_new_tokens": 56},
    "care": CREDIT | {"reflection": {"cue": CUE}},
    "train": {
        "steps": STEPS,
        "prompts_per_step": PROMPTS,
        "learning_rate": 2e-4,
        "warmup_steps": 0,
        "max_grad_norm": 0.2,
    },
    "eval": {"also": [], "max_samples": QUESTIONS},
    "logging": {"report_to": []},
}


def in_answer(completions: list, answer: list[str], **columns: Any) -> list[float]:
    """1.0 where the text between the answer tags is the row's answer."""
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    found = [text.rpartition("<answer>")[2].partition("</answer>")[0].strip() for text in texts]
    return [float(text == key) for text, key in zip(found, answer, strict=True)]


def digits(split: str, count: int) -> list[dict[str, Any]]:
    """Rows with PIL images."""
    samples = [digits_sample(2, split, number) for number in range(1, count + 1)]
    images = [Image.open(io.BytesIO(sample.images[0])) for sample in samples]
    return [
        {"prompt": sample.prompt, "answer": sample.answer, "images": [image]}
        for sample, image in zip(samples, images, strict=True)
    ]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSONL line for each row and its image in a file."""
    folder, lines = tmp_path_factory.mktemp("rows"), []
    for number, row in enumerate(digits("train", STEPS * PROMPTS)):
        row["images"][0].save(folder / f"{number}.png")
        lines.append(json.dumps(row | {"images": [f"{number}.png"]}) + "\n")
    (folder / "rows.jsonl").write_text("".join(lines))
    return folder / "rows.jsonl"


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The model that all of them train: the quickstart's, after its cold start.

    Our own trainer does not run beside verl: there `COLD_START` names one made elsewhere.
    """
    if made := os.environ.get("COLD_START"):
        return made
    folder = str(tmp_path_factory.mktemp("start"))
    trainer = CareTrainer(config=CareConfig("quickstart", output_dir=folder))
    trainer.cold_start()
    return trainer.config.model.path


def check_summary(summary: dict[str, Any]) -> None:
    assert summary["accuracy_after"] > summary["accuracy_before"] + GAIN, summary


def check_steps(accuracy: list[float]) -> None:
    """Accuracy of each step's rollouts; most is learnt in the first."""
    assert len(accuracy) == STEPS
    assert fmean(accuracy[-4:]) > fmean(accuracy[:2]) + GAIN, accuracy


def test_the_command_line(rows: Path, start: str, tmp_path: Path) -> None:
    """`care-train train` of the installed wheel, in a folder that holds the user's configuration
    alone, on rows and a model of theirs."""
    site, folder = install_wheel(tmp_path), tmp_path / "mine"
    folder.mkdir()
    config = SETTINGS | {"eval": SETTINGS["eval"] | {"data": "digits-2@test"}}
    config |= {"data": {"path": str(rows)}, "model": {"path": start}}
    (folder / "mine.yaml").write_text(json.dumps(config))
    command = [sys.executable, "-m", "care_train", "train", "--config", "mine.yaml", "name=mine"]
    environment = os.environ | {"PYTHONPATH": str(site)}
    subprocess.run(command, cwd=folder, env=environment, check=True)
    check_summary(json.loads((folder / "runs/mine/summary.json").read_text()))


def test_python(start: str, tmp_path: Path) -> None:
    """`CareTrainer` on a `Dataset` with a callable as reward."""
    trainer = CareTrainer(
        start,
        in_answer,
        CareConfig(output_dir=str(tmp_path), **SETTINGS),
        train_dataset=Dataset.from_list(digits("train", STEPS * PROMPTS)),
        eval_dataset=digits("test", QUESTIONS),
    )
    check_summary(trainer.train())


def test_trl(rows: Path, start: str, tmp_path: Path) -> None:
    """`CareGRPOTrainer` in the place of `GRPOTrainer`; the gain is in the rewards that TRL logs."""
    trl = pytest.importorskip("trl", reason="trl is not installed: pip install 'trl>=1.16,<1.17'")
    from transformers import AutoProcessor

    from care_train.integrations.trl import CareGRPOTrainer

    data = load_dataset("json", data_files=str(rows), split="train", cache_dir=str(tmp_path))
    images = [[Image.open(rows.parent / name) for name in names] for names in data["images"]]
    prompts = [[{"role": "user", "content": prompt}] for prompt in data["prompt"]]
    columns = {"prompt": prompts, "images": images, "answer": data["answer"]}
    trainer = CareGRPOTrainer(
        model=start,
        reward_funcs=in_answer,
        args=trl.GRPOConfig(
            output_dir=str(tmp_path),
            use_cpu=True,
            bf16=False,
            per_device_train_batch_size=8 * PROMPTS,
            num_generations=8,
            max_completion_length=56,
            max_steps=STEPS,
            learning_rate=2e-4,
            lr_scheduler_type="constant",
            max_grad_norm=0.2,
            epsilon_high=0.28,
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_dict(columns),
        processing_class=AutoProcessor.from_pretrained(start, padding_side="left"),
        care=CareSettings(**CREDIT, reflection=ReflectionSettings(cue=CUE)),
    )
    trainer.train()
    check_steps([log["reward"] for log in trainer.state.log_history if "reward" in log])


REWARD = """
def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    answer = solution_str.rpartition("<answer>")[2].partition("</answer>")[0]
    return float(answer.strip() == ground_truth)
"""


def test_verl(rows: Path, start: str, tmp_path: Path) -> None:
    """The command of docs/verl.md on a CPU: verl's own loop and engine, transformers' sampling."""
    pytest.importorskip("verl", reason="verl is not installed: docs/verl.md")
    lines = [json.loads(line) for line in rows.read_text().splitlines()]
    data = [
        {
            "data_source": "digits",
            "prompt": [{"role": "user", "content": "<image>" + line["prompt"]}],
            "images": [str(rows.parent / line["images"][0])],
            "reward_model": {"style": "rule", "ground_truth": line["answer"]},
            "extra_info": {"index": number},
        }
        for number, line in enumerate(lines)
    ]
    Dataset.from_list(data).to_parquet(tmp_path / "train.parquet")
    (tmp_path / "reward.py").write_text(REWARD)
    modules = "tests.integrations.verl_cpu,care_train.integrations.verl"
    environment = os.environ | {"VERL_USE_EXTERNAL_MODULES": modules}
    script = [sys.executable, "-m", "tests.integrations.verl_run", start, str(STEPS)]
    subprocess.run([*script, str(tmp_path)], cwd=ROOT, env=environment, check=True)
    check_steps(json.loads((tmp_path / "accuracy.json").read_text()))
