"""Argument checks of the functions that take batches of sequences and their spans.

As in `_checks`, a CUDA tensor's values are never read: they are checked on CPU tensors only.

Shape letters: B sequences, T tokens, D hidden, V vocabulary.
"""

import torch
from torch import Tensor

from care_kernels._checks import (
    FLOAT_DTYPES,
    INT_DTYPES,
    KL_ESTIMATORS,
    RATIO_LEVELS,
    check_matrix,
)


def check_tensor(
    name: str,
    value: Tensor,
    shape: tuple[int | None, ...],
    dtypes: tuple[torch.dtype, ...],
    where: tuple[str, Tensor],
) -> None:
    """Shape (None leaves a size free), dtype, and the device of the named tensor `where`."""
    fits = value.dim() == len(shape) and all(
        size is None or size == got for size, got in zip(shape, value.shape, strict=True)
    )
    if not fits:
        sizes = ["any" if size is None else str(size) for size in shape]
        wanted = f"({', '.join(sizes)}{',' if len(sizes) == 1 else ''})"
        raise ValueError(f"{name}: got shape {tuple(value.shape)}; wanted {wanted}")
    if value.dtype not in dtypes:
        wanted = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"{name}: got dtype {value.dtype}; wanted one of {wanted}")
    other_name, other = where
    if value.device != other.device:
        raise ValueError(
            f"{name}: got device {value.device}; wanted {other.device}, where {other_name} is"
        )


def check_spans(
    name: str,
    spans: Tensor,
    num_sequences: int,
    lengths: Tensor | int,
    where: tuple[str, Tensor],
) -> None:
    """[B, 2] half-open ranges within their sequences, whose lengths are one number or [B]."""
    check_tensor(name, spans, (num_sequences, 2), INT_DTYPES, where)
    if spans.device.type != "cpu":
        return
    start, end = spans.long().unbind(1)
    row = first_true((start < 0) | (start > end) | (end > lengths))
    if row is not None:
        limit = lengths if isinstance(lengths, int) else int(lengths[row])
        raise ValueError(
            f"{name}: got {spans[row].tolist()} at row {row}; wanted 0 <= start <= end <= {limit}"
        )


def check_cu_seqlens(
    cu_seqlens: Tensor, num_sequences: int, total_tokens: int | None, where: tuple[str, Tensor]
) -> None:
    """[B + 1] ints that start at 0, never fall and end at or before total_tokens."""
    check_tensor("cu_seqlens", cu_seqlens, (num_sequences + 1,), INT_DTYPES, where)
    if cu_seqlens.device.type != "cpu":
        return
    ends = cu_seqlens.long()
    if ends[0] != 0:
        raise ValueError(f"cu_seqlens: got {int(ends[0])} at row 0; wanted 0")
    row = first_true(ends.diff() < 0)
    if row is not None:
        got, before = int(ends[row + 1]), int(ends[row])
        raise ValueError(f"cu_seqlens: got {got} at row {row + 1}; wanted at least {before}")
    if total_tokens is not None and ends[-1] > total_tokens:
        raise ValueError(
            f"cu_seqlens: got {int(ends[-1])} at row {num_sequences}; wanted at most {total_tokens}"
        )


def check_loss_options(kl_coef: float, kl_estimator: str, ratio_level: str) -> None:
    """A coefficient of at least 0, and known names."""
    if not kl_coef >= 0:
        raise ValueError(f"kl_coef: got {kl_coef}; wanted 0 or more")
    if kl_estimator not in KL_ESTIMATORS:
        raise ValueError(f"kl_estimator: got {kl_estimator!r}; wanted {KL_ESTIMATORS}")
    if ratio_level not in RATIO_LEVELS:
        raise ValueError(f"ratio_level: got {ratio_level!r}; wanted {RATIO_LEVELS}")


def check_reference_form(
    kl_coef: float, ref_log_probs: Tensor | None, ref_hidden: Tensor | None
) -> None:
    """A reference exactly where there is a KL, in one of its two forms."""
    num_forms = (ref_log_probs is not None) + (ref_hidden is not None)
    if kl_coef and num_forms != 1:
        got = "both" if num_forms else "neither"
        raise ValueError(
            f"ref_log_probs: got {got} of ref_log_probs and ref_hidden; wanted exactly one, as "
            f"kl_coef is {kl_coef}"
        )
    if num_forms and not kl_coef:
        raise ValueError(f"kl_coef: got {kl_coef}; wanted more than 0, as a reference is given")


