"""What README, docs, configs/ and examples/ tell people to type works, also after installation."""

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import care_train
from care_train.cli import main, parse_arguments
from care_train.config import configs_folder, full_help, load_build_settings, load_config
from care_train.planning.plan import plan_values
from care_train.planning.workload import Workload, gpu, read_architecture
from tests.train.runs import run

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
BUILDS = sorted(configs_folder().glob("data/*.yaml"))
RUNS = sorted(configs_folder().glob("*.yaml")) + sorted(configs_folder().glob("protocol/*.yaml"))


def _commands(program: str) -> list[tuple[str, list[str]]]:
    """(where, words) of each command of that program in a code block of README or docs."""
    found = []
    for page in PAGES:
        lines = iter(page.read_text().splitlines())
        for line in lines:
            while line.endswith("\\"):
                line = line[:-1] + next(lines).strip()
            if re.match(rf"\s*(\$ |[A-Z_]+=\S+ )*{re.escape(program)} ", line) and "`" not in line:
                words = [word for word in shlex.split(line, comments=True) if word != "&"]
                start = words.index(program.split()[0])
                found.append((page.name, words[start + len(program.split()) :]))
    return found


def _name(value: str | list[str]) -> str:
    return value if isinstance(value, str) else " ".join(value)[:60]


COMMANDS = _commands("care-train")
LAUNCHED = [
    (page, words[words.index("care_train") + 1 :])
    for page, words in _commands("deepspeed")
    if "care_train" in words
]


@pytest.mark.parametrize(("page", "words"), COMMANDS + LAUNCHED, ids=_name)
def test_each_command_of_the_docs_parses(page, words):
    """Options exist, files of configs/ are there, and every key=value is a setting."""
    words = words[: words.index("<")] if "<" in words else words
    if {"--help", "--help-all"} & set(words):
        with pytest.raises(SystemExit) as stopped:
            parse_arguments(words)
        assert stopped.value.code == 0
        return
    options = parse_arguments(words)
    if options.command == "data":
        load_build_settings(ROOT / options.config, options.overrides)
    elif hasattr(options, "overrides"):
        config = getattr(options, "config", None)  # `replay` takes a run's own.
        load_config(config and ROOT / config, options.overrides)


def test_there_are_commands_to_test():
    """The pattern above finds what README and the pages about runs show."""
    assert len(COMMANDS) >= 25 and LAUNCHED
    names = {words[0] for _, words in COMMANDS}
    assert {"train", "sft", "eval", "serve", "doctor", "plan", "verify", "data", "export"} <= names


@pytest.mark.parametrize(("page", "words"), _commands("python -m"), ids=_name)
def test_each_module_of_the_docs_exists(page, words):
    """`python -m bench.seeds` and the like name modules that are there."""
    if words[0].startswith(("bench", "care_")):
        assert importlib.util.find_spec(words[0]) is not None, (page, words)


@pytest.mark.parametrize(
    "path", [*RUNS, *BUILDS], ids=lambda path: f"{path.parent.name}/{path.stem}"
)
def test_each_configuration_is_valid(path):
    """Every YAML file in configs/ loads: runs' and, in configs/data/, builds of data sets."""
    if path in BUILDS:
        assert load_build_settings(path).output.startswith("data/")
    else:
        assert load_config(path).train.steps >= 1


SMALL = [
    "model.path=tiny-qwen2.5-vl",
    "model.image_pixels=null",
    "data={path: easy_vqa, max_samples: 8}",
    "eval.data=easy_vqa@test",
    "eval.max_samples=4",
    "sft={steps: 1, batch_size: 4}",
    "sft.data={path: easy_vqa, max_samples: 8}",
    "prompt={system: null, max_prompt_tokens: 512}",
    "rollout={group_size: 2, max_new_tokens: 8, engine: transformers}",
    "care.reflection.cue=again:",
    "train={steps: 1, prompts_per_step: 4, save_every: 0, eval_every: 0}",
    "logging={report_to: []}",
]
"""Laid over a configuration made for GPUs: everything else of it stays as written."""


SOME = ("care_official", "cispo", "reinforce_pp")
OTHERS = ("care", "care_no_rgr", "dapo", "dr_grpo", "grpo", "gspo", "rloo", "sapo")


