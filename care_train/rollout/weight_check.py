"""In vLLM's workers: whether the model holds exactly the tensors that the trainer sent.

What vLLM's loaders said they filled tells where each tensor has to be: on which rows of which
parameter, and under tensor parallelism on which rank. The checksums of those slices must add up to
those of the tensors, and no parameter may have been left out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from care_train.rollout.weight_sync import SentTensor, add_checksums, checksum

ADAPTER_ID = 1
"""The number by which vLLM knows the policy's adapter."""


@dataclass(frozen=True)
class _Ranks:
    """The workers that share one copy of the weights."""

    rank: int
    size: int
    group: Any


@dataclass(frozen=True)
class _Segment:
    """Rows of a sent tensor that tensor parallelism splits on their own."""

    sent: SentTensor
    first_row: int
    rows: int


@dataclass(frozen=True)
class _Piece:
    """Where in this rank's parameter a segment, or this rank's share of it, lies."""

    sent: SentTensor
    start: int
    """First row in the parameter."""
    rows: int
    first_row: int
    """First row in the sent tensor."""
    first_column: int
    copies: int
    """Number of ranks that hold the same piece."""


def find_failures(model: Any, filled: Mapping[str, Sequence[SentTensor]]) -> list[str]:
    """What is wrong with a model after a sync, for people; due on all workers.

    Args:
        model: vLLM's, without wrappers for adapters.
        filled: names of the model's parameters, and what its loaders filled each with.
    """
    from vllm.distributed import get_tp_group  # pyright: ignore[reportMissingImports]

    group = get_tp_group()
    ranks = _Ranks(group.rank_in_group, group.world_size, group.cpu_group)
    parameters = dict(model.named_parameters())
    failures = [
        f"no tensor was sent for vLLM's {name!r}"
        for name in [*parameters, *_saved_buffers(model)]
        if name not in filled
    ]
    for name, sent in filled.items():
        parameter = parameters[name].detach()
        pieces = _pieces(parameter, _segments(model, name, sent), ranks)
        # vLLM pads a vocabulary with zeros.
        if sent[0].shape and parameter[sum(piece.rows for piece in pieces) :].any():
            names = ", ".join(tensor.name for tensor in sent)
            failures.append(f"vLLM's {name!r} was sent in part only: {names}")
        for tensor in sent:
            own = [piece for piece in pieces if piece.sent is tensor]
            held = _held_checksum(parameter, own, ranks)
            if held != tensor.checksum:
                failures.append(
                    f"{tensor.name!r}: vLLM's {name!r} holds other numbers than were sent "
                    f"(checksum {held % 2**64:016x}, sent {tensor.checksum % 2**64:016x})"
                )
    return failures


def _saved_buffers(model: Any) -> list[str]:
    """Buffers that belong to a checkpoint, and would be random here: vLLM started without one.

    Not the scales of an attention without quantisation, which vLLM sets to 1 after loading.
    """
    saved = model.state_dict()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in saved}
    return [n for n, b in buffers.items() if not (n.endswith("_scale") and bool((b == 1).all()))]


def _segments(model: Any, parameter: str, sent: Sequence[SentTensor]) -> list[_Segment]:
    """The parts of a parameter as they lie in it: q, k, v; gate, up.

    Of a tensor that is fused in the checkpoint already (a vision tower's qkv), its own parts.
    """
    module, _, _ = parameter.rpartition(".")
    order = getattr(model, "packed_modules_mapping", {}).get(module.rpartition(".")[2])
    if len(sent) > 1:
        if order:
            sent = sorted(sent, key=lambda tensor: order.index(tensor.name.split(".")[-2]))
        return [_Segment(tensor, 0, tensor.shape[0]) for tensor in sent]
    rows = sent[0].shape[0] if sent[0].shape else 1
    inner = getattr(model.get_submodule(module), "output_sizes", None) or [rows]
    if sum(inner) != rows:
        inner = [rows]
    starts = [sum(inner[:index]) for index in range(len(inner))]
    return [_Segment(sent[0], first, count) for first, count in zip(starts, inner, strict=True)]


