"""care-train doctor: each check passes a sound run and catches what it is for."""

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import yaml
from deepspeed.git_version_info import installed_ops

from care_train import cli
from care_train.config import Config, DataSettings, PromptSettings, VllmSettings
from care_train.data import Sample, load_samples
from care_train.data.answers import AnswerType
from care_train.doctor import Subject, machine, model
from care_train.doctor.run import CHECKS, diagnose, guarded
from care_train.models.load import LoadedModel
from care_train.planning.workload import Device
from care_train.training.run_folder import MARKER, marker_text
from care_train.training.session import Session
from tests.train.builders import image_sample, load, make_config


@pytest.fixture
def values(tiny_folder, color_rows, tmp_path) -> dict:
    """A sound run of a tiny model."""
    return {
        "output_dir": str(tmp_path / "runs"),
        "model": {"path": str(tiny_folder())},
        "prompt": {"system": PromptSettings.system, "max_prompt_tokens": 300},
        "data": {"path": str(color_rows)},
        "eval": {"data": "easy_vqa@test", "max_samples": 8},
    }


@pytest.fixture
def config(values) -> Config:
    return make_config(values)


@pytest.fixture
def subject(config, color_rows, tiny_folder) -> Subject:
    samples = load_samples(DataSettings(path=str(color_rows)))
    return Subject(config, ranks=1, loaded=load(tiny_folder()), samples=samples)


def _with(subject: Subject, **changes) -> Subject:
    """The same with other settings; a mapping changes keys of a section."""
    config = subject.config
    for name, value in changes.items():
        value = replace(getattr(config, name), **value) if isinstance(value, dict) else value
        config = replace(config, **{name: value})
    return replace(subject, config=config)


def _rows(subject: Subject, *rows: Sample) -> Subject:
    return replace(subject, samples=list(rows))


# As under `preset: official`.
BOXED = {"system": None, "suffix": "<think> \\boxed{}", "tags": ("think", "boxed")}


def _answer(subject: Subject, answer: str, options: tuple[str, ...] = (), **more: Any) -> Subject:
    place = "rows.jsonl: row 3"
    row = Sample(id="b", prompt="?", answer=answer, options=options, location=place)
    return _rows(subject, replace(row, **more))


def _damaged(change: Callable[[LoadedModel], object]) -> Callable[[Subject], Subject]:
    """A model of its own to break; the session's tiny models are shared."""

    def spoil(subject: Subject) -> Subject:
        own = copy.deepcopy(subject.model)
        change(own)
        return replace(subject, loaded=own)

    return spoil


def _check(subject: Subject, name: str, level: str, *words: str) -> None:
    """Run a check as `diagnose` does, which turns an exception into an error; its finding must have
    the level and all of the words."""
    finding = guarded(name, lambda: CHECKS[name](subject))
    assert finding is not None and (finding.name, finding.level) == (name, level), finding
    assert [one for one in words if one not in finding.message + finding.fix] == [], finding


def test_a_sound_run_is_all_ok(config):
    """Every check says ok on a clean tiny configuration."""
    findings = diagnose(config, ranks=1)
    assert [f for f in findings if f.level != "ok"] == []
    assert [f.name for f in findings] == list(CHECKS)


def test_what_this_machine_cannot_run(subject):
    """flash_attention_2 and Liger's kernels without a GPU: why, and what is used instead."""
    asked = {"attention": "flash_attention_2", "liger": True}
    words = ("no GPU; sdpa is used", "model.liger cannot run")
    fixes = ("model.attention=sdpa", "model.liger=false")
    _check(_with(subject, model=asked), "devices", "warning", *words, *fixes)


def test_offload_without_a_compiler(subject, monkeypatch):
    """DeepSpeed would find out once the model is loaded; torch's AdamW needs none."""
    monkeypatch.setenv("CXX", "no-such-compiler")
    zero = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
    offload = _with(subject, deepspeed={"zero_stage": 3, "config": zero})
    _check(offload, "devices", "error", "no-such-compiler")
    monkeypatch.setitem(installed_ops, "cpu_adam", True)  # As DS_BUILD_CPU_ADAM=1 does.
    _check(offload, "devices", "ok")
    monkeypatch.setitem(installed_ops, "cpu_adam", False)
    other = {"config": zero | {"zero_force_ds_cpu_optimizer": False}}
    _check(_with(offload, deepspeed=other), "devices", "ok")
    monkeypatch.setenv("CXX", "env c++")  # As with ccache in front.
    _check(offload, "devices", "ok")