@pytest.mark.parametrize(
    "name", [*SOME, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)]
)
def test_each_large_configuration_trains_when_made_small(name, tmp_path):
    """One step under each algorithm's YAML file, with the shipped batch, loss and ZeRO settings."""
    config = str(configs_folder() / f"{name}.yaml")
    run("train", "--config", config, *SMALL, f"output_dir={tmp_path}", f"name={name}")
    assert (tmp_path / name / "summary.json").is_file()


EXAMPLES = ROOT / "examples"
HARDWARE = {
    "one_a100.yaml": (1, "a100"),
    "eight_h100.yaml": (8, "h100"),
    "lora_24gb.yaml": (1, "rtx4090"),
    "two_nodes.yaml": (16, "h100"),
}


def test_the_readme_of_the_examples():
    """It lists each example, and none that is not there; its commands parse, and the scripts that
    it names are there."""
    text = (EXAMPLES / "README.md").read_text()
    there = {path.name for path in EXAMPLES.iterdir() if path.suffix in (".yaml", ".ipynb")}
    assert set(re.findall(r"\]\((\w+\.\w+)\)", text)) == there
    assert set(HARDWARE) == {name for name in there if name.endswith(".yaml")}
    commands = re.findall(
        r"`(?:deepspeed .*--module care_train|care-train) ([^`]+ --config [^`]+)`", text
    )
    assert len(commands) >= 5
    for command in commands:
        options = parse_arguments(shlex.split(command))
        load_config(ROOT / options.config, options.overrides)
    for script in re.findall(r"`(launch/[^`]+)`", text):
        assert (ROOT / script).is_file()


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


def printed(capsys, *words: str) -> list[str]:
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 0
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(
    "command", ["quickstart", "sft", "train", "eval", "plan", "doctor", "serve", "verify"]
)
def test_help_fits_three_screens(command, capsys):
    """At most 120 lines of at most 100 characters, and where to find the rest."""
    lines = printed(capsys, command, "--help")
    assert len(lines) <= 120 and max(map(len, lines)) <= 100
    assert any("--help-all" in line for line in lines)


def test_all_settings_are_shown_on_request(capsys):
    """Name, default, type, range, role on resume and meaning; `data build` has its own."""
    text = "\n".join(printed(capsys, "train", "--help-all"))
    assert "train.steps = 100  (an integer, at least 1)" in text
    assert "care.neg_scale = 0.5  (a number in (0, 1])" in text
    assert "logging.project = care  (text; on resume free)" in text
    assert full_help().count("\n") > 300
    text = "\n".join(printed(capsys, "data", "build", "--help-all"))
    assert "sources.NAME.path = required" in text and "train.steps" not in text
    assert printed(capsys, "--version") == [f"care-train {care_train.__version__}"]


def test_a_reader_may_leave():
    """`care-train train --help-all | head` ends without a traceback, by SIGPIPE's status."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "care_train", "train", "--help-all"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


def test_a_shipped_configuration_is_named_after_a_wheel_install(tmp_path: Path):
    """`care-train plan --config care` from the installed package, which has configs/ inside."""
    installed, empty = install_wheel(tmp_path), tmp_path / "empty"
    empty.mkdir()
    code = (
        "import care_train, sys; assert 'site' in care_train.__file__.split('/'), sys.path\n"
        "from care_train.__main__ import main\n"
        "sys.exit(main())"
    )
    environment = os.environ | {"PYTHONPATH": str(installed)}

    def typed(*words: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-c", code, *words]
        return subprocess.run(command, cwd=empty, env=environment, capture_output=True, text=True)

    done = typed("plan", "--config", "care_no_rgr", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["model"] == "Qwen2.5-VL-3B-Instruct"
    wrong = typed("verify", "--config", "caer")
    assert wrong.returncode == 2
    assert "--config: got caer, wanted a YAML file or one of care, care_no_rgr" in wrong.stderr


def install_wheel(folder: Path) -> Path:
    """Build the wheel in `folder` and install it without what it needs; a path for PYTHONPATH."""
    build = (sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet")
    subprocess.run([*build, "--wheel-dir", folder, ROOT], check=True)
    (wheel,) = folder.glob("*.whl")
    site = folder / "site"
    install = (sys.executable, "-m", "pip", "install", "--no-deps", "--quiet", "--target")
    subprocess.run([*install, site, wheel], check=True)
    return site
