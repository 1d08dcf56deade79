"""care-train doctor: each check passes a sound run and catches what it is for."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from care_train import cli
from care_train.config import Config, DataSettings, PromptSettings
from care_train.data import Sample, load_samples
from care_train.doctor import Finding, Subject, data, machine, model
from care_train.doctor.run import CHECKS, diagnose, guarded
from care_train.models.load import LoadedModel
from care_train.planning.workload import Device
from care_train.training.run_folder import MARKER, marker_text
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


def _with(subject: Subject, **sections) -> Subject:
    """The same with other settings in some sections."""
    changed = {
        name: replace(getattr(subject.config, name), **fields) for name, fields in sections.items()
    }
    return replace(subject, config=replace(subject.config, **changed))


def _copied(subject: Subject) -> tuple[Subject, LoadedModel]:
    """A model of its own to break; the session's tiny models are shared."""
    own = copy.deepcopy(subject.model)
    return replace(subject, loaded=own), own


def _run(subject: Subject, name: str) -> Finding:
    """A check as `diagnose` runs it: an exception is an error finding."""
    finding = guarded(name, lambda: CHECKS[name](subject))
    assert finding is not None and finding.name == name
    return finding


def test_a_sound_run_is_all_ok(config):
    """Every check says ok on a clean tiny configuration."""
    findings = diagnose(config, ranks=1)
    assert [f for f in findings if f.level != "ok"] == []
    assert [f.name for f in findings] == list(CHECKS)


def test_what_this_machine_cannot_run(subject):
    """flash_attention_2 and Liger's kernels without a GPU: why, and what is used instead."""
    asked = {"attention": "flash_attention_2", "liger": True}
    finding = machine.check_devices(_with(subject, model=asked))
    assert finding.level == "warning" and "no GPU; sdpa is used" in finding.message
    assert "model.liger cannot run" in finding.message
    assert "model.attention=sdpa" in finding.fix and "model.liger=false" in finding.fix


