"""Batches of prompt and response, padded or packed, and which hidden state predicts which token.

Each distinct image of a batch is encoded once: a group's rollouts ask about the same one.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

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


Positions = Callable[[EncodedPrompt, int], torch.Tensor]
"""[R, length] int64 of a prompt and the text behind it: R kinds of position ids, the first counts
from 0."""


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
        inputs = {key: value.to(device) for key, value in self.inputs.items()}
        parts = (self.rows, self.target_ids, self.sequence_ids, self.row_starts)
        return ModelBatch(inputs, *(part.to(device) for part in parts))


def collate(
    sequences: Sequence[TokenSequence],
    pad_token_id: int,
    image_token_id: int | None,
    positions: Positions | None = None,
) -> ModelBatch:
    """Right-pad sequences into one batch: inputs [B, T], T the longest.

    `positions` are `multimodal_positions`; without them the model works out those of every row.
    """
    ids = [sequence.token_ids for sequence in sequences]
    sizes = list(map(len, ids))
    rows = list(_joined(ids).split(sizes))
    input_ids = pad_sequence(rows, batch_first=True, padding_value=pad_token_id)
    lengths = torch.tensor(sizes)
    attention_mask = (torch.arange(input_ids.shape[1]) < lengths[:, None]).long()
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    if positions is not None:
        # The count is that of the attention mask; padding, which is masked, may have any.
        known = _of_prompts(sequences, positions, max(sizes))
        inputs["position_ids"] = torch.stack([known[s.prompt][1:] for s in sequences], dim=1)
    inputs |= image_inputs([sequence.prompt for sequence in sequences], input_ids, image_token_id)
    starts = [place * input_ids.shape[1] for place in range(len(rows))]
    return _batch(sequences, inputs, starts, row_starts=[0] * len(rows))


def pack(
    sequences: Sequence[TokenSequence], positions: Positions, image_token_id: int | None
) -> ModelBatch:
    """Lay sequences end to end without padding: inputs [1, sum of lengths].

    There is no attention mask: the first kind of `packed_positions`, which begins anew with each
    sequence, makes transformers keep them apart (masking_utils.py).
    """
    ids = [sequence.token_ids for sequence in sequences]
    input_ids = _joined(ids).unsqueeze(0)
    known = _of_prompts(sequences, positions, max(map(len, ids)))
    position_ids = torch.cat(
        [known[s.prompt][:, : len(row)] for s, row in zip(sequences, ids, strict=True)], dim=1
    )
    if len(position_ids) > 1:
        position_ids = position_ids.unsqueeze(1)
    inputs = {"input_ids": input_ids, "position_ids": position_ids}
    inputs |= image_inputs([sequence.prompt for sequence in sequences], input_ids, image_token_id)
    starts = [0, *accumulate(map(len, ids[:-1]))]
    return _batch(sequences, inputs, starts, row_starts=starts)


def _of_prompts(
    sequences: Sequence[TokenSequence], positions: Positions, length: int
) -> dict[EncodedPrompt, torch.Tensor]:
    """Position ids of each distinct prompt: a group's rollouts share theirs as far as they go."""
    return {prompt: positions(prompt, length) for prompt in {s.prompt for s in sequences}}


def _joined(rows: Iterable[Sequence[int]]) -> torch.Tensor:
    """[N] int64, end to end: one array is made faster than a tensor of each."""
    return torch.from_numpy(np.fromiter(chain.from_iterable(rows), np.int64))


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
        _joined(sequence.response_ids for sequence in sequences),
        torch.repeat_interleave(torch.arange(len(sequences)), torch.tensor(lengths)),
        torch.tensor(row_starts),
    )


