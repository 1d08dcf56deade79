"""Write the trained policy as a plain Hugging Face folder."""

from pathlib import Path

from care_train.distributed import is_main
from care_train.training.engine import PolicyEngine
from care_train.training.folders import write_folder
from care_train.training.weights import buffers

_BUCKET_BYTES = 1 << 29
"""Gathered on every rank's device at once; the whole model is in rank 0's main memory alone."""


def save_model(engine: PolicyEngine, folder: Path) -> None:
    """The policy as a plain Hugging Face folder, from any ZeRO stage, adapters merged.

    Raises:
        SaveError: it could not be written.
    """
    weights = {}
    for name, tensor in engine.weights(_BUCKET_BYTES):
        if is_main():
            weights[name] = tensor.to("cpu", copy=True)

    def write(partial: Path) -> None:
        if is_main():
            engine.loaded.save(partial, weights | buffers(engine.loaded.model))

    write_folder(folder, write)
