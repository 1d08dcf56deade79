"""Argument checks. Each raises ValueError with the argument's name, what came and what was wanted.

No check reads a CUDA tensor's values: that would stall the device on every call. So the range of
target ids and the sign of importance weights are checked on CPU tensors only.
"""

import torch
from torch import Tensor

from care_kernels.objective import SAMPLED_KL_ESTIMATORS
from care_kernels.vocab_parallel import VocabShard

FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
INT_DTYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
KL_ESTIMATORS = (*SAMPLED_KL_ESTIMATORS, "exact")
RATIO_LEVELS = ("token", "sequence")


def check_head(
    hidden: Tensor, head_weight: Tensor, target_ids: Tensor, bias: Tensor | None
) -> None:
    """hidden [N, D], head_weight [V, D], target_ids [N] int, bias [V]: shapes, dtypes, device."""
    check_matrix("hidden", hidden, hidden.device)
    check_matrix("head_weight", head_weight, hidden.device, num_columns=hidden.shape[1])
    if head_weight.shape[0] == 0:
        raise ValueError(f"head_weight: got shape {tuple(head_weight.shape)}; wanted V >= 1")
    check_rows("target_ids", target_ids, hidden, INT_DTYPES)
    if bias is not None:
        _check_vector("bias", bias, head_weight.shape[0], hidden.device, FLOAT_DTYPES)


def check_matrix(
    name: str,
    value: Tensor,
    device: torch.device,
    *,
    num_rows: int | None = None,
    num_columns: int | None = None,
) -> None:
    """A floating [num_rows, num_columns] tensor on `device`; None leaves a size free."""
    wanted = tuple("any" if size is None else size for size in (num_rows, num_columns))
    fits = value.dim() == 2 and all(
        size is None or size == got
        for size, got in zip((num_rows, num_columns), value.shape, strict=False)
    )
    if not fits:
        shape = f"({wanted[0]}, {wanted[1]})"
        raise ValueError(f"{name}: got shape {tuple(value.shape)}; wanted {shape}")
    _check_dtype_and_device(name, value, device, FLOAT_DTYPES)


def check_rows(
    name: str,
    value: Tensor | None,
    hidden: Tensor,
    dtypes: tuple[torch.dtype, ...] = FLOAT_DTYPES,
) -> None:
    """None, or one number for each row of `hidden`."""
    if value is not None:
        _check_vector(name, value, hidden.shape[0], hidden.device, dtypes)


def check_row_constants(hidden: Tensor, **constants: Tensor | None) -> None:
    """`check_rows` on each, named by its keyword."""
    for name, value in constants.items():
        check_rows(name, value, hidden)


def check_reference(
    hidden: Tensor,
    head_weight: Tensor,
    ref_hidden: Tensor | None,
    ref_head_weight: Tensor | None,
) -> None:
    """ref_hidden [N, D'] and a head [V, D'], which is head_weight unless another is given."""
    if ref_hidden is None:
        return
    width = (head_weight if ref_head_weight is None else ref_head_weight).shape[-1]
    check_matrix(
        "ref_hidden", ref_hidden, hidden.device, num_rows=hidden.shape[0], num_columns=width
    )
    if ref_head_weight is not None:
        vocab_size = head_weight.shape[0]
        check_matrix("ref_head_weight", ref_head_weight, hidden.device, num_rows=vocab_size)


def check_targets_in_vocabulary(
    target_ids: Tensor, head_weight: Tensor, vocab_shard: VocabShard | None = None
) -> None:
    """Ids within the vocabulary, read on the CPU only; a shard within it too."""
    vocab_size = num_local = head_weight.shape[0]
    if vocab_shard is not None:
        vocab_size, start = vocab_shard.vocab_size, vocab_shard.start
        if start < 0 or start + num_local > vocab_size:
            raise ValueError(
                f"vocab_shard: got rows {start} to {start + num_local}; wanted them within "
                f"0 to {vocab_size}"
            )
    if target_ids.device.type != "cpu" or target_ids.numel() == 0:
        return
    low, high = int(target_ids.min()), int(target_ids.max())
    if low < 0 or high >= vocab_size:
        raise ValueError(f"target_ids: got ids from {low} to {high}; wanted 0 to {vocab_size - 1}")


