"""The CPU kernels in C++, built with the system's compiler on first use.

`head_cpu.cpp` takes about ten seconds to build, once for each machine, torch version and
source; the library is kept under `$CARE_KERNELS_CACHE`, else `~/.cache/care_kernels`. Where there
is no compiler or no AVX-512 the torch code does the same work in float32, several times slower;
`CARE_KERNELS_NATIVE=0` asks for that.
"""

import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import warnings
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
        torch.ops.load_library(str(_build()))
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


def _build() -> Path:
    """The shared library's path. Concurrent builders each rename a finished file into place."""
    source = _SOURCE.read_text()
    key = "\n".join((source, torch.__version__, *_FLAGS, platform.machine(), _cpu_flags()))
    folder = Path(os.environ.get("CARE_KERNELS_CACHE", Path.home() / ".cache" / "care_kernels"))
    library = folder / f"head_cpu_{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    if library.exists():
        return library
    compiler = shlex.split(os.environ.get("CXX", "")) or _compiler()
    if not compiler:
        raise FileNotFoundError("no C++ compiler: neither $CXX, c++ nor g++")
    folder.mkdir(parents=True, exist_ok=True)
    torch_dir = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory(dir=folder) as work:
        built = Path(work) / library.name
        paths = (f"-isystem{torch_dir}/include", str(_SOURCE), "-o", str(built))
        libraries = (f"-L{torch_dir}/lib", "-ltorch_cpu", "-lc10")
        subprocess.run(
            (*compiler, *_FLAGS, *paths, *libraries),
            check=True,
            capture_output=True,
            text=True,
        )
        built.replace(library)
    return library


def _compiler() -> list[str]:
    found = shutil.which("c++") or shutil.which("g++")
    return [] if found is None else [found]


def _cpu_flags() -> str:
    """What -march=native depends on: a cache on a shared disk serves several machines."""
    with open("/proc/cpuinfo") as lines:
        return next((line for line in lines if line.startswith("flags")), "")
