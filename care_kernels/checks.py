"""Argument checks. Each raises ValueError with the argument's name, what came and what was wanted.

Values of CUDA tensors are not read, which would stall the device on every call, unless a check says
so: there the range of target ids and spans and the sign of importance weights are not checked.

Shape letters: N rows, B sequences, T tokens, D hidden, V vocabulary.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from care_kernels.objective import KL_ESTIMATORS, Cispo, Clip, Sapo
from care_kernels.vocab_parallel import VocabShard

FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
INT_DTYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
RATIO_LEVELS = ("token", "sequence")

Shape = tuple[int | None, ...]


def check_tensor(
    name: str,
    value: Any,
    shape: Shape,
    dtypes: Iterable[torch.dtype] = FLOAT_DTYPES,
    like: tuple[str, Tensor] | None = None,
) -> None:
    """A tensor of `shape` (None leaves a size free), of a dtype of `dtypes`, where `like` is."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{name}: got a {type(value).__name__}; wanted a tensor")
    fits = value.dim() == len(shape) and all(
        size is None or size == got for size, got in zip(shape, value.shape, strict=True)
    )
    if not fits:
        sizes = ", ".join("any" if size is None else str(size) for size in shape)
        comma = "," if len(shape) == 1 else ""
        raise ValueError(f"{name}: got shape {tuple(value.shape)}; wanted ({sizes}{comma})")
    if value.dtype not in dtypes:
        wanted = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"{name}: got dtype {value.dtype}; wanted one of {wanted}")
    if like is not None and value.device != like[1].device:
        raise ValueError(
            f"{name}: got device {value.device}; wanted {like[1].device}, where {like[0]} is"
        )


def check_head(hidden: Any, head_weight: Any, target_ids: Any, bias: Any) -> None:
    """hidden [N, D], head_weight [V, D], V >= 1, target_ids [N] int, a finite bias [V] or None."""
    check_tensor("hidden", hidden, (None, None))
    if hidden.device.type == "meta":
        raise ValueError("hidden: got a meta tensor, which holds no numbers; wanted one that does")
    like = ("hidden", hidden)
    check_tensor("head_weight", head_weight, (None, hidden.shape[1]), like=like)
    if head_weight.shape[0] == 0:
        raise ValueError(f"head_weight: got shape {tuple(head_weight.shape)}; wanted V >= 1")
    check_tensor("target_ids", target_ids, (hidden.shape[0],), INT_DTYPES, like)
    if bias is not None:
        check_tensor("bias", bias, (head_weight.shape[0],), like=like)
        if bias.device.type == "cpu" and not bool(bias.isfinite().all()):
            place = int((~bias.isfinite()).nonzero()[0, 0])
            raise ValueError(f"bias: got {float(bias[place])} at {place}; wanted finite numbers")


def check_rows(
    hidden: Tensor, dtypes: Iterable[torch.dtype] = FLOAT_DTYPES, **vectors: Any
) -> None:
    """Each is None or one number for each row of `hidden`, named by its keyword."""
    for name, value in vectors.items():
        if value is not None:
            check_tensor(name, value, (hidden.shape[0],), dtypes, ("hidden", hidden))


def check_reference(
    hidden: Tensor, head_weight: Tensor, ref_hidden: Any, ref_head_weight: Any
) -> None:
    """ref_hidden [N, D'] and a head [V, D'], which is head_weight unless another is given."""
    if ref_hidden is None:
        return
    like = ("hidden", hidden)
    if ref_head_weight is not None:
        check_tensor("ref_head_weight", ref_head_weight, (head_weight.shape[0], None), like=like)
    width = (head_weight if ref_head_weight is None else ref_head_weight).shape[1]
    check_tensor("ref_hidden", ref_hidden, (*hidden.shape[:-1], width), like=like)


def check_targets(
    target_ids: Tensor,
    head_weight: Tensor,
    vocab_shard: VocabShard | None = None,
    *,
    read: bool = False,
) -> None:
    """Ids within the vocabulary, on the CPU or where `read` allows it; a shard within it too."""
    vocab_size = num_local = head_weight.shape[0]
    if vocab_shard is not None:
        vocab_size, start = vocab_shard.vocab_size, vocab_shard.start
        if start < 0 or start + num_local > vocab_size:
            raise ValueError(
                f"vocab_shard: got rows {start} to {start + num_local}; wanted them within "
                f"0 to {vocab_size}"
            )
    if target_ids.numel() == 0 or not (read or target_ids.device.type == "cpu"):
        return
    low, high = torch.stack(target_ids.aminmax()).tolist()
    if low < 0 or high >= vocab_size:
        raise ValueError(f"target_ids: got ids from {low} to {high}; wanted 0 to {vocab_size - 1}")


def check_no_graph(name: str) -> None:
    """Within a backward: nobody wants to differentiate it again, which would give zeros."""
    if torch.is_grad_enabled():
        raise ValueError(
            f"{name}: got create_graph=True; wanted False: its gradients are constants, of which "
            "second derivatives would be wrong"
        )


