"""Models and data by their Hub ids, and a trained model uploaded, against a Hub made here."""

import shutil
from pathlib import Path

import datasets
import pytest
import yaml
from huggingface_hub import constants

from care_train import CareConfig, CareTrainer, distributed, hub
from care_train.config import build_config, source_of
from care_train.data import load_samples
from care_train.models.load import load_model
from care_train.planning.workload import read_architecture
from care_train.publishing import claim, model_card, publish
from care_train.training import run_folder
from tests.data.published import load, write_jsonl
from tests.hub_server import Hub, Repository, contents, running_hub
from tests.train.runs import SMALL, python

FILE = "/{repo_id}/resolve/{revision}/{filename}"


@pytest.fixture
def local_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_folder):
    """A Hub with a model and a data set of two splits, a cache of its own, this process online."""
    rows = tmp_path / "rows"
    rows.mkdir()
    for split, count in (("train", 8), ("test", 4)):
        lines = [{"prompt": f"what is {i} and one?", "answer": f"{i + 1}"} for i in range(count)]
        write_jsonl(rows / f"{split}.jsonl", lines)
    splits = [{"split": name, "path": f"{name}.jsonl"} for name in ("train", "test")]
    card = {"configs": [{"config_name": "sums", "data_files": splits}]}
    (rows / "README.md").write_text(f"---\n{yaml.safe_dump(card)}---\n")
    with running_hub() as server:
        model = contents(tiny_folder("tiny-qwen2")) | {
            "pytorch_model.bin": b"pickle",
            "modeling.py": b"raise SystemExit",
            "original/model.safetensors": b"again",
        }
        server.repositories["models/acme/tiny"] = Repository(model)
        server.repositories["datasets/acme/sums"] = Repository(contents(rows))
        for name, value in {
            "HF_ENDPOINT": server.endpoint,
            "HF_HOME": str(tmp_path / "home"),
            "HF_TOKEN": server.token,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
        }.items():
            monkeypatch.setenv(name, value)  # for processes that are started
        for name, value in {
            "ENDPOINT": server.endpoint,
            "HF_HUB_CACHE": str(tmp_path / "home" / "hub"),
            "HUGGINGFACE_CO_URL_TEMPLATE": f"{server.endpoint}{FILE}",
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
        }.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "home" / "datasets")
        yield server


def test_a_model_is_fetched_once_and_then_found_offline(local_hub: Hub, monkeypatch):
    """Weights, configuration and tokenizer alone, for a plan without weights; never code or
    pickled weights."""
    assert read_architecture("acme/tiny").num_parameters > 0
    assert not any("safetensors" in request for request in local_hub.requests)
    folder = hub.model_folder("acme/tiny@v1")
    names = {path.name for path in folder.rglob("*") if path.is_file()}
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= names
    assert not names & {"pytorch_model.bin", "modeling.py"} and not (folder / "original").exists()
    config = build_config({"model": {"path": "acme/tiny@v1"}})
    assert load_model(config.model, folder).model.num_parameters() > 0
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    local_hub.requests.clear()
    assert hub.model_folder("acme/tiny@v1") == folder
    assert local_hub.requests == []
    with pytest.raises(ValueError, match=r"acme/other: not in the cache .*hub") as error:
        hub.model_folder("acme/other")
    assert "`hf download acme/other`" in str(error.value)
    assert "HF_HUB_OFFLINE is set" in str(error.value)


