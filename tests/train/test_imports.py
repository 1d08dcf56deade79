"""Imports point down: the layers of the packages."""

import ast
import os
import subprocess
import sys
from pathlib import Path

from tests.train.runs import ROOT, python


def _imports(path: Path) -> set[str]:
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules.add(node.module)
    return modules


def _files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def test_the_lowest_layers_are_pure():
    """`config` knows no other part; `algorithm` takes torch, its settings and two equations.

    Eqs. 4 and 11 are the kernels'.
    """
    allowed = {
        "config": ("pydantic", "yaml", "care_train.config"),
        "algorithm": ("torch", "care_kernels", "care_train.algorithm", "care_train.config"),
    }
    for folder, modules in allowed.items():
        for path in _files(f"care_train/{folder}"):
            for module in _imports(path):
                known = module.split(".")[0] in sys.stdlib_module_names
                assert known or any(f"{module}.".startswith(f"{m}.") for m in modules), path


def test_kernels_never_import_the_trainer():
    """`care_kernels` needs torch and triton only: anyone can import it into their own trainer.

    Its integrations may import the framework they are for; nothing else imports them.
    """
    for path in _files("care_kernels"):
        if "integrations" in path.parts:
            continue
        assert not any("integrations" in module for module in _imports(path)), path
        for module in _imports(path):
            top = module.split(".")[0]
            known = top in sys.stdlib_module_names
            assert known or top in ("torch", "triton", "care_kernels"), (path, module)


def test_engines_stay_at_the_edges():
    """DeepSpeed is imported where the engine is made, care_kernels where its equations are due.

    Those are Eq. 4 (selection and the policy's pooling), Eq. 11 (region_weights) and Eqs. 12-13;
    the plan asks for the size of their chunks. Integrations import the framework they are for.
    """
    uses_deepspeed = {"compat.py", "training/engine.py", "training/optimizer.py"}
    uses_kernels = {
        "algorithm/region_weights.py",
        "algorithm/selection.py",
        "models/policy.py",
        "planning/memory.py",
        "training/log_probs.py",
        "training/update.py",
    }
    for path in _files("care_train"):
        tops = {module.split(".")[0] for module in _imports(path)}
        name = path.relative_to(ROOT / "care_train").as_posix()
        if name.startswith("integrations/"):
            continue
        assert "deepspeed" not in tops or name in uses_deepspeed, path
        assert "care_kernels" not in tops or name in uses_kernels, path
        assert "vllm" not in tops or name.startswith("rollout/") or name == "compat.py", path


def test_no_layer_imports_one_above():
    """cli -> commands -> training -> {rollout, verifier, algorithm, data, models, reporting}."""
    names = "config algorithm data verifier models reporting rollout training"
    order = names.split()
    for path in _files("care_train"):
        parts = path.relative_to(ROOT / "care_train").parts
        if parts[0] not in order:
            continue
        for module in _imports(path):
            names = module.split(".")
            if names[0] == "care_train" and len(names) > 1 and names[1] in order:
                assert order.index(names[1]) <= order.index(parts[0]), (path, module)


def test_files_stay_short():
    """No file grows beyond 350 lines; 450 in the kernels, where a file is one equation or noun."""
    for folder, most in (("care_kernels", 450), ("care_train", 350)):
        for path in _files(folder):
            assert len(path.read_text().splitlines()) <= most, path


def test_a_command_without_the_trainers_packages_says_what_to_install(tmp_path):
    """`pip install .` brings the kernels alone; then `care-train` ends with one line."""
    (tmp_path / "pydantic.py").write_text("raise ModuleNotFoundError(name='pydantic')\n")
    command = (sys.executable, "-m", "care_train", "--help")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == (
        "care-train: error: pydantic is not installed; wanted the trainer's packages: "
        "pip install 'care-rl[train]'\n"
    )


def _loaded(code: str) -> set[str]:
    """Top-level packages that a new process has loaded after the last statement but not before."""
    before, _, last = code.rpartition("; ")
    text = f"import sys; {before}\nold = set(sys.modules)\n{last}\nprint(*set(sys.modules) - old)"
    return {name.split(".")[0] for name in python("-c", text).stdout.split()}


def test_an_import_loads_little():
    """`care-train --help` answers without loading torch; `import care_kernels` loads no other
    package that has to be installed."""
    assert not {"torch", "transformers", "deepspeed"} & _loaded("import care_train.cli")
    loaded = _loaded("import torch, triton; import care_kernels")
    assert loaded - {"care_kernels", "torch", "triton"} <= sys.stdlib_module_names