def test_a_run_folder_that_is_taken_or_closed(subject, monkeypatch):
    """A run of that name, and a folder that cannot be written, are errors."""
    run_dir = Path(subject.config.output_dir) / subject.config.name
    run_dir.mkdir(parents=True)
    (run_dir / "config.yaml").write_text("")
    _check(subject, "run folder", "error", "overwrite=true")
    again = _with(subject, overwrite=True)
    _check(again, "run folder", "error", "did not make it")
    (run_dir / MARKER).write_text(marker_text("x"))
    _check(again, "run folder", "ok")
    refused = Mock(side_effect=PermissionError(13, "Permission denied"))
    monkeypatch.setattr(machine.tempfile, "TemporaryFile", refused)
    _check(_with(subject, name="other"), "run folder", "error", "Permission denied")


def _special_tag(own):
    own.tokenizer.add_special_tokens({"additional_special_tokens": ["<answer>"]})


def _other_image_token(own):
    own.model.config.image_token_id = own.model.config.video_token_id


def _merges_less(own):
    own.processor.image_processor.merge_size = 1


def _expands_more(own):
    """A processor that adds a token behind every prompt."""
    inner = type(own.processor).__call__

    def call(self, **inputs):
        output = inner(self, **inputs)
        output["input_ids"] = [[*ids, 20] for ids in output["input_ids"]]
        return output

    own.processor.__class__ = type("Shifted", (type(own.processor),), {"__call__": call})


def _generates(**values):
    return lambda own: [setattr(own.model.generation_config, *item) for item in values.items()]


def _template(text):
    return lambda own: setattr(own.processor, "chat_template", text)


def _two_gpus(server):
    """For one copy of vLLM's weights, in process or in a server."""
    return {"engine": "vllm", "vllm": VllmSettings(server=server, tensor_parallel_size=2)}


_CONTENT = "{% for message in messages %}{{ message.content }}{% endfor %}"


def _begins_to_think(own):
    """As Qwen3-VL Thinking's template; the trainer leaves the tag to the response."""
    own.processor.chat_template += "{{ '<think>\\n' if add_generation_prompt }}"


