"""Argument checks. Each raises ValueError with the argument's name, what came and what was wanted.

Values of CUDA tensors are not read, which would stall the device on every call, unless a check says
so: there the range of target ids and spans and the sign of importance weights are not checked.

Shape letters: N rows, B sequences, T tokens, D hidden, V vocabulary.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from care_kernels.objective import KL_ESTIMATORS, Surrogate
from care_kernels.vocab_parallel import VocabShard

FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
INT_DTYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
RATIO_LEVELS = ("token", "sequence")


def wrong(name: str, got: Any, wanted: Any) -> ValueError:
    """The error of an argument that does not fit."""
    return ValueError(f"{name}: got {got}; wanted {wanted}")


def _is_number(value: Any) -> bool:
    """A finite Python number: a tensor might need a gradient, which an option does not get."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and math.isfinite(value)


def _is_count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


_OPTIONS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "temperature": (lambda x: _is_number(x) and x > 0, "a Python number above 0"),
    "logit_softcap": (lambda x: x is None or (_is_number(x) and x > 0), "None or a number above 0"),
    "logit_scale": (_is_number, "a finite number"),
    "chunk_rows": (lambda x: x is None or _is_count(x, 1), "None or an int of at least 1"),
    "backend": (lambda x: x in (None, "triton", "torch"), "None, 'triton' or 'torch'"),
    "surrogate": (lambda x: isinstance(x, Surrogate), "a Clip, a Cispo or a Sapo of care_kernels"),
    "kl_estimator": (lambda x: x in KL_ESTIMATORS, f"one of {KL_ESTIMATORS}"),
    "ratio_level": (lambda x: x in RATIO_LEVELS, f"one of {RATIO_LEVELS}"),
    "return_entropy": (lambda x: isinstance(x, bool), "True or False"),
    "kl_coef": (lambda x: _is_number(x) and x >= 0, "0 or more"),
    "entropy_coef": (_is_number, "a finite number"),
    "think_weight": (lambda x: _is_number(x) and x >= 0, "0 or more"),
    "weight_eps": (lambda x: _is_number(x) and x > 0, "more than 0"),
    "seq_len": (lambda x: x is None or _is_count(x, 0), "None or an int of at least 0"),
    "total_tokens": (lambda x: x is None or _is_count(x, 0), "None or an int of at least 0"),
}
"""Options that are no tensors of numbers: what each may be, as a test and in words."""


def check_options(**options: Any) -> None:
    """Each is one of `_OPTIONS`, and what it may be."""
    for name, value in options.items():
        if name not in _OPTIONS:
            raise wrong("options", repr(name), f"some of {', '.join(_OPTIONS)}")
        is_right, wanted = _OPTIONS[name]
        if isinstance(value, Tensor) or not is_right(value):
            got = f"a {type(value).__name__}" if isinstance(value, Tensor) else repr(value)
            raise wrong(name, got, wanted)


class Shapes:
    """The sizes, by letter, and the device that the tensors of one call share."""

    def __init__(self) -> None:
        self._sizes: dict[str, int] = {}
        self._first: tuple[str, torch.device] | None = None

    def check(
        self, letters: str, dtypes: Iterable[torch.dtype] = FLOAT_DTYPES, **tensors: Any
    ) -> None:
        """Each is a tensor of shape `letters`, of a dtype of `dtypes`, where the first one is.

        A letter such as N stands for the size that it had before; a number stands for itself.
        """
        names = letters.split()
        for name, value in tensors.items():
            if not isinstance(value, Tensor):
                raise wrong(name, f"a {type(value).__name__}", "a tensor")
            if hasattr(value, "full_tensor"):
                wanted = "a plain tensor: a head's from head_parameters, another's full_tensor()"
                raise wrong(name, "a DTensor", wanted)
            sizes = [int(size) if size.isdigit() else self._sizes.get(size) for size in names]
            fits = value.dim() == len(sizes) and all(
                size is None or size == got for size, got in zip(sizes, value.shape, strict=True)
            )
            if not fits:
                pairs = zip(names, sizes, strict=True)
                wanted = ", ".join(name if size is None else str(size) for name, size in pairs)
                comma = "," if len(sizes) == 1 else ""
                raise wrong(name, f"shape {tuple(value.shape)}", f"({wanted}{comma})")
            if value.dtype not in dtypes:
                wanted = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
                raise wrong(name, f"dtype {value.dtype}", f"one of {wanted}")
            if self._first is None:
                self._first = (name, value.device)
            where, device = self._first
            if value.device != device:
                raise wrong(name, f"device {value.device}", f"{device}, where {where} is")
            self._sizes |= zip(names, value.shape, strict=True)

    def check_given(
        self, letters: str, dtypes: Iterable[torch.dtype] = FLOAT_DTYPES, **tensors: Any
    ) -> None:
        """`check` of those that are not None."""
        given = {name: value for name, value in tensors.items() if value is not None}
        self.check(letters, dtypes, **given)


