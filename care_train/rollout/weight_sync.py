"""Weights from the trainer into vLLM's model, verified by checksum every time.

Each tensor is copied into the live model through vLLM's own loaders, which know its names and fused
parameters (qkv_proj, gate_up_proj); what they say they filled tells where each tensor has to be
afterwards. Those slices' checksums must be those of the tensors sent, and no parameter may be left
out.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from care_train.rollout.adapter_sync import is_adapter, load_adapter, without_wrappers
from care_train.rollout.checksum import checksum, wrapped
from care_train.rollout.errors import RolloutError


@dataclass(frozen=True)
class SentTensor:
    """A tensor as it left the trainer."""

    name: str
    shape: tuple[int, ...]
    checksum: int


@dataclass(frozen=True)
class SyncReport:
    """What one sync moved."""

    num_tensors: int
    num_bytes: int


def send_weights(
    llm: Any, weights: Iterable[tuple[str, torch.Tensor]], dtype: torch.dtype
) -> SyncReport:
    """Fill vLLM's model, check it, and forget all that was computed with the old weights.

    Args:
        llm: vLLM's `LLM`, in this process.
        weights: Hugging Face names and whole tensors.
        dtype: the precision vLLM holds them in.

    Raises:
        RuntimeError: a tensor vLLM does not take, a parameter that none filled, or one that holds
            other numbers than were sent; named in the message.
    """
    placed: dict[str, list[SentTensor]] = {}
    adapter: dict[str, torch.Tensor] = {}
    num_bytes = 0
    for name, tensor in weights:
        whole = tensor.detach().to(dtype)
        num_bytes += whole.numel() * whole.element_size()
        if is_adapter(name):
            adapter[name] = whole.clone()
            continue
        sent = SentTensor(name, tuple(whole.shape), checksum(whole))
        for parameter in _load(llm, name, whole):
            placed.setdefault(parameter, []).append(sent)
    # An adapter alone comes to base weights that were checked when they were sent.
    if placed or not adapter:
        _check(llm.collective_rpc(find_failures, args=(placed,)))
    if adapter:
        _check(llm.collective_rpc(load_adapter, args=(adapter,)))
    reset_caches(llm)
    num_tensors = sum(len({t.name for t in parts}) for parts in placed.values())
    return SyncReport(num_tensors + len(adapter), num_bytes)


def _check(failures_of_workers: list[list[str]]) -> None:
    for failures in failures_of_workers:
        if failures:
            raise RolloutError(f"weight sync: {failures[0]}")


def _load(llm: Any, name: str, tensor: torch.Tensor) -> set[str]:
    try:
        filled = llm.collective_rpc(load_tensor, args=(name, tensor))[0]
    # What vLLM's loaders raise on unknown names and wrong shapes.
    except (ValueError, KeyError, AttributeError, AssertionError, RuntimeError) as error:
        raise RolloutError(
            f"weight sync: {name!r} {tuple(tensor.shape)}: vLLM could not load it: {error}"
        ) from error
    if not filled:
        raise RolloutError(f"weight sync: {name!r}: vLLM has no parameter of this name")
    return filled


def reset_caches(llm: Any) -> None:
    """Forget keys, values and image features of the old weights.

    With the image cache alone kept, vLLM believes in features that its encoder no longer has.
    """
    if not llm.reset_prefix_cache():
        raise RolloutError("weight sync: vLLM could not reset its prefix cache: requests still run")
    llm.llm_engine.reset_mm_cache()
    llm.llm_engine.reset_encoder_cache()


@torch.inference_mode()
def load_tensor(worker: Any, name: str, tensor: torch.Tensor) -> set[str]:
    """In vLLM's worker: the parameters that one tensor went to."""
    model = worker.model_runner.get_model()
    with without_wrappers(model):
        return set(model.load_weights([(name, tensor)]))


def find_failures(worker: Any, placed: dict[str, list[SentTensor]]) -> list[str]:
    """In vLLM's worker: what is wrong with the model after a sync."""
    model = worker.model_runner.get_model()
    with without_wrappers(model):
        return _failures(model, placed)


def _failures(model: Any, placed: dict[str, list[SentTensor]]) -> list[str]:
    parameters = dict(model.named_parameters())
    failures = [
        f"no tensor was sent for vLLM's {name!r}"
        for name in [*parameters, *_saved_buffers(model)]
        if name not in placed
    ]
    tensor_parallel = _tensor_parallel()
    order = getattr(model, "packed_modules_mapping", {})
    for name, parts in placed.items():
        segments = _segments(model, name, _in_fused_order(name, parts, order))
        pieces = _pieces(parameters[name], segments, tensor_parallel)
        # vLLM pads a vocabulary with zeros.
        if parts[0].shape and parameters[name][sum(piece.rows for piece in pieces) :].any():
            sent = ", ".join(part.name for part in parts)
            failures.append(f"vLLM's {name!r} was sent in part only: {sent}")
        failures += [
            f"{part.name!r}: vLLM's {name!r} holds other numbers than were sent (checksum "
            f"{held & (2**64 - 1):016x}, sent {part.checksum & (2**64 - 1):016x})"
            for part in parts
            if (held := _held_checksum(parameters[name], part, pieces, tensor_parallel))
            != part.checksum
        ]
    return failures


