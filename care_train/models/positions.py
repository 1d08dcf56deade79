"""Position ids of packed sequences, by the model's own rules."""

from collections.abc import Sequence
from typing import Any

import torch

from care_train.models.batch import Positions, TokenSequence
from care_train.models.prompts import EncodedPrompt

PACKABLE = ("qwen2", "qwen2_5_vl", "qwen3", "qwen3_vl")
"""Model types whose packed forward is tested to equal the padded one."""


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
        prompts = {id(s.prompt): s.prompt for s in sequences}
        axes = {key: _prompt_axes(model, prompt) for key, prompt in prompts.items()}
        return torch.cat(
            [torch.cat([_count(s)[None], _extended(axes[id(s.prompt)], s)]) for s in sequences],
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