def check_loss_batch(
    hidden: Tensor,
    head_weight: Tensor,
    token_ids: Tensor,
    advantages: Tensor,
    response_mask: Tensor | None,
    num_sequences: float | Tensor | None,
    ref_hidden: Tensor | None,
    ref_head_weight: Tensor | None,
    **per_token: Tensor | None,
) -> None:
    """Shapes, dtypes and devices of `care_loss`'s tensors; `per_token` are [B, T] floats."""
    _check_matrices(hidden, head_weight, ref_hidden, ref_head_weight)
    where = ("hidden", hidden)
    num_rows, num_tokens, _ = hidden.shape
    check_tensor("token_ids", token_ids, (num_rows, num_tokens), INT_DTYPES, where)
    check_tensor("advantages", advantages, (num_rows,), FLOAT_DTYPES, where)
    if response_mask is not None:
        dtypes = (torch.bool, *INT_DTYPES)
        check_tensor("response_mask", response_mask, (num_rows, num_tokens), dtypes, where)
    for name, value in per_token.items():
        if value is not None:
            check_tensor(name, value, (num_rows, num_tokens), FLOAT_DTYPES, where)
    if num_sequences is not None:
        _check_num_sequences(num_sequences)


def _check_matrices(
    hidden: Tensor, head_weight: Tensor, ref_hidden: Tensor | None, ref_head_weight: Tensor | None
) -> None:
    where = ("hidden", hidden)
    check_tensor("hidden", hidden, (None, None, None), FLOAT_DTYPES, where)
    width = hidden.shape[2]
    check_matrix("head_weight", head_weight, hidden.device, num_columns=width)
    if ref_head_weight is not None:
        vocab_size = head_weight.shape[0]
        check_matrix("ref_head_weight", ref_head_weight, hidden.device, num_rows=vocab_size)
        width = ref_head_weight.shape[1]
    if ref_hidden is not None:
        shape = (*hidden.shape[:2], width)
        check_tensor("ref_hidden", ref_hidden, shape, FLOAT_DTYPES, where)


def _check_num_sequences(num_sequences: float | Tensor) -> None:
    if isinstance(num_sequences, Tensor):
        if num_sequences.dim() != 0:
            raise ValueError(f"num_sequences: got shape {tuple(num_sequences.shape)}; wanted ()")
        if num_sequences.device.type != "cpu":
            return
    if not num_sequences > 0:
        raise ValueError(f"num_sequences: got {float(num_sequences)}; wanted more than 0")


def check_response(
    response_mask: Tensor | None, per_token: Tensor, token_ids: Tensor, vocab_size: int
) -> None:
    """Each response token has a hidden state before it and an id; read on the CPU only."""
    if token_ids.device.type != "cpu":
        return
    has_advantage = per_token != 0
    response = has_advantage if response_mask is None else response_mask.bool()
    place = _first(response[:, :1])
    if place is not None:
        name = "think_spans, answer_spans" if response_mask is None else "response_mask"
        raise ValueError(
            f"{name}: got token 0 of row {place[0]}; wanted token 1 or later, as no hidden state "
            "predicts it"
        )
    place = _first(has_advantage & ~response)
    if place is not None:
        raise ValueError(
            f"response_mask: got False at token {place[1]} of row {place[0]}; wanted True, as a "
            "span gives it an advantage"
        )
    place = _first(response & ((token_ids < 0) | (token_ids >= vocab_size)))
    if place is not None:
        raise ValueError(
            f"token_ids: got {int(token_ids[place])} at token {place[1]} of row {place[0]}; wanted "
            f"0 to {vocab_size - 1}"
        )


def _first(flags: Tensor) -> tuple[int, int] | None:
    """Row and token of the first true entry of [B, T], if any."""
    places = flags.nonzero()
    return (int(places[0, 0]), int(places[0, 1])) if len(places) else None


def first_true(flags: Tensor) -> int | None:
    """Index of the first true entry of [B], if any."""
    rows = flags.nonzero()
    return int(rows[0]) if len(rows) else None
