"""Padded batches of prompt and response, and which rows of hidden state predict which token."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from care_train.models.images import image_inputs
from care_train.models.prompts import EncodedPrompt


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


@dataclass(frozen=True)
class ModelBatch:
    """Right-padded inputs and the N = sum of response lengths rows that a loss reads."""

    inputs: dict[str, torch.Tensor]
    """Keyword arguments of the model's backbone, after `with_encoded_images`."""
    rows: torch.Tensor
    """[N] int64 into the flattened [B*T] hidden states: the state that predicts each token."""
    target_ids: torch.Tensor
    """[N] int64: the response tokens, sequence after sequence."""
    sequence_ids: torch.Tensor
    """[N] int64: which sequence of the batch each row belongs to."""
    response_starts: tuple[int, ...]
    """Position of each sequence's first response token."""

    def to(self, device: torch.device) -> "ModelBatch":
        return ModelBatch(
            {key: value.to(device) for key, value in self.inputs.items()},
            self.rows.to(device),
            self.target_ids.to(device),
            self.sequence_ids.to(device),
            self.response_starts,
        )


def collate(
    sequences: Sequence[TokenSequence], pad_token_id: int, image_token_id: int | None
) -> ModelBatch:
    """Right-pad sequences into one batch."""
    ids = [sequence.token_ids for sequence in sequences]
    width = max(len(row) for row in ids)
    input_ids = torch.full((len(ids), width), pad_token_id, dtype=torch.int64)
    attention_mask = torch.zeros((len(ids), width), dtype=torch.int64)
    for place, row in enumerate(ids):
        input_ids[place, : len(row)] = torch.tensor(row, dtype=torch.int64)
        attention_mask[place, : len(row)] = 1
    starts = tuple(sequence.response_start for sequence in sequences)
    lengths = [len(sequence.response_ids) for sequence in sequences]
    rows = [
        torch.arange(place * width + start - 1, place * width + start - 1 + length)
        for place, (start, length) in enumerate(zip(starts, lengths, strict=True))
    ]
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    inputs |= image_inputs([sequence.prompt for sequence in sequences], input_ids, image_token_id)
    return ModelBatch(
        inputs,
        torch.cat(rows),
        torch.tensor([t for s in sequences for t in s.response_ids], dtype=torch.int64),
        torch.repeat_interleave(torch.arange(len(ids)), torch.tensor(lengths)),
        starts,
    )
