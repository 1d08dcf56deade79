"""care-train doctor: each check passes a sound run and catches what it is for."""

import copy
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import yaml
from PIL import Image

from care_train import cli
from care_train.config import Config, DataSettings, PromptSettings
from care_train.data import Sample, load_samples
from care_train.doctor import machine, model, parity, rows, settings
from care_train.doctor.finding import Subject, spread
from care_train.doctor.run import CHECKS, diagnose
from care_train.models.load import LoadedModel
from care_train.training.run_place import MARKER, marker_text
from tests.train.builders import image_sample, load, make_config


@pytest.fixture
def values(tiny_folder, color_rows, tmp_path) -> dict:
    """A sound run of a tiny model."""
    return {
        "output_dir": str(tmp_path / "runs"),
        "model": {"path": str(tiny_folder())},
        "prompt": {"system": PromptSettings.system, "max_prompt_tokens": 300},
        "data": {"path": str(color_rows)},
        "eval": {"data": {"path": "easy_vqa", "split": "test", "max_samples": 8}},
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


def _loaded(subject: Subject, **parts) -> Subject:
    return replace(subject, loaded=replace(subject.model, **parts))


def _copied(subject: Subject) -> tuple[Subject, LoadedModel]:
    """A model of its own to break; the session's tiny models are shared."""
    own = copy.deepcopy(subject.model)
    return replace(subject, loaded=own), own


def test_a_sound_run_is_all_ok(config):
    """Every check says ok on a clean tiny configuration."""
    findings = diagnose(config, ranks=1)
    assert [f for f in findings if f.level != "ok"] == []
    assert [f.name for f in findings] == list(CHECKS)


def test_missing_and_untested_packages(subject, monkeypatch):
    """A missing package is an error, one outside the tested range a warning."""
    monkeypatch.setattr(machine, "installed", lambda name: None)
    finding = machine.check_versions(subject)
    assert finding.level == "error" and "deepspeed" in finding.message
    assert "pip install" in finding.fix
    monkeypatch.setattr(machine, "installed", lambda name: "0.0.1")
    finding = machine.check_versions(subject)
    assert finding.level == "warning" and "torch 0.0.1, tested" in finding.message


def test_what_this_machine_cannot_run(subject):
    """flash_attention_2 and Liger's kernels without a GPU: why, and what is used instead."""
    asked = {"attention": "flash_attention_2", "liger": True}
    finding = machine.check_devices(_with(subject, model=asked))
    assert finding.level == "warning" and "no GPU; sdpa is used" in finding.message
    assert "model.liger cannot run" in finding.message
    assert "model.attention=sdpa" in finding.fix and "model.liger=false" in finding.fix


def test_a_full_disk(subject, monkeypatch):
    """Too little space for the checkpoints is an error, little to spare a warning."""
    monkeypatch.setattr(machine, "free_bytes", lambda folder: 1000)
    finding = machine.check_disk(subject)
    assert finding.level == "error" and "output_dir" in finding.fix
    needed = _disk_need(subject)
    monkeypatch.setattr(machine, "free_bytes", lambda folder: int(1.1 * needed))
    assert machine.check_disk(subject).level == "warning"


def _disk_need(subject: Subject) -> float:
    # fp32: weights, two moments, and final/.
    return (4 + 8 + 4) * sum(p.numel() for p in subject.model.model.parameters())


def test_a_run_folder_that_is_taken_or_closed(subject, monkeypatch):
    """A run of that name, and a folder that cannot be written, are errors."""
    subject.run_dir.mkdir(parents=True)
    (subject.run_dir / "config.yaml").write_text("")
    finding = machine.check_run_folder(subject)
    assert finding.level == "error" and "overwrite=true" in finding.message
    finding = machine.check_run_folder(_changed(subject, overwrite=True))
    assert finding.level == "error" and "did not make it" in finding.message
    (subject.run_dir / MARKER).write_text(marker_text("x"))
    assert machine.check_run_folder(_changed(subject, overwrite=True)).level == "ok"

    def refuse(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(machine.tempfile, "TemporaryFile", refuse)
    finding = machine.check_run_folder(_changed(subject, name="other"))
    assert finding.level == "error" and "Permission denied" in finding.message


def _changed(subject: Subject, **fields) -> Subject:
    return replace(subject, config=replace(subject.config, **fields))


def test_limits_of_the_system(subject, monkeypatch):
    """Few open files and a small /dev/shm are warnings with the command that helps."""
    monkeypatch.setattr(machine.resource, "getrlimit", lambda _: (256, 4096))
    finding = machine.check_open_files(subject)
    assert finding.level == "warning" and "ulimit -n 4096" in finding.fix
    small = SimpleNamespace(total=64 * 2**20)
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda _: small)
    finding = machine.check_shared_memory(replace(subject, ranks=2))
    assert finding.level == "warning" and "shm-size" in finding.fix


def test_prompts_that_do_not_divide(subject):
    """prompts_per_step over ranks and mini-batches; the fix is a number that works."""
    finding = settings.check_batches(replace(subject, ranks=3))
    assert finding.level == "error" and "train.prompts_per_step=3" in finding.fix
    finding = settings.check_batches(_with(subject, train={"prompts_per_step": 32}))
    assert finding.level == "warning" and "16 rows" in finding.message


def test_too_much_memory(subject, monkeypatch):
    """A predicted peak over the device's memory refers to the plan."""
    small = replace(settings.this_device(), memory=1e6)
    monkeypatch.setattr(settings, "this_device", lambda: small)
    finding = settings.check_memory(subject)
    assert finding.level == "warning" and "care-train plan" in finding.fix


def test_tags_nobody_asks_for(subject):
    """A prompt that names no tags is a warning."""
    finding = settings.check_prompt(_with(subject, prompt={"system": None}))
    assert finding.level == "warning" and "<answer>" in finding.message


def test_an_unreadable_image(subject, tmp_path):
    """An image that is missing or damaged names its row."""
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    bad = image_sample(images=(broken,), location="rows.jsonl: row 7")
    findings = _run(replace(subject, samples=[*subject.samples[:3], bad]), "training rows")
    assert findings.level == "error" and "rows.jsonl: row 7" in findings.message


def test_a_prompt_that_is_too_long(subject):
    """A row over prompt.max_prompt_tokens is an error before the run, not in it."""
    finding = _run(_with(subject, prompt={"max_prompt_tokens": 10}), "training rows")
    assert finding.level == "error" and "max_prompt_tokens" in finding.message


def _run(subject: Subject, name: str):
    """A check as `diagnose` runs it: an exception is an error finding."""
    from care_train.doctor.run import guarded

    return guarded(name, lambda: CHECKS[name](subject))


def test_evaluation_on_the_training_rows(subject):
    """The same rows in data and eval.data are a warning; none at all an error."""
    data = subject.config.data
    same = _with(subject, eval={"data": data})
    assert rows.check_evaluation_rows(same).level == "warning"
    gone = _with(subject, eval={"data": replace(data, path="nowhere.jsonl")})
    assert _run(gone, "evaluation rows").level == "error"


@pytest.mark.parametrize("answer", ["4</answer> or 5", "<think>4"])
def test_keys_that_cannot_score(subject, answer):
    """Tags inside an answer make its own key wrong: an error naming the row."""
    bad = Sample(id="b", prompt="?", answer=answer, location="rows.jsonl: row 3")
    finding = rows.check_rewards(replace(subject, samples=[bad]))
    assert finding.level == "error" and "rows.jsonl: row 3" in finding.message


def test_rewards_that_take_long(subject, monkeypatch):
    """Slow scoring is a warning."""
    monkeypatch.setattr(rows, "_MAX_REWARD_SECONDS", 0.0)
    assert rows.check_rewards(subject).level == "warning"


def test_tags_that_are_special_tokens(subject):
    """A tag that is a special token has no text, so its spans would never be found."""
    broken, own = _copied(subject)
    own.tokenizer.add_special_tokens({"additional_special_tokens": ["<answer>"]})
    finding = model.check_tags(broken)
    assert finding.level == "error" and "special token" in finding.message


def test_equal_tag_names(subject):
    """think and answer of one name are an error of the checks that use them."""
    same = _with(subject, prompt={"think_tag": "answer"})
    assert _run(same, "rewards").level == "error"
    assert _run(same, "tags").level == "error"


def test_a_wrong_image_token_id(subject):
    """The model looks for another placeholder than the processor writes."""
    broken, own = _copied(subject)
    own.model.config.image_token_id = own.model.config.video_token_id
    finding = model.check_special_ids(broken)
    assert finding.level == "error" and "image_token_id" in finding.message
    assert _run(broken, "image tokens").level == "error"


def test_ids_beyond_the_embeddings(subject):
    """A tokenizer larger than the model, and an EOS id that does not exist."""
    broken, own = _copied(subject)
    own.model.generation_config.eos_token_id = 10**6
    finding = model.check_special_ids(broken)
    assert finding.level == "error" and "EOS" in finding.message
    own.tokenizer.add_tokens([f"new{i}" for i in range(50)])
    assert "embeddings" in model.check_special_ids(broken).message


def test_an_eos_that_does_not_end_the_turn(subject):
    """Generation and chat format that end differently are a warning."""
    broken, own = _copied(subject)
    own.model.generation_config.eos_token_id = 0
    assert model.check_special_ids(broken).level == "warning"


def test_a_processor_of_another_model(subject):
    """Merge sizes that differ give another number of image tokens than features."""
    broken, own = _copied(subject)
    own.processor.image_processor.merge_size = 1
    finding = model.check_image_tokens(broken)
    assert finding.level == "error" and "merge" in finding.message


def test_an_expansion_that_differs(subject, monkeypatch):
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

    finding = model.check_image_tokens(_loaded(broken, processor=Shifted()))
    assert finding.level == "error" and "prompt tokens" in finding.message


_CONTENT = "{% for message in messages %}{{ message.content }}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "level", "message"),
    [
        ("{{ messages[0].content }}", "error", "drops \"doctor's question"),
        (_CONTENT + "{% if add_generation_prompt %}<think>{% endif %}", "error", "start inside"),
        (_CONTENT, "warning", "no turn"),
        ("{% if %}", "error", "TemplateSyntaxError"),
    ],
)
def test_chat_templates_that_spoil_prompts(subject, template, level, message):
    """A lost question, an opened think tag, no turn, and a template that is none."""
    broken, own = _copied(subject)
    own.processor.chat_template = template
    finding = _run(broken, "chat template")
    assert finding.level == level and message in finding.message