def check_numbers(name: str, value: Tensor) -> None:
    """No meta tensor."""
    if value.device.type == "meta":
        raise wrong(name, "a meta tensor, which holds no numbers", "one that does")


def check_head(hidden: Any, head_weight: Any, target_ids: Any, bias: Any) -> Shapes:
    """hidden [N, D], head_weight [V, D], V >= 1, target_ids [N] int, a finite bias [V] or None."""
    shapes = Shapes()
    shapes.check("N D", hidden=hidden)
    check_numbers("hidden", hidden)
    shapes.check("V D", head_weight=head_weight)
    if head_weight.shape[0] == 0:
        raise wrong("head_weight", f"shape {tuple(head_weight.shape)}", "V >= 1")
    shapes.check("N", INT_DTYPES, target_ids=target_ids)
    shapes.check_given("V", bias=bias)
    if bias is not None and bias.device.type == "cpu":
        if (place := first_true(~bias.isfinite())) is not None:
            raise wrong("bias", f"{float(bias[place])} at {place[0]}", "finite numbers")
    return shapes


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
            got = f"rows {start} to {start + num_local}"
            raise wrong("vocab_shard", got, f"them within 0 to {vocab_size}")
    if target_ids.numel() == 0 or not (read or target_ids.device.type == "cpu"):
        return
    low, high = torch.stack(target_ids.aminmax()).tolist()
    if low < 0 or high >= vocab_size:
        wanted = f"0 to {vocab_size - 1}, and masked rows (-100) left out"
        raise wrong("target_ids", f"ids from {low} to {high}", wanted)


def check_no_graph(name: str) -> None:
    """Within a backward: nobody wants to differentiate it again, which would give zeros."""
    if torch.is_grad_enabled():
        raise wrong(name, "create_graph=True", "False: its gradients are constants")


def check_not_negative(name: str, value: Tensor | None) -> None:
    """No negative number; read on the CPU only."""
    if value is not None and value.device.type == "cpu" and bool((value < 0).any()):
        raise wrong(name, f"a minimum of {float(value.min())}", "0 or more")


def check_kl(
    kl_estimator: str,
    kl_weights: Any,
    ref_log_probs: Any,
    ref_hidden: Any,
    ref_head_weight: Any,
) -> None:
    """The reference comes in exactly one form, the one its estimator can use, and is put to use."""
    if ref_head_weight is not None and ref_hidden is None:
        raise wrong("ref_hidden", None, "[N, D], as ref_head_weight is given")
    if kl_weights is None:
        if ref_log_probs is not None or ref_hidden is not None:
            raise wrong("kl_weights", None, "[N] weights, as a reference is given")
    elif kl_estimator == "exact":
        if ref_hidden is None:
            raise wrong("ref_hidden", None, "[N, D], for kl_estimator 'exact'")
        if ref_log_probs is not None:
            raise wrong("ref_log_probs", "a tensor", "None, for kl_estimator 'exact'")
    elif (ref_log_probs is None) == (ref_hidden is None):
        got = f"{'neither' if ref_hidden is None else 'both'} of ref_log_probs and ref_hidden"
        raise wrong("ref_log_probs", got, "exactly one, as kl_weights is given")


def check_spans(name: str, spans: Tensor, lengths: Tensor | int) -> None:
    """[B, 2] or [B, R, 2] half-open ranges within their sequences, of one length or [B] lengths."""
    if spans.device.type != "cpu":
        return
    start, end = spans.long().unbind(-1)
    limits = torch.as_tensor(lengths).reshape(-1, *(1,) * (start.dim() - 1)).expand(start.shape)
    place = first_true((start < 0) | (start > end) | (end > limits))
    if place is not None:
        got = f"{spans[place].tolist()} at row {place[0]}"
        raise wrong(name, got, f"0 <= start <= end <= {int(limits[place])}")


def check_cu_seqlens(cu_seqlens: Tensor, total_tokens: int | None) -> None:
    """[B + 1] ints that start at 0, never fall and end at or before total_tokens."""
    if cu_seqlens.device.type != "cpu":
        return
    ends = cu_seqlens.long()
    if ends[0] != 0:
        raise wrong("cu_seqlens", f"{int(ends[0])} at row 0", 0)
    if (place := first_true(ends.diff() < 0)) is not None:
        got, before = ends[place[0] + 1], ends[place[0]]
        raise wrong("cu_seqlens", f"{int(got)} at row {place[0] + 1}", f"at least {int(before)}")
    if total_tokens is not None and ends[-1] > total_tokens:
        got = f"{int(ends[-1])} at row {len(ends) - 1}"
        raise wrong("cu_seqlens", got, f"at most {total_tokens}")


def first_true(flags: Tensor) -> tuple[int, ...] | None:
    """Index of the first true entry, if any."""
    places = flags.nonzero()
    return tuple(int(index) for index in places[0]) if len(places) else None
