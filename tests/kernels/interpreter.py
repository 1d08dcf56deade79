"""Run Triton kernels on CPU tensors, in a process where Triton may be loaded already.

Triton chooses between compiler and interpreter as it decorates a function, and it decorates its own
`tl.sum` and `tl.max` too. So the kernels, and for each test Triton's own functions, are decorated
anew with the interpreter chosen; everything else in the process keeps the compiler. Where a GPU is
present nothing here does anything: the tests then run the compiled kernels.
"""

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import Any

import triton
import triton.experimental.gluon  # A launch would load it, and it wants compiled functions.
import triton.language as tl
from triton import knobs
from triton.runtime import interpreter

from bench.interpreter import mended_interpreter
from tests.kernels.cases import DEVICE

IS_INTERPRETED = DEVICE == "cpu"


def interpret_kernels_of(name: str) -> None:
    """Replace a module's kernels, and those that it imports, by interpreted ones, in place."""
    module = importlib.import_module(name)
    for member_name, member in list(vars(module).items()):
        if IS_INTERPRETED and isinstance(member, triton.JITFunction):
            setattr(module, member_name, decorate(member.fn))


def decorate(kernel: Callable[..., None]) -> Any:
    """`triton.jit` of a test's own kernel, in the mode of the package's."""
    with knobs.runtime.scope():
        knobs.runtime.interpret = IS_INTERPRETED
        return triton.jit(kernel)


@contextmanager
def interpreting() -> Iterator[None]:
    """Triton's own functions interpreted, its interpreter mended; undone on leaving."""
    if not IS_INTERPRETED:
        yield
        return
    patched = (
        tl,
        tl.core,
        tl.math,
        tl.standard,
        tl.tensor,
        tl.dtype,
        tl.core.tensor_descriptor_base,
    )
    before = [dict(vars(owner)) for owner in patched]
    try:
        for name, member in vars(_interpreted_standard()).items():
            if isinstance(member, interpreter.InterpretedFunction):
                setattr(tl.standard, name, member)
                if hasattr(tl, name):
                    setattr(tl, name, member)
        with mended_interpreter():
            yield
    finally:
        for owner, members in zip(patched, before, strict=True):
            _restore(owner, members)


@cache
def _interpreted_standard() -> ModuleType:
    """Triton's standard functions, decorated once more with the interpreter chosen."""
    path = tl.standard.__file__
    assert path is not None
    spec = importlib.util.spec_from_file_location("triton.language.interpreted_standard", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with knobs.runtime.scope():
        knobs.runtime.interpret = True
        spec.loader.exec_module(module)
    return module


def _restore(owner: Any, members: dict[str, Any]) -> None:
    for name in set(vars(owner)) - set(members):
        delattr(owner, name)
    for name, member in members.items():
        if vars(owner)[name] is not member:
            setattr(owner, name, member)