def test_a_generation_config_that_bends_rollouts(subject):
    """Keys that the engine does not set itself would leak into rollouts."""
    broken, own = _copied(subject)
    own.model.generation_config.suppress_tokens = [5]
    finding = model.check_generation_config(broken)
    assert finding.level == "warning" and "suppress_tokens" in finding.message
    own.model.generation_config.suppress_tokens = None
    own.model.generation_config.repetition_penalty = 1.05
    finding = model.check_generation_config(broken)
    assert finding.level == "ok" and "repetition_penalty" in finding.message


def test_an_engine_that_samples_another_policy(subject, monkeypatch):
    """Completions of another model are an error naming token and row."""
    trained, own = _copied(subject)
    _sharpen(own)
    other, stale = _copied(trained)
    with torch.no_grad():
        head = stale.model.get_output_embeddings().weight
        head.copy_(head.roll(7, 0))
    engine = parity._rollout_engine
    assert parity.check_parity(trained).level == "ok"
    monkeypatch.setattr(parity, "_rollout_engine", lambda s, encoder: engine(other, encoder))
    finding = parity.check_parity(trained)
    assert finding.level == "error" and "rows.jsonl: row" in finding.message


def test_log_probs_that_an_engine_returns_are_compared(subject, monkeypatch):
    """Where the engine keeps log-probs, they are what the trainer's are held against."""
    engine = parity._rollout_engine

    class Claims:
        """Says that every token was certain."""

        def __init__(self, inner) -> None:
            self._inner = inner

        def generate(self, requests, sampling):
            found = self._inner.generate(requests, sampling)
            return [replace(c, log_probs=(0.0,) * len(c.token_ids)) for c in found]

    monkeypatch.setattr(parity, "_rollout_engine", lambda s, encoder: Claims(engine(s, encoder)))
    finding = parity.check_parity(subject)
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


def test_samples_are_spread_over_all():
    """A few rows stand for the whole file."""
    images = [image_sample(index=i) for i in range(10)]
    assert [s.id for s in spread(images, 2)] == ["sample/0", "sample/5"]
    assert spread(images, 20) == images
    assert isinstance(images[0].images[0], Image.Image)
