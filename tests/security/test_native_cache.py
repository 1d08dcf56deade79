"""Attacks on the cache of the native CPU library: nobody else's code is loaded, no torn file ends a
process, and a user without a home or a writable cache has the kernels all the same."""

import multiprocessing
import os
import shutil
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from care_kernels import cpu
from tests.security.containers import ROOT, USER, can_run, run_in_container

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")


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


LOAD = """
import sys
from pathlib import Path
from care_kernels import cpu
cpu._SOURCE, cpu._FLAGS = Path(sys.argv[1]), ["-shared", "-fPIC"]
print(cpu.load())
"""


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


def _stranger_owns_it(library: Path) -> None:
    os.chown(library, USER, USER)


def _anybody_may_write_it(library: Path) -> None:
    library.chmod(0o777)


def _it_is_a_link(library: Path) -> None:
    elsewhere = library.with_name("elsewhere.so")
    library.rename(elsewhere)
    library.symlink_to(elsewhere)


def _stranger_owns_the_folder(library: Path) -> None:
    os.chown(library.parent, USER, USER)


def _anybody_may_write_the_folder(library: Path) -> None:
    library.parent.chmod(0o777)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
@pytest.mark.parametrize(
    "plant",
    [
        _stranger_owns_it,
        _anybody_may_write_it,
        _it_is_a_link,
        _stranger_owns_the_folder,
        _anybody_may_write_the_folder,
    ],
)
def test_a_library_that_somebody_else_can_write_is_not_loaded(plant, source, tmp_path):
    """It is built anew, where need be elsewhere."""
    library = Path(_load(source))
    assert library.parent == tmp_path / "cache" and library.stat().st_mode & 0o077 == 0
    (tmp_path / "loaded").unlink()
    library.unlink()
    _plant(library, tmp_path / "evil")
    plant(library)
    _load(source)
    assert not (tmp_path / "evil").exists() and (tmp_path / "loaded").exists()


@pytest.mark.parametrize("size", [0, 5000, -1])
def test_a_broken_library_is_built_again(size, source, tmp_path):
    """Empty, cut off by a crash in the midst, or with its last byte lost."""
    library = Path(_load(source))
    whole = library.read_bytes()
    library.write_bytes(whole[:size])
    assert _load(source) == str(library) and library.read_bytes() == whole


def test_a_library_that_the_system_refuses_is_built_again(source, tmp_path):
    """With its checksum, but no library: of another machine, say."""
    library = Path(_load(source))
    _plant(library, tmp_path / "evil")
    content = bytearray(library.read_bytes()[:-32])
    content[:4] = b"none"
    library.write_bytes(bytes(content) + cpu.hashlib.sha256(content).digest())
    assert _load(source) == str(library)
    assert library.read_bytes()[:4] == b"\x7fELF"


@pytest.mark.skipif(not can_run(), reason="only root can become another user")
def test_a_user_without_a_home_has_the_kernels(source):
    """No HOME and no entry in the user database, as in a container with `--user 54321`: the library
    goes to a private folder beside other temporary files, and is found there again."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        desk = Path(name)
        desk.chmod(0o755)
        shutil.copy(source, desk / "source.cpp")
        library = desk / "tmp" / f"care_kernels-{USER}"
        for compiler in ("g++", "/bin/false"):  # not built again
            command = ("python", "-c", LOAD, str(desk / "source.cpp"))
            done = run_in_container(desk, *command, CXX=compiler, PYTHONPATH=str(ROOT))
            assert done.returncode == 0, done.stderr
            assert Path(done.stdout.strip()).parent == library
            assert library.stat().st_mode & 0o777 == 0o700