def check_weight_grad(weight_grad: Any, head_weight: Tensor) -> None:
    """A buffer like head_weight, in any floating dtype, outside any graph."""
    shape = tuple(head_weight.shape)
    check_tensor("weight_grad", weight_grad, shape, like=("head_weight", head_weight))
    if weight_grad.requires_grad:
        raise ValueError("weight_grad: got a tensor that requires grad; wanted a plain buffer")


def check_not_negative(name: str, value: Tensor | None) -> None:
    """No negative number; read on the CPU only."""
    if value is None or value.device.type != "cpu" or value.numel() == 0:
        return
    lowest = float(value.min())
    if lowest < 0:
        raise ValueError(f"{name}: got a minimum of {lowest}; wanted 0 or more")


def check_number(
    name: str, value: Any, wanted: str, *, least: float = -math.inf, above: float = -math.inf
) -> None:
    """A finite Python number, at least `least` and over `above`; a tensor would need a gradient."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (is_number and math.isfinite(value) and value >= least and value > above):
        got = f"a {type(value).__name__}" if not is_number else repr(value)
        raise ValueError(f"{name}: got {got}; wanted {wanted}")


def check_transform(
    temperature: float, logit_softcap: float | None, logit_scale: float = 1.0
) -> None:
    """A positive temperature; a positive softcap or None; a finite scale."""
    check_number("temperature", temperature, "more than 0", above=0)
    if logit_softcap is not None:
        check_number("logit_softcap", logit_softcap, "None or more than 0", above=0)
    check_number("logit_scale", logit_scale, "a finite number")


def check_chunk_rows(chunk_rows: int | None) -> None:
    """None or a whole number of at least 1."""
    if chunk_rows is None:
        return
    if not isinstance(chunk_rows, int) or isinstance(chunk_rows, bool) or chunk_rows < 1:
        raise ValueError(f"chunk_rows: got {chunk_rows!r}; wanted None or an int of at least 1")


def check_surrogate(surrogate: Any) -> None:
    """One of the surrogates that `objective` defines."""
    if not isinstance(surrogate, Clip | Cispo | Sapo):
        raise ValueError(
            f"surrogate: got {surrogate!r}; wanted a Clip, a Cispo or a Sapo of care_kernels"
        )


def check_ratio_level(ratio_level: str, sequence_ids: Tensor | None) -> None:
    """A known level, with sequence ids where it needs them."""
    if ratio_level not in RATIO_LEVELS:
        raise ValueError(f"ratio_level: got {ratio_level!r}; wanted one of {RATIO_LEVELS}")
    if ratio_level == "sequence" and sequence_ids is None:
        raise ValueError("sequence_ids: got None; wanted [N] ids, for ratio_level 'sequence'")


def check_kl(
    kl_estimator: str,
    kl_weights: Any,
    ref_log_probs: Any,
    ref_hidden: Any,
    ref_head_weight: Any,
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


def check_spans(
    name: str, spans: Any, shape: Shape, lengths: Tensor | int, like: tuple[str, Tensor]
) -> None:
    """[B, 2] or [B, R, 2] half-open ranges within their sequences, of one length or [B] lengths."""
    check_tensor(name, spans, shape, INT_DTYPES, like)
    if spans.device.type != "cpu":
        return
    start, end = spans.long().unbind(-1)
    limits = torch.as_tensor(lengths).reshape(-1, *(1,) * (start.dim() - 1)).expand(start.shape)
    place = first_true((start < 0) | (start > end) | (end > limits))
    if place is not None:
        raise ValueError(
            f"{name}: got {spans[place].tolist()} at row {place[0]}; wanted "
            f"0 <= start <= end <= {int(limits[place])}"
        )


def check_cu_seqlens(
    cu_seqlens: Any, num_sequences: int, total_tokens: int | None, like: tuple[str, Tensor]
) -> None:
    """[B + 1] ints that start at 0, never fall and end at or before total_tokens."""
    check_tensor("cu_seqlens", cu_seqlens, (num_sequences + 1,), INT_DTYPES, like)
    if cu_seqlens.device.type != "cpu":
        return
    ends = cu_seqlens.long()
    if ends[0] != 0:
        raise ValueError(f"cu_seqlens: got {int(ends[0])} at row 0; wanted 0")
    place = first_true(ends.diff() < 0)
    if place is not None:
        got, before = int(ends[place[0] + 1]), int(ends[place[0]])
        raise ValueError(f"cu_seqlens: got {got} at row {place[0] + 1}; wanted at least {before}")
    if total_tokens is not None and ends[-1] > total_tokens:
        raise ValueError(
            f"cu_seqlens: got {int(ends[-1])} at row {num_sequences}; wanted at most {total_tokens}"
        )


def first_true(flags: Tensor) -> tuple[int, ...] | None:
    """Index of the first true entry, if any."""
    places = flags.nonzero()
    return tuple(int(index) for index in places[0]) if len(places) else None
