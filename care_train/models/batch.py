"""Batches of prompt and response, padded or packed, and which hidden state predicts which token."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch

from care_train.models.images import image_inputs
from care_train.models.prompts import EncodedPrompt

PACKABLE = ("qwen2", "qwen2_5_vl", "qwen3", "qwen3_vl")
"""Model types whose packed forward is tested to equal the padded one."""


@dataclass(frozen=True)
class TokenSequence:
    """Prompt, forced prefix and response of one sequence."""

    prompt: EncodedPrompt
    prefix_ids: tuple[int, ...]
    response_ids: tuple[int, ...]

    @property
    def token_ids(self) -> tuple[int, ...]:
        return self.prompt.token_ids + self.prefix_ids + self.response_ids

    @property
    def response_start(self) -> int:
        """Position of the first response token."""
        return len(self.prompt.token_ids) + len(self.prefix_ids)


Positions = Callable[[Sequence[TokenSequence]], torch.Tensor]
"""[R, sum of lengths] int64: R kinds of position ids, the first counts each sequence from 0."""


@dataclass(frozen=True)
class ModelBatch:
    """A backbone's inputs and the N = sum of response lengths rows that a loss reads."""

    inputs: dict[str, torch.Tensor]
    """Keyword arguments of the model's backbone, after `with_encoded_images`."""
    rows: torch.Tensor
    """[N] int64 into the flattened [B*T] hidden states: the state that predicts each token."""
    target_ids: torch.Tensor
    """[N] int64: the response tokens, sequence after sequence."""
    sequence_ids: torch.Tensor
    """[N] int64: which sequence of the batch each row belongs to."""
    row_starts: torch.Tensor
    """[B] int64: where a sequence starts in its row of the inputs; zeros but where packed."""

    def to(self, device: torch.device) -> "ModelBatch":
        return ModelBatch(
            {key: value.to(device) for key, value in self.inputs.items()},
            self.rows.to(device),
            self.target_ids.to(device),
            self.sequence_ids.to(device),
            self.row_starts.to(device),
        )


def collate(
    sequences: Sequence[TokenSequence], pad_token_id: int, image_token_id: int | None
) -> ModelBatch:
    """Right-pad sequences into one batch: inputs [B, T], T the longest."""
    ids = [sequence.token_ids for sequence in sequences]
    width = max(map(len, ids))
    input_ids = torch.full((len(ids), width), pad_token_id, dtype=torch.int64)
    attention_mask = torch.zeros((len(ids), width), dtype=torch.int64)
    for place, row in enumerate(ids):
        input_ids[place, : len(row)] = torch.tensor(row, dtype=torch.int64)
        attention_mask[place, : len(row)] = 1
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    inputs |= image_inputs([sequence.prompt for sequence in sequences], input_ids, image_token_id)
    starts = [place * width for place in range(len(ids))]
    return _batch(sequences, inputs, starts, row_starts=[0] * len(ids))


def pack(
    sequences: Sequence[TokenSequence], positions: Positions, image_token_id: int | None
) -> ModelBatch:
    """Lay sequences end to end without padding: inputs [1, sum of lengths].

    There is no attention mask: a first kind of position that begins anew is what makes
    transformers (masking_utils.py, modeling_flash_attention_utils.py) keep sequences apart.

    Args:
        sequences: what to pack.
        positions: of `packed_positions`.
        image_token_id: placeholder of an image's tokens.
    """
    ids = [sequence.token_ids for sequence in sequences]
    input_ids = torch.tensor([[token for row in ids for token in row]], dtype=torch.int64)
    position_ids = positions(sequences)
    if len(position_ids) > 1:
        position_ids = position_ids.unsqueeze(1)
    inputs = {"input_ids": input_ids, "position_ids": position_ids}
    inputs |= image_inputs([sequence.prompt for sequence in sequences], input_ids, image_token_id)
    starts = [0, *accumulate(map(len, ids[:-1]))]
    return _batch(sequences, inputs, starts, row_starts=starts)


def _batch(
    sequences: Sequence[TokenSequence],
    inputs: dict[str, torch.Tensor],
    starts: Sequence[int],
    row_starts: Sequence[int],
) -> ModelBatch:
    """Rows and targets of sequences that start at `starts` in the flattened hidden states."""
    lengths = [len(sequence.response_ids) for sequence in sequences]
    # The state before a token predicts it.
    firsts = [s + q.response_start - 1 for s, q in zip(starts, sequences, strict=True)]
    rows = [torch.arange(f, f + n) for f, n in zip(firsts, lengths, strict=True)]
    return ModelBatch(
        inputs,
        torch.cat(rows),
        torch.tensor([t for s in sequences for t in s.response_ids], dtype=torch.int64),
        torch.repeat_interleave(torch.arange(len(sequences)), torch.tensor(lengths)),
        torch.tensor(row_starts),
    )


def packed_positions(model: Any) -> Positions:
    """What `pack` asks for position ids.

    A text model's are [1, T], counting from 0 in each sequence. A model with multimodal rotary
    embeddings gets [4, T]: the same count, which tells packed sequences apart, then time, height
    and width, as transformers computes them for a sequence alone (`get_rope_index`).

    Raises:
        ValueError: a model whose packed forward is not tested.
    """
    kind = model.config.model_type
    if kind not in PACKABLE:
        raise ValueError(
            f"train.packing: got true with a {kind} model ({type(model).__name__}), whose packed "
            f"forward is not known to equal the padded one; wanted {', '.join(PACKABLE)}, or "
            "train.packing=false"
        )
    if not hasattr(model.base_model, "get_rope_index"):
        return lambda sequences: torch.cat(list(map(_count, sequences))).unsqueeze(0)

    def multimodal(sequences: Sequence[TokenSequence]) -> torch.Tensor:
        # A group's rollouts share their prompt, and prompts are long.
        axes = {prompt: _prompt_axes(model, prompt) for prompt in {s.prompt for s in sequences}}
        return torch.cat(
            [torch.cat([_count(s)[None], _extended(axes[s.prompt], s)]) for s in sequences],
            dim=1,
        )

    return multimodal


def _prompt_axes(model: Any, prompt: EncodedPrompt) -> torch.Tensor:
    """[3, T] time, height and width of a prompt's tokens."""
    input_ids = torch.tensor([prompt.token_ids])
    types = (input_ids == model.config.image_token_id).int()
    axes, _ = model.base_model.get_rope_index(
        input_ids, types, image_grid_thw=prompt.image_grid_thw
    )
    return axes[:, 0]


def _extended(axes: torch.Tensor, sequence: TokenSequence) -> torch.Tensor:
    """Behind the prompt there is only text, which counts on in all three."""
    behind = len(sequence.token_ids) - axes.shape[1]
    first = int(axes.max()) + 1
    return torch.cat([axes, torch.arange(first, first + behind).expand(3, -1)], dim=1)


def _count(sequence: TokenSequence) -> torch.Tensor:
    return torch.arange(len(sequence.token_ids))