def _saved_buffers(model: Any) -> list[str]:
    """Buffers that a folder would hold, and so random here: vLLM started without one.

    The scales of an attention that is not quantised are set to 1 after loading.
    """
    saved = model.state_dict()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in saved}
    return [n for n, b in buffers.items() if not (n.endswith("_scale") and bool((b == 1).all()))]


@dataclass(frozen=True)
class _TensorParallel:
    rank: int
    size: int
    group: Any


def _tensor_parallel() -> _TensorParallel:
    from vllm.distributed import get_tp_group  # pyright: ignore[reportMissingImports]

    group = get_tp_group()
    return _TensorParallel(group.rank_in_group, group.world_size, group.cpu_group)


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
    first_row: int = 0
    """First row in the sent tensor."""
    first_column: int = 0
    copies: int = 1
    """Ranks that hold the same piece."""


def _in_fused_order(
    parameter: str, parts: list[SentTensor], fused: dict[str, list[str]]
) -> list[SentTensor]:
    """Parts as they lie in the parameter: q, k, v; gate, up."""
    module = parameter.split(".")[-2] if "." in parameter else ""
    names = fused.get(module, [])
    if len(parts) < 2 or not names:
        return parts
    return sorted(parts, key=lambda part: names.index(part.name.split(".")[-2]))


def _segments(model: Any, parameter: str, parts: list[SentTensor]) -> list[_Segment]:
    """The parts; of one that is fused in the folder already (a vision tower's qkv), its own."""
    rows = [part.shape[0] if part.shape else 1 for part in parts]
    owner = model.get_submodule(parameter.rpartition(".")[0])
    inner = getattr(owner, "output_sizes", None)
    if len(parts) > 1 or not inner or sum(inner) != rows[0]:
        return [_Segment(part, 0, count) for part, count in zip(parts, rows, strict=True)]
    starts = [sum(inner[:place]) for place in range(len(inner))]
    return [_Segment(parts[0], first, count) for first, count in zip(starts, inner, strict=True)]


def _pieces(
    parameter: torch.Tensor, segments: list[_Segment], parallel: _TensorParallel
) -> list[_Piece]:
    """Which rows of the parameter hold which segment; vLLM may pad below the last."""
    rows = [segment.rows for segment in segments]
    local, split_columns = list(rows), 0
    if parallel.size > 1:
        last, first = prod(parameter.shape[1:]), prod(segments[0].sent.shape[1:])
        split_columns = last if last != first else 0
        if not split_columns and parameter.shape[0] < sum(rows):
            local = _split_rows(parameter.shape[0], rows, parallel.size)
    pieces, start = [], 0
    for segment, whole, own in zip(segments, rows, local, strict=True):
        copies = max(1, parallel.size * own // whole) if own != whole else parallel.size
        copies = 1 if split_columns else copies
        first_row = parallel.rank // copies * own if own != whole else 0
        first_column = parallel.rank * split_columns
        own = max(0, min(own, whole - first_row))
        place = segment.first_row + first_row
        pieces.append(_Piece(segment.sent, start, own, place, first_column, copies))
        start += own
    return pieces


def _split_rows(held: int, rows: list[int], size: int) -> list[int]:
    """Rows of each part on one rank; key and value heads fewer than ranks are held several times.

    A vocabulary is padded before it is split, so the last rank may have fewer rows than it holds.
    """
    if len(rows) == 1:
        return [held]
    even = [count // size for count in rows]
    if sum(even) == held:
        return even
    return [even[0]] + [(held - even[0]) // (len(rows) - 1)] * (len(rows) - 1)


def _held_checksum(
    parameter: torch.Tensor, part: SentTensor, pieces: list[_Piece], parallel: _TensorParallel
) -> int:
    """Of what the workers hold of one sent tensor together."""
    own = [piece for piece in pieces if piece.sent is part]
    return wrapped(sum(_piece_checksum(parameter, piece, parallel) for piece in own))


def _piece_checksum(parameter: torch.Tensor, piece: _Piece, parallel: _TensorParallel) -> int:
    held = parameter.detach()
    if piece.sent.shape:
        held = held[piece.start : piece.start + piece.rows]
    total = checksum(
        held,
        first_row=piece.first_row,
        first_column=piece.first_column,
        columns=prod(piece.sent.shape[1:]),
    )
    if parallel.size == 1:
        return total
    owns = parallel.rank % piece.copies == 0
    own = torch.tensor([total if owns else 0], dtype=torch.int64)
    totals = [torch.empty_like(own) for _ in range(parallel.size)]
    torch.distributed.all_gather(totals, own, group=parallel.group)
    return wrapped(sum(int(each) for each in totals))