SPOILED = [
    ("batches", lambda s: replace(s, ranks=3), "error", "train.prompts_per_step=3"),
    ("batches", lambda s: _with(s, train={"prompts_per_step": 32}), "warning", "16 rows"),
    ("batches", lambda s: _with(s, rollout=_two_gpus(None)), "error", "does not divide 1 ranks"),
    ("batches", lambda s: _with(s, rollout=_two_gpus("http://gpu1:8000")), "ok", "per rank"),
    ("prompt", lambda s: _with(s, prompt={"system": None}), "warning", "<answer>"),
    ("prompt", lambda s: _with(s, prompt=BOXED), "ok", "names <think> and \\boxed"),
    ("prompt", lambda s: _answer(s, "B", ("owl", "crow")), "warning", "row 3: the key is 'B'"),
    ("prompt", lambda s: _answer(s, "crow", ("owl", "crow")), "ok", "names"),
    (
        "prompt",
        lambda s: _answer(s, "4", prompt="\\boxed{}!"),
        "warning",
        "row 3: asks for \\boxed",
    ),
    ("training rows", lambda s: _with(s, prompt={"max_prompt_tokens": 10}), "error", "_tokens"),
    ("evaluation rows", lambda s: _with(s, eval={"data": s.config.data.path}), "warning", "seen"),
    ("evaluation rows", lambda s: _with(s, eval={"data": "no.jsonl"}), "error", "no.jsonl"),
    ("evaluation rows", lambda s: _with(s, eval={"data": None}), "warning", "is not evaluated"),
    ("rewards", lambda s: _answer(s, "4</answer> or 5"), "error", "rows.jsonl: row 3"),
    ("rewards", lambda s: _answer(s, "<think>4"), "error", "rows.jsonl: row 3"),
    ("rewards", lambda s: _answer(s, "['a', 'b']"), "ok", "keys score 1"),
    ("rewards", lambda s: _with(s, prompt=BOXED), "ok", "keys score 1"),
    (
        "rewards",
        lambda s: _answer(s, "{}", answer_type=AnswerType.FUNCTION),
        "error",
        "rows.jsonl: row 3",
    ),
    ("tags", _damaged(_special_tag), "error", "special token"),
    ("special ids", _damaged(_other_image_token), "error", "image_token_id"),
    ("special ids", _damaged(_generates(eos_token_id=10**6)), "error", "EOS"),
    ("special ids", _damaged(_generates(eos_token_id=0)), "warning", "EOS"),
    ("image tokens", _damaged(_merges_less), "error", "merge"),
    ("image tokens", _damaged(_expands_more), "error", "prompt tokens"),
    ("image tokens", _damaged(_begins_to_think), "ok", "however expanded"),
    ("image tokens", lambda s: _with(s, prompt=BOXED), "ok", "however expanded"),
    (
        "chat template",
        _damaged(_template("{{ messages[0].content }}")),
        "error",
        "drops \"doctor's",
    ),
    ("chat template", _damaged(_begins_to_think), "ok", "<think> is left to the responses"),
    (
        "chat template",
        lambda s: _with(_damaged(_begins_to_think)(s), prompt={"tags": ("reasoning", "answer")}),
        "error",
        "begins every response with <think>",
    ),
    ("chat template", _damaged(_template(_CONTENT)), "warning", "no turn"),
    ("chat template", _damaged(_template("{% if %}")), "error", "TemplateSyntaxError"),
    ("generation config", _damaged(_generates(suppress_tokens=[5])), "warning", "suppress_tokens"),
    (
        "generation config",
        _damaged(_generates(repetition_penalty=1.05)),
        "ok",
        "repetition_penalty",
    ),
]
"""The check, what spoils the run, the finding's level and words of it."""


@pytest.mark.parametrize(("name", "spoil", "level", "words"), SPOILED)
def test_spoiled_settings_rows_and_models(name, spoil, level, words, subject):
    """Each is found by its check, which names the setting, the row or what is wrong in the model:
    tokenizer, processor, template and generation config against what training needs."""
    _check(spoil(subject), name, level, words)


def test_an_unreadable_image(subject, tmp_path):
    """An image that is missing or damaged names its row."""
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    bad = image_sample(images=(broken,), location="rows.jsonl: row 7")
    spoiled = _rows(subject, *subject.samples[:3], bad)
    _check(spoiled, "training rows", "error", "rows.jsonl: row 7")


def _free(share: float):
    """So much of what the checkpoints need: in fp32 weights, two moments, and final/."""
    return lambda s: 16 * share * sum(p.numel() for p in s.model.model.parameters())


MACHINES = [
    ("versions", "machine.installed", None, "error", "pip install"),
    ("versions", "machine.installed", "0.0.1", "warning", "torch 0.0.1, tested"),
    ("disk", "machine.free_bytes", _free(0.01), "error", "output_dir"),
    ("disk", "machine.free_bytes", _free(1.1), "warning", "output_dir"),
    ("open files", "machine.resource.getrlimit", (256, 4096), "warning", "ulimit -n 4096"),
    (
        "shared memory",
        *("machine.shutil.disk_usage", SimpleNamespace(total=64 * 2**20), "warning", "shm-size"),
    ),
    ("memory", "machine.this_device", Device("CPU", 1e6, True), "warning", "care-train plan"),
]
"""The check, what answers in place of the machine and how, the finding's level and words of it."""


@pytest.mark.parametrize(("name", "asked", "answer", "level", "words"), MACHINES)
def test_a_machine_that_lacks_something(name, asked, answer, level, words, subject, monkeypatch):
    """Packages, disk, limits of the system and memory: each with the command or key that helps."""
    found = answer(subject) if callable(answer) else answer
    monkeypatch.setattr(f"care_train.doctor.{asked}", lambda *_: found)
    _check(replace(subject, ranks=2), name, level, words)