def packed_positions(model: Any) -> Positions:
    """What `pack` asks for position ids: `multimodal_positions`, or a text model's [1, T], counting
    from 0 in each sequence.

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
    return multimodal_positions(model) or (lambda _, length: torch.arange(length)[None])


def multimodal_positions(model: Any) -> Positions | None:
    """Of a model with multimodal rotary embeddings: [4, T], counting from 0 in each sequence, then
    time, height and width, as transformers computes them for a sequence alone (`get_rope_index`).
    None: it has none."""
    if not hasattr(model.base_model, "get_rope_index"):
        return None

    # A step has a prompt in several batches.
    known: WeakKeyDictionary[EncodedPrompt, torch.Tensor] = WeakKeyDictionary()

    def multimodal(prompt: EncodedPrompt, length: int) -> torch.Tensor:
        axes = known.get(prompt)
        if axes is None:
            axes = known[prompt] = _prompt_axes(model, prompt)
        # Behind the prompt there is only text, which counts on in all three.
        behind = torch.arange(length - axes.shape[1]) + axes.max() + 1
        axes = torch.cat([axes, behind.expand(3, -1)], dim=1)
        return torch.cat([torch.arange(length)[None], axes])

    return multimodal


def _prompt_axes(model: Any, prompt: EncodedPrompt) -> torch.Tensor:
    """[3, T] time, height and width of a prompt's tokens."""
    input_ids = torch.tensor([prompt.token_ids])
    types = (input_ids == model.config.image_token_id).int()
    axes, _ = model.base_model.get_rope_index(
        input_ids, mm_token_type_ids=types, image_grid_thw=prompt.image_grid_thw
    )
    return axes[:, 0]


def image_inputs(
    prompts: Sequence[EncodedPrompt], input_ids: torch.Tensor, image_token_id: int | None
) -> dict[str, Any]:
    """Pixels, grids and token types of a batch; nothing where no row has an image.

    `pixel_values` holds the distinct prompts' images alone. Where prompts repeat, `image_places`
    [images] says which of those each of the batch's images is, for `with_encoded_images`.
    """
    with_images = [prompt for prompt in prompts if prompt.pixel_values is not None]
    if not with_images:
        return {}
    distinct = list(dict.fromkeys(with_images))
    firsts = accumulate((prompt.num_images for prompt in distinct), initial=0)
    starts = dict(zip(distinct, firsts, strict=False))
    inputs = {
        "pixel_values": torch.cat([p.pixel_values for p in distinct if p.pixel_values is not None]),
        "image_grid_thw": torch.cat(
            [p.image_grid_thw for p in with_images if p.image_grid_thw is not None]
        ),
        "mm_token_type_ids": (input_ids == image_token_id).int(),
    }
    if len(distinct) < len(with_images):
        places = [starts[p] + image for p in with_images for image in range(p.num_images)]
        inputs["image_places"] = torch.tensor(places)
    return inputs


def has_vision_tower(backbone: Any) -> bool:
    """Whether a transformers model without its head reads images."""
    return getattr(backbone, "visual", None) is not None


def with_encoded_images(
    backbone: Any, inputs: dict[str, Any], *, always: bool = False
) -> dict[str, Any]:
    """The inputs with images encoded, each distinct one once.

    Gradients reach the encoder through every row that shows the image. Batches without repeats go
    the same way: ranks that share parameters (ZeRO-3) must gather them in one order, and inside
    the backbone's forward the encoder would come after the embedding.

    Args:
        backbone: a transformers vision-language model without its head.
        inputs: its keyword arguments, with the places that `image_inputs` adds where images repeat.
        always: without an image encode a grey one, of which nothing is passed on: ranks that share
            weights or gradients wait for each other at every layer, the encoder's too.
    """
    if "pixel_values" not in inputs:
        return _with_nothing_seen(backbone, inputs) if always else inputs
    inputs = dict(inputs)
    pixels, grid = inputs.pop("pixel_values"), inputs["image_grid_thw"]
    if "image_places" in inputs:
        places = inputs.pop("image_places").tolist()
        grid = grid[[places.index(place) for place in range(max(places) + 1)]]
        features = backbone.get_image_features(pixels, grid, return_dict=True)
        features = _changed(features, lambda images: tuple(images[place] for place in places))
    else:
        features = backbone.get_image_features(pixels, grid, return_dict=True)
    inputs["mm_encoder_outputs"] = {"image": features}
    return inputs


def _changed(features: Any, change: Callable[[Sequence[torch.Tensor]], Any]) -> Any:
    """The encoder's output with other images' rows, at every depth that it reports."""
    features.pooler_output = change(features.pooler_output)
    if getattr(features, "deepstack_features", None) is not None:
        features.deepstack_features = list(map(change, features.deepstack_features))
    return features


def _with_nothing_seen(backbone: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs with the encoder run on a grey image of one merged token, its rows left out."""
    device = inputs["input_ids"].device
    vision = backbone.config.vision_config
    side = vision.spatial_merge_size
    width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    pixels = torch.zeros(side * side, width, device=device)
    grid = torch.tensor([[1, side, side]], device=device)
    features = backbone.get_image_features(pixels, grid, return_dict=True)
    features = _changed(features, lambda images: (images[0][:0],))
    return inputs | {"mm_encoder_outputs": {"image": features}}
