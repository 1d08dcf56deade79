"""Liger's kernels on a tiny model against transformers' layers, under Triton's interpreter.

`TRITON_INTERPRET=1 python -m tests.train.liger_kernels MODEL` exits with 0 where log-probs and
gradients agree.
"""

import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

from care_train.config import ModelSettings
from care_train.models.batch import collate
from care_train.models.load import load_model
from care_train.models.policy import Policy
from tests.train.builders import random_sequences


@triton.jit
def rsqrt(x):
    """In place of the one of CUDA's library, which the interpreter does not have."""
    return tl.rsqrt(x)


def _fit_interpreter() -> None:
    """Float arguments become tensors, as they are where kernels are compiled."""
    convert: Any = interpreter._implicit_cvt  # pyright: ignore[reportAttributeAccessIssue]

    def with_floats(argument: Any) -> Any:
        if not isinstance(argument, float):
            return convert(argument)
        value = np.array([argument], dtype=np.float32)
        return tl.tensor(interpreter.TensorHandle(value, tl.float32), tl.float32)

    interpreter._implicit_cvt = with_floats  # pyright: ignore[reportAttributeAccessIssue]
    norm: Any = importlib.import_module("liger_kernel.ops.rms_norm")
    norm.rsqrt = rsqrt


def _log_probs_and_gradients(folder: Path, liger: bool) -> tuple[torch.Tensor, dict]:
    loaded = load_model(ModelSettings(path=str(folder), liger=liger))
    assert liger == any("Liger" in m._get_name() for m in loaded.model.modules())
    sequences = random_sequences(loaded, 2)
    policy = Policy(loaded.model)
    batch = collate(sequences, loaded.pad_token_id, loaded.image_token_id)
    log_probs = policy(batch)[0]
    log_probs.sum().backward()
    gradients = {n: p.grad for n, p in policy.named_parameters() if p.grad is not None}
    return log_probs.detach(), gradients


def main(folder: str) -> None:
    _fit_interpreter()
    # The kernels replace functions of transformers' modules: its own go first.
    own, kernels = [_log_probs_and_gradients(Path(folder), liger) for liger in (False, True)]
    torch.testing.assert_close(kernels, own, rtol=1e-4, atol=2e-5)
    assert not torch.equal(own[0], kernels[0])


if __name__ == "__main__":
    main(*sys.argv[1:])
