"""`CareTrainer`: a run on a program's own rows, reward functions and callbacks, in its process."""

import gc
import signal
import sys
import threading
from functools import partial
from pathlib import Path

import pytest
import transformers
from datasets import Dataset, DatasetDict
from PIL import Image

from care_train import CareConfig, CareTrainer
from care_train.config import Config
from care_train.verifier.function_process import RewardFunction
from tests.conftest import COLORS
from tests.train.runs import records, run_ranks

SMALL = {
    "prompt": {"system": None},
    "rollout": {"group_size": 4, "max_new_tokens": 12},
    "train": {"steps": 2, "prompts_per_step": 4, "micro_batch_size": 8, "warmup_steps": 0},
    "eval": {"also": []},
    "limits": {"empty_steps": None},
    "logging": {"report_to": [], "samples_every": 0},
}


def color_rows(count: int = 8) -> list[dict]:
    return [
        {
            "prompt": "what color is the image?",
            "answer": COLORS[i % len(COLORS)],
            "images": [Image.new("RGB", (56, 56), COLORS[i % len(COLORS)])],
            "rationale": f"the image is {COLORS[i % len(COLORS)]}",
        }
        for i in range(count)
    ]


def named(completions, answer, log_metric, **columns):
    """1.0 where a response names the answer; TRL's form, columns as lists."""
    log_metric("columns", len(columns))
    return [float(key in text) for text, key in zip(completions, answer, strict=True)]


class Record(transformers.TrainerCallback):
    def __init__(self, stop_after: int = 99) -> None:
        self.events: list[tuple] = []
        self.frozen = 0
        self.stop_after = stop_after

    def on_train_begin(self, args, state, control, **_):
        assert isinstance(args, Config) and state.max_steps == args.train.steps
        self.events.append(("begin", state.global_step))

    def on_step_end(self, args, state, control, model, **_):
        assert model.num_parameters() > 0
        self.events.append(("step", state.global_step))
        self.frozen = gc.get_freeze_count()
        control.should_training_stop = state.global_step >= self.stop_after

    def on_log(self, args, state, control, logs, **_):
        assert "reward" in logs

    def on_evaluate(self, args, state, control, metrics, **_):
        self.events.append(("evaluate", state.global_step, "accuracy" in metrics))

    def on_save(self, args, state, control, **_):
        self.events.append(("save", state.global_step))

    def on_train_end(self, args, state, control, model, **_):
        assert all(p.numel() for p in model.parameters()), "the weights were freed"
        self.events.append(("end", state.global_step))


def make(folder: Path, model: Path, *, name: str = "run", rows=None, **arguments) -> CareTrainer:
    return CareTrainer(
        **{
            "model": str(model),
            "reward_funcs": named,
            "config": CareConfig(name=name, output_dir=str(folder), **SMALL),
            "train_dataset": Dataset.from_list(color_rows()) if rows is None else rows,
        }
        | arguments
    )


def test_a_program_trains_evaluates_and_saves(tiny_folder, tmp_path):
    """Rows of a Dataset, a callable as reward, callbacks; then the folder transformers loads."""
    record = Record()
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)]
    trainer = make(tmp_path, tiny_folder(), eval_dataset=color_rows(4), callbacks=[record, Record])
    summary = trainer.train()
    assert (summary["steps"], summary["num_questions"]) == (2, 4)
    assert "command" not in summary
    assert record.events == [
        *(("begin", 0), ("evaluate", 0, True), ("step", 1), ("step", 2), ("save", 2)),
        *(("evaluate", 2, True), ("end", 2)),
    ]
    steps = records(trainer.run_dir)
    assert all(0 <= step["reward_named_mean"] <= 1 for step in steps) and len(steps) == 2
    assert all(step["reward_named_columns_mean"] >= 3 for step in steps)
    assert record.frozen > 100_000 > gc.get_freeze_count(), "what collections have to look at"
    scores = trainer.evaluate()
    assert (scores["accuracy"], scores["num_questions"]) == (summary["accuracy_after"], 4)
    trainer.save_model(tmp_path / "mine")
    transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "mine")
    with pytest.raises(ValueError, match=r"save_model: .*mine exists"):
        trainer.save_model(tmp_path / "mine")
    assert [
        signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)
    ] == handlers
    assert "care-guard" not in {thread.name for thread in threading.enumerate()}