def check_weight_grad(weight_grad: Tensor, head_weight: Tensor) -> None:
    """A buffer like head_weight, in any floating dtype, outside any graph."""
    num_rows, num_columns = head_weight.shape
    check_matrix(
        "weight_grad", weight_grad, head_weight.device, num_rows=num_rows, num_columns=num_columns
    )
    if weight_grad.requires_grad:
        raise ValueError("weight_grad: got a tensor that requires grad; wanted a plain buffer")


def check_not_negative(name: str, value: Tensor | None) -> None:
    """No negative number; read on the CPU only."""
    if value is None or value.device.type != "cpu" or value.numel() == 0:
        return
    lowest = float(value.min())
    if lowest < 0:
        raise ValueError(f"{name}: got a minimum of {lowest}; wanted 0 or more")


def check_transform(temperature: float, logit_softcap: float | None) -> None:
    """A positive temperature; a positive softcap or None."""
    if not temperature > 0:
        raise ValueError(f"temperature: got {temperature}; wanted more than 0")
    if logit_softcap is not None and not logit_softcap > 0:
        raise ValueError(f"logit_softcap: got {logit_softcap}; wanted None or more than 0")


def check_chunk_rows(chunk_rows: int | None) -> None:
    """None or at least 1."""
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"chunk_rows: got {chunk_rows}; wanted None or at least 1")


def check_clip(clip_eps_low: float, clip_eps_high: float, dual_clip: float | None) -> None:
    """Both clip widths at least 0; the dual clip, if any, above 1."""
    for name, value in (("clip_eps_low", clip_eps_low), ("clip_eps_high", clip_eps_high)):
        if not value >= 0:
            raise ValueError(f"{name}: got {value}; wanted 0 or more")
    if dual_clip is not None and not dual_clip > 1:
        raise ValueError(f"dual_clip: got {dual_clip}; wanted None or more than 1")


def check_ratio_level(ratio_level: str, sequence_ids: Tensor | None) -> None:
    """A known level, with sequence ids where it needs them."""
    if ratio_level not in RATIO_LEVELS:
        raise ValueError(f"ratio_level: got {ratio_level!r}; wanted one of {RATIO_LEVELS}")
    if ratio_level == "sequence" and sequence_ids is None:
        raise ValueError("sequence_ids: got None; wanted [N] ids, for ratio_level 'sequence'")


def check_kl(
    kl_estimator: str,
    kl_weights: Tensor | None,
    ref_log_probs: Tensor | None,
    ref_hidden: Tensor | None,
    ref_head_weight: Tensor | None,
) -> None:
    """The reference comes in exactly one form, the one its estimator can use, and is put to use."""
    if kl_estimator not in KL_ESTIMATORS:
        raise ValueError(f"kl_estimator: got {kl_estimator!r}; wanted one of {KL_ESTIMATORS}")
    if ref_head_weight is not None and ref_hidden is None:
        raise ValueError("ref_hidden: got None; wanted [N, D], as ref_head_weight is given")
    if kl_weights is None:
        if ref_log_probs is not None or ref_hidden is not None:
            raise ValueError("kl_weights: got None; wanted [N] weights, as a reference is given")
        return
    if kl_estimator == "exact":
        if ref_hidden is None:
            raise ValueError("ref_hidden: got None; wanted [N, D], for kl_estimator 'exact'")
        if ref_log_probs is not None:
            raise ValueError("ref_log_probs: got a tensor; wanted None, for kl_estimator 'exact'")
    elif (ref_log_probs is None) == (ref_hidden is None):
        got = "neither" if ref_hidden is None else "both"
        raise ValueError(
            f"ref_log_probs: got {got} of ref_log_probs and ref_hidden; wanted exactly one, "
            "as kl_weights is given"
        )


def _check_vector(
    name: str, value: Tensor, size: int, device: torch.device, dtypes: tuple[torch.dtype, ...]
) -> None:
    if tuple(value.shape) != (size,):
        raise ValueError(f"{name}: got shape {tuple(value.shape)}; wanted ({size},)")
    _check_dtype_and_device(name, value, device, dtypes)


def _check_dtype_and_device(
    name: str, value: Tensor, device: torch.device, dtypes: tuple[torch.dtype, ...]
) -> None:
    if value.dtype not in dtypes:
        wanted = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"{name}: got dtype {value.dtype}; wanted one of {wanted}")
    if value.device != device:
        raise ValueError(f"{name}: got device {value.device}; wanted {device}, where hidden is")