def _pieces(parameter: torch.Tensor, segments: list[_Segment], ranks: _Ranks) -> list[_Piece]:
    """Which rows of the parameter hold which segment; vLLM may pad below the last."""
    rows = [segment.rows for segment in segments]
    held, columns = rows, prod(parameter.shape[1:])
    splits_columns = ranks.size > 1 and columns != prod(segments[0].sent.shape[1:])
    splits_rows = bool(parameter.shape) and parameter.shape[0] < sum(rows)
    if ranks.size > 1 and splits_rows and not splits_columns:
        held = _split_rows(parameter.shape[0], rows, ranks.size)
    pieces: list[_Piece] = []
    start = 0
    for segment, count in zip(segments, held, strict=True):
        # Whole on every rank, unless rows or columns are split.
        copies, first_row = ranks.size, 0
        if count != segment.rows:
            copies = max(1, ranks.size * count // segment.rows)
            first_row = ranks.rank // copies * count
        count = max(0, min(count, segment.rows - first_row))
        first_column = ranks.rank * columns if splits_columns else 0
        copies = 1 if splits_columns else copies
        first_row += segment.first_row
        pieces.append(_Piece(segment.sent, start, count, first_row, first_column, copies))
        start += count
    return pieces


def _split_rows(held: int, rows: list[int], size: int) -> list[int]:
    """Rows of each segment on one rank, of the `held` ones.

    Key and value heads are held several times where they are fewer than ranks. A vocabulary is
    padded before it is split, so the last rank may have fewer rows than it holds.
    """
    if len(rows) == 1:
        return [held]
    even = [count // size for count in rows]
    if sum(even) == held:
        return even
    return [even[0]] + [(held - even[0]) // (len(rows) - 1)] * (len(rows) - 1)


def _held_checksum(parameter: torch.Tensor, pieces: Sequence[_Piece], ranks: _Ranks) -> int:
    """Of what all workers together hold of one sent tensor."""
    own = [
        checksum(
            parameter[piece.start : piece.start + piece.rows] if piece.sent.shape else parameter,
            first_row=piece.first_row,
            first_column=piece.first_column,
            columns=prod(piece.sent.shape[1:]),
        )
        for piece in pieces
        # Of several ranks with the same piece, one counts it.
        if ranks.rank % piece.copies == 0
    ]
    if ranks.size == 1:
        return add_checksums(own)
    total = torch.tensor([add_checksums(own)], dtype=torch.int64)
    totals = [torch.empty_like(total) for _ in range(ranks.size)]
    torch.distributed.all_gather(totals, total, group=ranks.group)
    return add_checksums(int(each) for each in totals)


def find_adapter_failures(manager: Any, sent: Mapping[str, Sequence[torch.Tensor]]) -> list[str]:
    """What is wrong with the adapter in vLLM's first slot, for people.

    Args:
        manager: vLLM's `LoRAModelManager`.
        sent: names of layers, and A [rank, in] and B [out, rank] of each.
    """
    slot = manager.lora_index_to_id.index(ADAPTER_ID)
    failures, known = [], set[str]()
    for name, module in manager.modules.items():
        parts = manager.packed_modules.get(name, [name])
        known |= sent.keys() & set(parts)
        halves = [sent.get(part, (None, None)) for part in parts]
        for which, (stack, share) in enumerate(
            (
                (module.lora_a_stacked, module.slice_lora_a),
                (module.lora_b_stacked, module.slice_lora_b),
            )
        ):
            # An embedding and the head have one tensor, not one for each of several parts.
            held = [part[slot] for part in (stack if isinstance(stack, tuple) else (stack,))]
            wanted: list[Any] = [half[which] for half in halves]
            if getattr(module, "tp_size", 1) > 1 and any(half is not None for half in wanted):
                wanted = share(wanted) if len(wanted) > 1 else [share(wanted[0])]
            failures += [
                f"adapter of {part!r}: vLLM holds other numbers than were sent"
                for part, own, whole in zip(parts, held, wanted, strict=True)
                if not _is_held(own, whole)
            ]
    unknown = [f"adapter of {name!r}: vLLM adapts no such layer" for name in sent.keys() - known]
    return sorted(unknown) + failures


def _is_held(held: torch.Tensor, wanted: torch.Tensor | None) -> bool:
    """Whether a slot has these numbers, and zeros beside them: vLLM pads the rank."""
    held = held.reshape(-1, held.shape[-1])
    if wanted is None:
        return not held.any()
    rows, columns = wanted.shape
    is_same = torch.equal(held[:rows, :columns].cpu(), wanted.to(held.dtype).cpu())
    return is_same and not held[rows:].any() and not held[:rows, columns:].any()
