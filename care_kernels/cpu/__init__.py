"""The CPU kernels in C++, built with the system's compiler on first use.

`head_cpu.cpp` takes about ten seconds to build, once for each machine, torch version and source.
The library is kept under `$CARE_KERNELS_CACHE`, else `~/.cache/care_kernels`, else (for a user
without a home) in a private folder of the system's temporary one. Where there is no compiler or no
AVX-512 the torch code does the same work in float32, several times slower;
`CARE_KERNELS_NATIVE=0` asks for that.

A library is code: one is loaded only from a folder, and of an owner and mode, that let nobody but
this user or root write it, and only with the checksum that it was written with.
"""

import functools
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

_SOURCE = Path(__file__).with_name("head_cpu.cpp")
_FLAGS = (
    "-O3 -march=native -std=c++20 -fPIC -shared -fopenmp -fno-math-errno "
    "-DCPU_CAPABILITY_AVX512 -DCPU_CAPABILITY=AVX512 -DAT_PARALLEL_OPENMP=1"
).split()


@functools.cache
def native_ops() -> Any | None:
    """The operators of `head_cpu.cpp`, built if need be; None where they cannot run.

    Warns once if the build fails.
    """
    if os.environ.get("CARE_KERNELS_NATIVE") == "0":
        return None
    if platform.system() != "Linux" or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return None
    try:
        load()
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", None) or error
        warnings.warn(
            "care_kernels: the CPU kernels could not be built, so bfloat16 heads run in float32, "
            f"several times slower. Install a C++20 compiler (g++), or set CARE_KERNELS_NATIVE=0 "
            f"to silence this. Cause: {reason}",
            stacklevel=2,
        )
        return None
    return torch.ops.care_kernels


def load() -> Path:
    """Load the library, from the cache or built now, and return its path.

    Raises:
        OSError: there is no compiler, no room, or the system refuses the built library.
        subprocess.CalledProcessError: the compiler failed; `stderr` says why.
    """
    key = (_SOURCE.read_text(), torch.__version__, *_FLAGS, platform.machine(), _cpu_flags())
    name = f"head_cpu_{hashlib.sha256(chr(10).join(key).encode()).hexdigest()[:16]}.so"
    folders = list(_private_folders())
    for folder in folders:
        if _is_whole(folder / name):
            try:
                torch.ops.load_library(str(folder / name))
                return folder / name
            except OSError:  # built against libraries that have moved since
                break
    cache = next((folder for folder in folders if os.access(folder, os.W_OK)), None)
    # Concurrent builders each rename a finished file into place.
    with tempfile.TemporaryDirectory(dir=cache) as work:
        built = Path(work) / name
        _build(built)
        if cache is None:
            warnings.warn(
                "care_kernels: no folder that only this user can write to, so the CPU kernels are "
                "built by every process (about ten seconds); set CARE_KERNELS_CACHE to one",
                stacklevel=3,
            )
        else:
            built = built.replace(cache / name)
        torch.ops.load_library(str(built))
    return built


def _build(library: Path) -> None:
    given = shlex.split(os.environ.get("CXX", ""))
    found = shutil.which("c++") or shutil.which("g++")
    if not (given or found):
        raise FileNotFoundError("no C++ compiler: neither $CXX, c++ nor g++")
    torch_dir = Path(torch.__file__).parent
    paths = (f"-isystem{torch_dir}/include", str(_SOURCE), "-o", str(library))
    libraries = (f"-L{torch_dir}/lib", "-ltorch_cpu", "-lc10")
    command = [*(given or [found]), *_FLAGS, *paths, *libraries]
    subprocess.run(command, check=True, capture_output=True, text=True)
    # The loader ignores what follows the last section; a file that a crash cut short lacks it.
    with library.open("ab") as file:
        file.write(hashlib.sha256(library.read_bytes()).digest())
    library.chmod(0o700)


def _private_folders() -> Iterator[Path]:
    """Folders for the library in which nobody else can put one."""
    if given := os.environ.get("CARE_KERNELS_CACHE"):
        wanted = [Path(given)]
    else:
        home = os.path.expanduser("~")  # itself where the user has none
        wanted = [] if home == "~" else [Path(home) / ".cache" / "care_kernels"]
        wanted.append(Path(tempfile.gettempdir()) / f"care_kernels-{os.geteuid()}")
    for folder in wanted:
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if _is_ours(folder.lstat(), stat.S_ISDIR):
                yield folder
        except OSError:  # read-only, or somebody else's
            continue


def _is_whole(library: Path) -> bool:
    """Whether a file is a library that this user (or root) wrote to its end."""
    try:
        if not _is_ours(library.lstat(), stat.S_ISREG):
            return False
        content = library.read_bytes()
    except OSError:
        return False
    return hashlib.sha256(content[:-32]).digest() == content[-32:]


def _is_ours(status: os.stat_result, is_kind: Any) -> bool:
    is_owned = status.st_uid in (os.geteuid(), 0)
    return is_kind(status.st_mode) and is_owned and not status.st_mode & 0o022


def _cpu_flags() -> str:
    """What -march=native depends on: a cache on a shared disk serves several machines."""
    with open("/proc/cpuinfo") as lines:
        return next((line for line in lines if line.startswith("flags")), "")
