"""Other users of the machine, and users that it hardly knows: nobody else's native library is
loaded, and a run works in a container with a user of no name and no home, and read-only trees."""

import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import pytest

from care_kernels import cpu
from care_train.training.failures import INPUT_STATUS
from tests.train.runs import ROOT, text_run_arguments

USER = 54321
"""An id that the machine's user database does not have."""

TOOLS = all(map(shutil.which, ("unshare", "setpriv", "mount")))
IS_ROOT = os.geteuid() == 0 and TOOLS and subprocess.run(["unshare", "-m", "true"]).returncode == 0
needs_root = pytest.mark.skipif(not IS_ROOT, reason="only root can become another user")
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")


def _mounts(trees: list[Path], desk: Path) -> Iterator[str]:
    """Commands of a mount namespace in which any user reaches the trees, read-only: a folder above
    one that is closed to others gives way to an empty one."""
    spares = {tree: desk / f"spare{i}" for i, tree in enumerate(trees)}
    for tree, spare in spares.items():
        yield f'mkdir -p "{spare}" && mount --bind "{tree}" "{spare}"'
    closed = (
        next((p for p in t.parents[::-1] if not p.stat().st_mode & 0o001), None) for t in trees
    )
    for folder in set(filter(None, closed)):
        yield f'mount -t tmpfs -o mode=755 none "{folder}"'
    for tree, spare in spares.items():
        yield f'mkdir -p "{tree}" && mount --bind "{spare}" "{tree}"'
        yield f'mount -o remount,bind,ro "{tree}"'


def run_in_container(
    desk: Path, *command: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    """The end of a command as a container would run it: another user, no home, no name, read-only
    trees. It runs in `desk`, the only folder that the user can write to; `python` first stands for
    this interpreter."""
    temporary = desk / "tmp"
    temporary.mkdir(exist_ok=True)
    os.chown(desk, USER, USER)
    os.chown(temporary, USER, USER)
    trees = [ROOT, Path(sys.base_prefix)]
    if not Path(sys.prefix).is_relative_to(ROOT):
        trees.append(Path(sys.prefix))
    user = f"setpriv --reuid {USER} --regid {USER} --clear-groups"
    script = "\n".join(["set -e", *_mounts(trees, desk), f'cd "{desk}"', f'exec {user} "$@"'])
    kept = {"PATH": os.environ["PATH"], "TMPDIR": str(temporary), **environment}
    program = [sys.executable if part == "python" else part for part in command]
    return subprocess.run(
        ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh", *program],
        env=kept,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture
def desk() -> Iterator[Path]:
    """A folder that the container's user can write to. pytest's own are closed to it."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        Path(name).chmod(0o755)
        yield Path(name)


TWO_RUNS = """
import sys
from care_train.cli import main
arguments = {arguments!r}
assert main([*arguments, "output_dir={closed}"]) == {status}
sys.exit(main(arguments))
"""


@needs_root
@needs_compiler
def test_a_run_needs_no_home_no_name_and_no_writable_tree(desk):
    """With kernels built in C++ (bfloat16 on a CPU), evaluations, plots and TensorBoard: all that
    it writes is in its output folder or among temporary files. There, in a folder of the user's
    alone, the next run finds the kernels again, one with vLLM and without HOME. An output folder
    that the user may read, not write, is status 2: named, with the reason."""
    closed = desk / "closed"
    closed.mkdir(mode=0o755)
    own = ("train.steps=1", "model.dtype=bfloat16", "logging.report_to=[tensorboard]")
    arguments = [*text_run_arguments(desk), *own]
    two = TWO_RUNS.format(arguments=arguments, closed=closed, status=INPUT_STATUS)
    engine = ["rollout.engine=vllm"] if find_spec("vllm") else []
    again = ("-m", "care_train", *arguments, "name=again", *engine)
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    ends = [
        run_in_container(desk, "python", "-c", two, HOME="/", **environment),
        run_in_container(desk, "python", *again, CXX="/bin/false", **environment),
    ]
    for done, name in zip(ends, ("run", "again"), strict=True):
        assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
        assert "kernels could not be built" not in done.stderr, done.stderr
        assert (desk / name / "final" / "model.safetensors").is_file()
        assert (desk / name / "learning_curves.png").is_file(), done.stdout
    assert f"output_dir: {closed} cannot be written" in ends[0].stderr, ends[0].stderr
    if cpu.native_ops() is not None:
        library = desk / "tmp" / f"care_kernels-{USER}"
        assert len(list(library.iterdir())) == 1 and library.stat().st_mode & 0o777 == 0o700


@pytest.fixture
def source(tmp_path, monkeypatch) -> Path:
    """A source that is built in a moment; its library says in a file that it was loaded."""
    path = tmp_path / "source.cpp"
    path.write_text(_source(tmp_path / "loaded"))
    monkeypatch.setattr(cpu, "_SOURCE", path)
    monkeypatch.setattr(cpu, "_FLAGS", ["-shared", "-fPIC"])
    monkeypatch.setenv("CARE_KERNELS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return path


def _source(says: Path) -> str:
    return (
        "#include <cstdio>\n"
        f"__attribute__((constructor)) void hello() {{\n"
        f'  if (FILE* file = fopen("{says}", "w")) fclose(file);\n}}\n'
    )


def _load(source: Path) -> str:
    """The library that is loaded by a process of its own: a torn one would end it with SIGBUS."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.train.warm"])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_load_here, source, dict(os.environ)).result()


