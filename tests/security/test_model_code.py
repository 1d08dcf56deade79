"""Code that lies in a model's folder is never run, and nobody is asked whether it may."""

import json
import shutil

import pytest

from tests.train.builders import load

CODE = """
from pathlib import Path
Path({mark!r}).touch()
class Own: pass
"""
MAPS = {
    "config.json": {"AutoConfig": "code.Own", "AutoModelForImageTextToText": "code.Own"},
    "tokenizer_config.json": {"AutoTokenizer": ["code.Own", "code.Own"]},
    "processor_config.json": {"AutoProcessor": "code.Own", "AutoImageProcessor": "code.Own"},
}


@pytest.mark.parametrize("name", MAPS)
def test_code_of_a_models_folder_is_not_run(name, tiny_folder, tmp_path, monkeypatch):
    """A model that names its own classes is read by transformers' or refused by name."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder(), folder)
    (folder / "code.py").write_text(CODE.format(mark=str(tmp_path / "ran")))
    path = folder / name
    values = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(values | {"auto_map": MAPS[name]}))

    def asked(*_):
        raise AssertionError("asked on standard input")

    monkeypatch.setattr("builtins.input", asked)
    try:
        load(folder)
    except ValueError as error:
        assert str(folder) in str(error)
    assert not (tmp_path / "ran").exists()
