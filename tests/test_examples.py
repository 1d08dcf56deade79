"""`examples/`: each configuration loads and fits its hardware; the notebook runs as it is."""

import re
import shlex
from pathlib import Path

import pytest

from care_train.arguments import parse_arguments
from care_train.config import load_config
from care_train.planning.plan import plan_values
from care_train.planning.workload import Workload, gpu, read_architecture

EXAMPLES = Path(__file__).parents[1] / "examples"
HARDWARE = {
    "one_a100.yaml": (1, "a100"),
    "eight_h100.yaml": (8, "h100"),
    "lora_24gb.yaml": (1, "rtx4090"),
    "two_nodes.yaml": (16, "h100"),
}


def test_the_readme_lists_them():
    """None is left out, and none is listed that is not there."""
    listed = set(re.findall(r"\]\((\w+\.\w+)\)", (EXAMPLES / "README.md").read_text()))
    there = {path.name for path in EXAMPLES.iterdir() if path.suffix in (".yaml", ".ipynb")}
    assert listed == there
    assert set(HARDWARE) == {name for name in there if name.endswith(".yaml")}


def test_the_commands_of_the_readme_parse():
    """Those of the table and of the text, and the scripts that it names are there."""
    text = (EXAMPLES / "README.md").read_text()
    commands = re.findall(
        r"`(?:deepspeed .*--module care_train|care-train) ([^`]+ --config [^`]+)`", text
    )
    assert len(commands) >= 5
    for command in commands:
        options = parse_arguments(shlex.split(command))
        load_config(EXAMPLES.parent / options.config, options.overrides)
    for script in re.findall(r"`(launch/[^`]+)`", text):
        assert (EXAMPLES.parent / script).is_file()


@pytest.mark.parametrize("name", HARDWARE)
def test_the_memory_is_enough(name):
    """What `care-train plan` says of the model, the settings and the hardware of the table."""
    config = load_config(EXAMPLES / name)
    gpus, device = HARDWARE[name]
    model = read_architecture(config.model.path)
    plan = plan_values(Workload(config, model, gpu(device), gpus, 1, None))
    assert plan["fits"], (plan["peak_bytes"] / 2**30, plan["peak_phase"], plan["advice"])
    assert config.train.prompts_per_step % gpus == 0
    assert config.held_out is not None and config.held_out.path == "hiyouga/geometry3k@test"


def test_the_notebook_runs(tmp_path, monkeypatch):
    """Every cell, with one step; an error in one is shown and the cells after it still work."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    monkeypatch.setenv("STEPS", "1")
    notebook = nbformat.read(EXAMPLES / "quickstart.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    nbclient.NotebookClient(notebook, resources={"metadata": {"path": tmp_path}}).execute()
    shown = "".join(
        output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", ())
    )
    assert "train_dataset: row 1: answer: got the columns" in shown
    assert "accuracy" in shown
    assert (tmp_path / "digits" / "model.safetensors").is_file()
