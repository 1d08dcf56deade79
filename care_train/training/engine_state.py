"""DeepSpeed's own checkpoint files: written without hangs, loaded, read without an engine."""

import contextlib
import io
from pathlib import Path
from typing import Any

import torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

_TAG = "state"


def save_engine(engine: Any, folder: str | Path) -> None:
    """Write weights, optimiser and schedule below `folder`; every rank calls this.

    Raises:
        OSError: this rank could not write its part. Other ranks return.
    """
    writer = _PatientWriter(engine.checkpoint_engine)
    engine.checkpoint_engine = writer
    # It copies a script into the folder, past the writer.
    engine._copy_recovery_script = lambda _: None
    try:
        engine.save_checkpoint(str(folder), tag=_TAG, save_latest=False)
    finally:
        engine.checkpoint_engine = writer.inner
    if writer.problem is not None:
        raise OSError(writer.problem)


def load_engine(engine: Any, folder: str | Path) -> None:
    """Restore what `save_engine` wrote.

    Raises:
        ValueError: DeepSpeed found nothing to load.
    """
    path, _ = engine.load_checkpoint(str(folder), tag=_TAG)
    if path is None:
        raise ValueError(f"checkpoint {folder}: DeepSpeed found no state there")


def read_weights(folder: str | Path) -> dict[str, torch.Tensor]:
    """The policy's whole weights from what `save_engine` wrote under any ZeRO stage.

    The folder must be trusted: DeepSpeed's files are pickles.
    """
    states = Path(folder) / _TAG / "mp_rank_00_model_states.pt"
    if states.is_file():
        weights = torch.load(states, map_location="cpu", weights_only=False)["module"]
    else:  # ZeRO-3 writes shards alone.
        with contextlib.redirect_stdout(io.StringIO()):
            weights = get_fp32_state_dict_from_zero_checkpoint(str(folder), tag=_TAG)
    assert weights is not None
    prefix = "model."
    return {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}


def tensor_bytes(tree: Any) -> int:
    """Bytes of all tensors in nested lists and mappings; a ZeRO-3 parameter counts its shard."""
    if isinstance(tree, torch.Tensor):
        shard = getattr(tree, "ds_tensor", tree)
        return shard.numel() * shard.element_size()
    if isinstance(tree, dict):
        tree = list(tree.values())
    return sum(map(tensor_bytes, tree)) if isinstance(tree, list) else 0


class _PatientWriter:
    """DeepSpeed's file writer, except that an error waits until all ranks have written.

    Raised inside `save_checkpoint` it would leave the other ranks in a barrier.
    """

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.problem: str | None = None

    def save(self, state_dict: Any, path: str) -> None:
        try:
            self.inner.save(state_dict, path)
        except (OSError, RuntimeError) as error:  # torch's zip writer raises the latter
            self.problem = f"{path}: {str(error).splitlines()[0]}"

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)