def test_errors_leave_the_process_usable(tiny_folder, tmp_path):
    """Bad settings, rows and rewards are ValueErrors that say what is wrong; the next run works."""
    with pytest.raises(ValueError, match=r"unknown key 'train\.step'; did you mean 'train\.steps'"):
        CareConfig(train={"step": 3})
    with pytest.raises(ValueError, match=r"train_dataset: row 2: answer: got the columns"):
        make(tmp_path, tiny_folder(), rows=[*color_rows(1), {"prompt": "?"}]).train()
    with pytest.raises(ValueError, match=r"train_dataset: got a DatasetDict.* one of train"):
        make(tmp_path, tiny_folder(), rows=DatasetDict(train=Dataset.from_list([]))).train()

    def broken(completions, **_):
        return [1.0]

    def raises(completions, **_):
        raise KeyError("mine")

    def hangs(completions, **_):
        while True:
            pass

    with pytest.raises(ValueError, match="python:broken: got 1 results, wanted a list of"):
        make(tmp_path, tiny_folder(), name="a", reward_funcs=broken).train()
    with pytest.raises(KeyError, match="mine"):
        make(tmp_path, tiny_folder(), name="b", reward_funcs=raises).train()
    limit = {"functions": [{"function": "python:hangs", "timeout": 0.2}]}
    config = CareConfig(name="c", output_dir=str(tmp_path), reward=limit, **SMALL)
    with pytest.raises(ValueError, match=r"python:hangs: .*got nothing in 0\.2 s"):
        make(tmp_path, tiny_folder(), config=config, reward_funcs=hangs).train()
    with pytest.raises(ValueError, match="reward_funcs: got two called python:named"):
        make(tmp_path, tiny_folder(), reward_funcs=[named, named])
    with pytest.raises(ValueError, match="eval_dataset"):
        make(tmp_path, tiny_folder()).evaluate()
    assert make(tmp_path, tiny_folder(), name="good").train()["steps"] == 2


def test_a_reward_without_a_time_limit_is_said(caplog):
    """The limit is an alarm, which only the main thread has: elsewhere a warning names the way."""
    settings = CareConfig(reward={"functions": [{"function": "python:named"}]}).reward.functions[0]
    make_one = partial(RewardFunction, settings, {"python:named": named})
    make_one()
    assert not caplog.records
    thread = threading.Thread(target=make_one)
    thread.start()
    thread.join()
    assert "python:named has no time limit" in caplog.text


def test_a_callback_stops_and_resume_goes_on(tiny_folder, tmp_path):
    """`should_training_stop` ends with `final/`; `train(resume=True)` makes the steps left."""
    trainer = make(tmp_path, tiny_folder(), callbacks=[Record(stop_after=1)])
    assert trainer.train()["steps"] == 1
    assert (trainer.run_dir / "final" / "model.safetensors").is_file()
    with pytest.raises(ValueError, match="already holds a run"):
        trainer.train()
    record = Record()
    assert make(tmp_path, tiny_folder(), callbacks=[record]).train(resume=True)["steps"] == 2
    assert record.events[:2] == [("begin", 1), ("step", 2)]


def test_ranks_of_a_launcher_run_one_script(tiny_folder, tmp_path):
    """Two ranks agree on what a callback of theirs asks, and write one model."""
    run_ranks("tests.test_trainer", tmp_path, tiny_folder(), ranks=2)


def one_rank(folder: Path, model: Path) -> None:
    """What each rank of the test above runs."""
    record = Record(stop_after=1)
    trainer = make(folder, model, callbacks=[record])
    summary = trainer.train()
    assert summary["steps"] == 1, summary
    assert record.events == [("begin", 0), ("step", 1), ("save", 1), ("end", 1)], record.events
    trainer.save_model(folder / "mine")
    assert (folder / "mine" / "model.safetensors").is_file()


def test_a_cold_start_comes_first(tmp_path):
    """Rows with a rationale teach the tags; training then begins with what was learnt. Callbacks
    are told of the training alone, though the cold start saves checkpoints too."""
    settings = SMALL | {"sft": {"steps": 2}, "train": SMALL["train"] | {"save_every": 1}}
    config = CareConfig(name="run", output_dir=str(tmp_path), **settings)
    record = Record()
    model = Path("tiny-qwen2.5-vl")
    trainer = make(tmp_path, model, config=config, callbacks=[record])
    assert trainer.cold_start(color_rows())["steps"] == 2
    assert record.events == []
    assert trainer.config.model.path == str(tmp_path / "run-cold-start" / "final")
    assert trainer.train()["steps"] == 2
    assert record.events.count(("save", 1)) == 1


def test_settings_of_a_program_and_of_the_command_line_are_the_same():
    """A shipped file by its name, values laid over it, Table 5's of the algorithm below."""
    config = CareConfig("care", seed=3, train={"steps": 7})
    assert (config.seed, config.train.steps, config.algorithm) == (3, 7, "care")
    assert config.train.prompts_per_step == CareConfig("care").train.prompts_per_step
    assert CareConfig(algorithm="dapo").loss.clip_eps_high == 0.28
    assert CareConfig(algorithm="dapo", loss={"kl_coef": 0.5}).loss.clip_eps_high == 0.28
    with pytest.raises(ValueError, match=r"wanted a YAML file or one of .*care_official"):
        CareConfig("caer")


if __name__ == "__main__":
    one_rank(*map(Path, sys.argv[1:]))