def test_a_run_of_a_server_needs_no_vllm_without_gpus(subject, monkeypatch):
    """One with a vLLM of its own does."""
    found = machine.installed
    monkeypatch.setattr(machine, "installed", lambda name: None if "vllm" in name else found(name))
    own, served = ({"engine": "vllm", "vllm": VllmSettings(server=s)} for s in (None, "http://x"))
    assert "vllm" not in machine.check_versions(_with(subject, rollout=served)).message
    assert "vllm" in machine.check_versions(_with(subject, rollout=own)).message


def test_rewards_that_take_long(subject, monkeypatch):
    """Slow scoring is a warning."""
    monkeypatch.setattr("care_train.doctor.data._MAX_REWARD_SECONDS", 0.0)
    _check(subject, "rewards", "warning")


def test_ranks_that_share_a_vllm_are_no_obstacle(subject, monkeypatch):
    """The doctor is one process, whatever the run's are."""
    monkeypatch.setattr(Session, "rollout_engine", lambda self, *_: self.config.rollout.vllm)
    vllm = replace(subject.config.rollout.vllm, tensor_parallel_size=2)
    shared = _with(subject, rollout={"engine": "vllm", "vllm": vllm})
    assert model._rollout_engine(shared, Mock()) == subject.config.rollout.vllm


def _sharpen(own):
    """From nearly uniform to decided."""
    with torch.no_grad():
        own.model.get_output_embeddings().weight.mul_(100)


def _rolled(own):
    with torch.no_grad():
        head = own.model.get_output_embeddings().weight
        head.copy_(head.roll(7, 0))


def test_an_engine_that_samples_another_policy(subject, monkeypatch):
    """Completions of another model are an error naming token and row; so are the log-probs of an
    engine that keeps them, here one that says every token was certain."""
    trained = _damaged(_sharpen)(subject)
    other = _damaged(_rolled)(trained)
    engine = model._rollout_engine
    _check(trained, "log-prob parity", "ok")
    monkeypatch.setattr(model, "_rollout_engine", lambda s, encoder: engine(other, encoder))
    _check(trained, "log-prob parity", "error", "rows.jsonl: row")

    class Certain:
        def __init__(self, subject, encoder) -> None:
            self._inner = engine(subject, encoder)

        def generate(self, requests, sampling):
            found = self._inner.generate(requests, sampling)
            return [replace(c, log_probs=(0.0,) * len(c.token_ids)) for c in found]

    monkeypatch.setattr(model, "_rollout_engine", Certain)
    _check(subject, "log-prob parity", "error", "differ by")


@pytest.mark.parametrize(
    ("section", "others"),
    [("model", {"versions", "run folder", "rewards"}), ("data", {"versions", "tags"})],
)
def test_what_is_missing_is_one_error(section, others, values):
    """Without a model or rows the checks that need them say nothing more; the others still run."""
    findings = diagnose(make_config(values | {section: {"path": "nowhere.jsonl"}}), ranks=1)
    assert [f.name for f in findings if f.level == "error"] == [section]
    assert others <= {f.name for f in findings}


def test_a_broken_check_is_a_finding(subject, monkeypatch):
    """What a check raises becomes an error with the exception's text."""
    monkeypatch.setitem(CHECKS, "tags", lambda _: {}["gone"])
    _check(subject, "tags", "error", "KeyError")


def test_the_command_exits_with_one_on_errors(values, tmp_path, capsys):
    """`care-train doctor` prints a line per check, `--json` the same as one object."""
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(values | {"train": {"prompts_per_step": 4}}))
    assert cli.main(["doctor", "--config", str(path), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert printed["error"] == 0 and len(printed["findings"]) == len(CHECKS)
    assert cli.main(["doctor", "--config", str(path), "model.path=nowhere"]) == 1
    shown = capsys.readouterr().out
    assert "error" in shown and "fix:" in shown