def test_a_run_folder_that_is_taken_or_closed(subject, monkeypatch):
    """A run of that name, and a folder that cannot be written, are errors."""
    run_dir = Path(subject.config.output_dir) / subject.config.name
    run_dir.mkdir(parents=True)
    (run_dir / "config.yaml").write_text("")
    finding = machine.check_run_folder(subject)
    assert finding.level == "error" and "overwrite=true" in finding.message
    finding = machine.check_run_folder(_changed(subject, overwrite=True))
    assert finding.level == "error" and "did not make it" in finding.message
    (run_dir / MARKER).write_text(marker_text("x"))
    assert machine.check_run_folder(_changed(subject, overwrite=True)).level == "ok"

    def refuse(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(machine.tempfile, "TemporaryFile", refuse)
    finding = machine.check_run_folder(_changed(subject, name="other"))
    assert finding.level == "error" and "Permission denied" in finding.message


def _changed(subject: Subject, **fields) -> Subject:
    return replace(subject, config=replace(subject.config, **fields))


def _other_rows(subject: Subject, *samples: Sample) -> Subject:
    return replace(subject, samples=list(samples))


def _held_out(subject: Subject, path: str) -> Subject:
    return _with(subject, eval={"data": path})


def _row(answer: str) -> Sample:
    return Sample(id="b", prompt="?", answer=answer, location="rows.jsonl: row 3")


SPOILED = [
    ("batches", lambda s: replace(s, ranks=3), "error", "train.prompts_per_step=3"),
    ("batches", lambda s: _with(s, train={"prompts_per_step": 32}), "warning", "16 rows"),
    ("prompt", lambda s: _with(s, prompt={"system": None}), "warning", "<answer>"),
    (
        "training rows",
        lambda s: _with(s, prompt={"max_prompt_tokens": 10}),
        "error",
        "max_prompt_tokens",
    ),
    ("evaluation rows", lambda s: _held_out(s, s.config.data.path), "warning", "seen rows"),
    ("evaluation rows", lambda s: _held_out(s, "nowhere.jsonl"), "error", "nowhere.jsonl"),
    ("evaluation rows", lambda s: _with(s, eval={"data": None}), "warning", "is not evaluated"),
    ("rewards", lambda s: _other_rows(s, _row("4</answer> or 5")), "error", "rows.jsonl: row 3"),
    ("rewards", lambda s: _other_rows(s, _row("<think>4")), "error", "rows.jsonl: row 3"),
    ("rewards", lambda s: _with(s, prompt={"think_tag": "answer"}), "error", ""),
    ("tags", lambda s: _with(s, prompt={"think_tag": "answer"}), "error", "share the tag <answer>"),
]
"""The check, what spoils the run, the finding's level and words of it."""


@pytest.mark.parametrize(("name", "spoil", "level", "words"), SPOILED)
def test_spoiled_settings_and_rows(name, spoil, level, words, subject):
    """Each is found by its check, which names the setting or the row."""
    finding = _run(spoil(subject), name)
    assert finding.level == level and words in finding.message + finding.fix


def test_an_unreadable_image(subject, tmp_path):
    """An image that is missing or damaged names its row."""
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    bad = image_sample(images=(broken,), location="rows.jsonl: row 7")
    finding = _run(_other_rows(subject, *subject.samples[:3], bad), "training rows")
    assert finding.level == "error" and "rows.jsonl: row 7" in finding.message


def _free(share: float):
    """So much of what the checkpoints need: in fp32 weights, two moments, and final/."""
    return lambda s: 16 * share * sum(p.numel() for p in s.model.model.parameters())


MACHINES = [
    ("versions", "machine.installed", None, "error", "deepspeed"),
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
    finding = _run(replace(subject, ranks=2), name)
    assert finding.level == level and words in finding.message + finding.fix


def test_rewards_that_take_long(subject, monkeypatch):
    """Slow scoring is a warning."""
    monkeypatch.setattr(data, "_MAX_REWARD_SECONDS", 0.0)
    assert data.check_rewards(subject).level == "warning"


def _special_tag(own):
    own.tokenizer.add_special_tokens({"additional_special_tokens": ["<answer>"]})


def _other_image_token(own):
    own.model.config.image_token_id = own.model.config.video_token_id


def _generates(**values):
    return lambda own: [setattr(own.model.generation_config, *item) for item in values.items()]


def _merges_less(own):
    own.processor.image_processor.merge_size = 1


def _template(text):
    return lambda own: setattr(own.processor, "chat_template", text)


_CONTENT = "{% for message in messages %}{{ message.content }}{% endfor %}"
_OPENED = _CONTENT + "{% if add_generation_prompt %}<think>{% endif %}"

BROKEN = [
    ("tags", _special_tag, "error", "special token"),
    ("special ids", _other_image_token, "error", "image_token_id"),
    ("image tokens", _other_image_token, "error", "image tokens"),
    ("special ids", _generates(eos_token_id=10**6), "error", "EOS"),
    ("special ids", _generates(eos_token_id=0), "warning", "EOS"),
    ("image tokens", _merges_less, "error", "merge"),
    ("chat template", _template("{{ messages[0].content }}"), "error", "drops \"doctor's question"),
    ("chat template", _template(_OPENED), "error", "start inside"),
    ("chat template", _template(_CONTENT), "warning", "no turn"),
    ("chat template", _template("{% if %}"), "error", "TemplateSyntaxError"),
    ("generation config", _generates(suppress_tokens=[5]), "warning", "suppress_tokens"),
    ("generation config", _generates(repetition_penalty=1.05), "ok", "repetition_penalty"),
]
"""The check, what damages the model, the finding's level and words of it."""


@pytest.mark.parametrize(("name", "damage", "level", "words"), BROKEN)
def test_a_broken_model(name, damage, level, words, subject):
    """Tokenizer, processor, template and generation config against what training needs."""
    broken, own = _copied(subject)
    damage(own)
    finding = _run(broken, name)
    assert finding.level == level and words in finding.message


def test_an_expansion_that_differs(subject):
    """A processor that expands an image to other tokens than its grid says."""
    broken, own = _copied(subject)
    inner = own.processor

    class Shifted:
        """Adds a token behind every prompt."""

        def __getattr__(self, name):
            return getattr(inner, name)

        def __call__(self, **inputs):
            output = inner(**inputs)
            output["input_ids"] = [[*ids, 20] for ids in output["input_ids"]]
            return output

    shifted = replace(broken, loaded=replace(own, processor=Shifted()))
    finding = _run(shifted, "image tokens")
    assert finding.level == "error" and "prompt tokens" in finding.message


def test_an_engine_that_samples_another_policy(subject, monkeypatch):
    """Completions of another model are an error naming token and row."""
    trained, own = _copied(subject)
    _sharpen(own)
    other, stale = _copied(trained)
    with torch.no_grad():
        head = stale.model.get_output_embeddings().weight
        head.copy_(head.roll(7, 0))
    engine = model._rollout_engine
    assert model.check_parity(trained).level == "ok"
    monkeypatch.setattr(model, "_rollout_engine", lambda s, encoder: engine(other, encoder))
    finding = model.check_parity(trained)
    assert finding.level == "error" and "rows.jsonl: row" in finding.message


def test_log_probs_that_an_engine_returns_are_compared(subject, monkeypatch):
    """Where the engine keeps log-probs, they are what the trainer's are held against."""
    engine = model._rollout_engine

    class Claims:
        """Says that every token was certain."""

        def __init__(self, inner) -> None:
            self._inner = inner

        def generate(self, requests, sampling):
            found = self._inner.generate(requests, sampling)
            return [replace(c, log_probs=(0.0,) * len(c.token_ids)) for c in found]

    monkeypatch.setattr(model, "_rollout_engine", lambda s, encoder: Claims(engine(s, encoder)))
    finding = model.check_parity(subject)
    assert finding.level == "error" and "differ by" in finding.message


def _sharpen(loaded: LoadedModel) -> None:
    """From nearly uniform to decided."""
    with torch.no_grad():
        loaded.model.get_output_embeddings().weight.mul_(100)


def test_a_missing_model_is_one_error(config, values):
    """Without a model the checks that need it say nothing more; the others still run."""
    findings = diagnose(make_config(values | {"model": {"path": "nowhere"}}), ranks=1)
    errors = [f for f in findings if f.level == "error"]
    assert [f.name for f in errors] == ["model"]
    assert {"versions", "run folder", "rewards"} <= {f.name for f in findings}


def test_unreadable_data_is_one_error(values):
    """Without rows the model is still checked."""
    findings = diagnose(make_config(values | {"data": {"path": "nowhere.jsonl"}}), ranks=1)
    assert [f.name for f in findings if f.level == "error"] == ["data"]
    assert "tags" in {f.name for f in findings}


def test_a_broken_check_is_a_finding(subject, monkeypatch):
    """What a check raises becomes an error with the exception's text."""
    monkeypatch.setitem(CHECKS, "tags", lambda _: {}["gone"])
    finding = _run(subject, "tags")
    assert finding.level == "error" and "KeyError" in finding.message


def test_the_command_exits_with_one_on_errors(values, tmp_path, capsys):
    """`care-train doctor` prints a line per check, `--json` the same as one object."""
    path = tmp_path / "c.yaml"
    sound = make_config(values)
    path.write_text(yaml.safe_dump(values | {"train": {"prompts_per_step": 4}}))
    assert sound.name and cli.main(["doctor", "--config", str(path), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert printed["error"] == 0 and len(printed["findings"]) == len(CHECKS)
    assert cli.main(["doctor", "--config", str(path), "model.path=nowhere"]) == 1
    shown = capsys.readouterr().out
    assert "error" in shown and "fix:" in shown