def _load_here(source: Path, environment: dict[str, str]) -> str:
    os.environ.update(environment)
    tempfile.tempdir = None
    cpu._SOURCE, cpu._FLAGS = source, ["-shared", "-fPIC"]
    return str(cpu.load())


def _plant(library: Path, says: Path) -> None:
    """A library of a stranger's, whole and with its checksum, in the place of ours."""
    evil = library.with_name("evil.cpp")
    evil.write_text(_source(says))
    before = cpu._SOURCE
    cpu._SOURCE = evil
    cpu._build(library)
    cpu._SOURCE = before


def _make_it_a_link(library: Path) -> None:
    elsewhere = library.with_name("elsewhere.so")
    library.rename(elsewhere)
    library.symlink_to(elsewhere)


PLANTS: dict[str, Callable[[Path], None]] = {
    "a stranger's": lambda library: os.chown(library, USER, USER),
    "anybody may write it": lambda library: library.chmod(0o777),
    "a link": _make_it_a_link,
    "a stranger's folder": lambda library: os.chown(library.parent, USER, USER),
    "anybody may write the folder": lambda library: library.parent.chmod(0o777),
}


@needs_compiler
@needs_root
@pytest.mark.parametrize("plant", PLANTS)
def test_a_library_that_somebody_else_can_write_is_not_loaded(plant, source, tmp_path):
    """It is built anew, where need be elsewhere."""
    library = Path(_load(source))
    assert library.parent == tmp_path / "cache" and library.stat().st_mode & 0o077 == 0
    (tmp_path / "loaded").unlink()
    library.unlink()
    _plant(library, tmp_path / "evil")
    PLANTS[plant](library)
    _load(source)
    assert not (tmp_path / "evil").exists() and (tmp_path / "loaded").exists()


@needs_compiler
@pytest.mark.parametrize("size", [0, 5000, -1])
def test_a_broken_library_is_built_again(size, source, tmp_path):
    """Empty, cut off by a crash in the midst, or with its last byte lost."""
    library = Path(_load(source))
    whole = library.read_bytes()
    library.write_bytes(whole[:size])
    assert _load(source) == str(library) and library.read_bytes() == whole


@needs_compiler
def test_a_library_that_the_system_refuses_is_built_again(source, tmp_path):
    """With its checksum, but no library: of another machine, say."""
    library = Path(_load(source))
    _plant(library, tmp_path / "evil")
    content = bytearray(library.read_bytes()[:-32])
    content[:4] = b"none"
    library.write_bytes(bytes(content) + cpu.hashlib.sha256(content).digest())
    assert _load(source) == str(library)
    assert library.read_bytes()[:4] == b"\x7fELF"