def test_what_is_on_this_disk_comes_first(local_hub: Hub, tmp_path, monkeypatch):
    """A folder of an id's name is the model, a file's name that is not there no id."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "acme" / "tiny").mkdir(parents=True)
    assert hub.model_folder("acme/tiny") == Path("acme/tiny")
    assert hub.model_folder("runs/a/final") == Path("runs/a/final")
    with pytest.raises(ValueError, match=r"rows/trian\.jsonl does not exist"):
        load("rows/trian.jsonl")
    assert local_hub.requests == []


def test_errors_say_what_to_do(local_hub: Hub, monkeypatch):
    """A name that nobody has, a revision that is none, terms to accept, a private repository."""
    local_hub.repositories["models/acme/tiny"].is_gated = True
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(
        ValueError, match=r"model\.path: acme/tiny: .*accept the terms on http.*HF_TOKEN"
    ):
        hub.model_folder("acme/tiny")
    monkeypatch.setenv("HF_TOKEN", local_hub.token)
    assert hub.model_folder("acme/tiny").is_dir()
    with pytest.raises(ValueError, match="acme/tiny@v9: no such revision"):
        hub.model_folder("acme/tiny@v9")
    for path, message in {
        "acme/nothing": "data.path: acme/nothing: no path here, and no dataset on",
        "acme/sums@dev": "data.path: acme/sums: got no split 'dev', wanted one of",
        "acme/sums:other": "acme/sums:other: the datasets library cannot read it: ",
    }.items():
        with pytest.raises(ValueError, match=message):
            load(path)


def test_data_sets_name_configuration_split_and_revision(local_hub: Hub, monkeypatch):
    """Training reads `train`, the held-out rows of the same set `test`; then offline."""
    assert source_of("acme/sums:sums@train#v1") == ("acme/sums:sums", "train", "v1")
    rows = load("acme/sums:sums@train#v1")
    assert (len(rows), rows[7].answer, rows[0].location) == (8, "8", "acme/sums@train: row 1")
    config = build_config({"data": {"path": "acme/sums@train"}, "eval": {"data": "@test"}})
    held_out = load_samples(config.held_out, 0, "eval.data")
    assert [row.answer for row in held_out] == ["1", "2", "3", "4"]
    assert len(load("acme/sums@test")) == 4
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert len(load("acme/sums")) == 8


def test_uploads_say_what_is_missing(local_hub: Hub, tmp_path, monkeypatch):
    """Without a token the run ends before it begins; a failed upload keeps `final/`."""
    config = build_config({"hub": {"push_to": "acme/mine"}, "name": "run"})
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(ValueError, match=r"hub\.push_to: acme/mine: .*HF_TOKEN"):
        claim(config)
    (tmp_path / "final").mkdir()
    with pytest.raises(ValueError, match="final is whole: `hf upload acme/mine"):
        publish(tmp_path, config, {"steps": 2})
    with pytest.raises(ValueError, match=r"hub\.push_to"):
        build_config({"hub": {"push_to": "mine"}})


def test_a_program_uploads_what_it_trained(local_hub: Hub, tiny_folder, tmp_path, monkeypatch):
    """`push_to_hub`: once trained, and by rank 0 alone; every rank gets the commit's address."""
    trainer = CareTrainer(config=CareConfig(name="run", output_dir=str(tmp_path)))
    with pytest.raises(ValueError, match="train first"):
        trainer.push_to_hub("acme/mine")
    final = shutil.copytree(tiny_folder("tiny-qwen2"), tmp_path / "run" / "final")
    (tmp_path / "run" / "summary.json").write_text('{"steps": 1}')
    address = trainer.push_to_hub("acme/mine", private=False)
    uploaded = local_hub.repositories["models/acme/mine"]
    assert uploaded.files == contents(final) and not uploaded.is_private
    local_hub.requests.clear()
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    monkeypatch.setattr(run_folder, "of_first_rank", lambda _: (address, None))
    assert trainer.push_to_hub("acme/mine") == address and local_hub.requests == []


def test_a_card_shows_no_folder_of_the_machine(tmp_path):
    """What decides the training stays, files by their names; where a run lay is left out."""
    config = build_config(
        {
            "model": {"path": f"{tmp_path}/secret/base"},
            "data": {"path": "/home/me/my rows/train.jsonl"},
            "prompt": {"suffix": "say </think> or <answer>a/b</answer>"},
            "reward": {"functions": [{"function": "~/rewards.py:right"}]},
            "output_dir": "/scratch/me/runs",
            "train": {"steps": 7},
        }
    )
    command = (
        "care-train train --config /home/me/care.yaml data.path=/home/me/train.jsonl "
        "'sft.data={path: /home/me/cold.jsonl}' model.path=acme/base"
    )
    card = model_card(config, {"steps": 7, "command": command})
    for private in ("/home", "scratch", "secret", "~", "output_dir", str(tmp_path)):
        assert private not in card, card
    for shown in (
        "steps: 7",
        "path: base\n",
        "function: rewards.py:right",
        "say </think> or <answer>a/b</answer>",
        "train --config care.yaml data.path=train.jsonl 'sft.data={path: cold.jsonl}'",
        "model.path=acme/base",
    ):
        assert shown in card, card


def test_a_run_goes_from_the_hub_to_the_hub(local_hub: Hub, tmp_path):
    """`care-train train` on ids, uploaded with a card that says what it is made of."""
    # A process of its own: huggingface_hub reads its environment once, and the card sys.argv.
    command = (
        *("train", *SMALL, "model.path=acme/tiny", "data.path=acme/sums@train", "eval.data=@test"),
        *("train.steps=1", "rollout.max_new_tokens=8", f"output_dir={tmp_path}", "name=run"),
        "hub.push_to=acme/mine",
    )
    python("-m", "care_train", *command)
    uploaded = local_hub.repositories["models/acme/mine"]
    assert uploaded.is_private
    assert uploaded.files == contents(tmp_path / "run" / "final")
    _, metadata, text = uploaded.files["README.md"].decode().split("---", 2)
    card = yaml.safe_load(metadata)
    assert (card["base_model"], card["datasets"]) == ("acme/tiny", ["acme/sums"])
    for shown in ("| Accuracy, sampled |", "train.steps=1", "torch 2"):
        assert shown in text, text
