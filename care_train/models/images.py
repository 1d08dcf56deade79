"""A batch's images, each distinct one encoded once: a group's rollouts ask about the same image."""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch

from care_train.models.prompts import EncodedPrompt


def image_inputs(
    prompts: Sequence[EncodedPrompt], input_ids: torch.Tensor, image_token_id: int | None
) -> dict[str, Any]:
    """Pixels, grids and token types of a batch; nothing where no row has an image.

    `pixel_values` holds the distinct prompts' images alone. Where prompts repeat, `image_places`
    [images] says which of those each of the batch's images is, `prompt_places` [B] which distinct
    prompt each row has and `image_counts` [B] with how many images; `with_encoded_images` has to
    follow before a model takes them.
    """
    with_images = [prompt for prompt in prompts if prompt.pixel_values is not None]
    if not with_images:
        return {}
    distinct = list(dict.fromkeys(with_images))
    counts = [prompt.num_images for prompt in distinct]
    starts = dict(zip(distinct, accumulate(counts, initial=0), strict=False))
    inputs = {
        "pixel_values": torch.cat([p.pixel_values for p in distinct if p.pixel_values is not None]),
        "image_grid_thw": torch.cat(
            [p.image_grid_thw for p in with_images if p.image_grid_thw is not None]
        ),
        "mm_token_type_ids": (input_ids == image_token_id).int(),
    }
    if len(distinct) < len(with_images):
        order = {prompt: place for place, prompt in enumerate(dict.fromkeys(prompts))}
        places = [starts[p] + image for p in with_images for image in range(p.num_images)]
        inputs |= {
            "image_places": torch.tensor(places),
            "prompt_places": torch.tensor([order[prompt] for prompt in prompts]),
            "image_counts": torch.tensor([prompt.num_images for prompt in prompts]),
        }
    return inputs


def has_vision_tower(backbone: Any) -> bool:
    """Whether a transformers model without its head reads images."""
    return getattr(backbone, "visual", None) is not None


def with_encoded_images(
    backbone: Any, inputs: dict[str, Any], *, left_padded: bool = False, always: bool = False
) -> dict[str, Any]:
    """The inputs with images encoded, each distinct one once.

    Gradients reach the encoder through every row that shows the image. Batches without repeats go
    the same way: ranks that share parameters (ZeRO-3) must gather them in one order, and inside
    the backbone's forward the encoder would come after the embedding.

    Args:
        backbone: a transformers vision-language model without its head.
        inputs: its keyword arguments, with the places that `image_inputs` adds where images repeat.
        left_padded: the backbone then has to find the positions of every row itself.
        always: encode also where there is no image: a grey one, of which nothing is passed on, so
            that the backbone computes what it would have and the encoder's gradients are zero.
            Ranks that share weights or gradients wait for each other at every layer; one whose
            rows have no image would let those wait that have some.
    """
    if "pixel_values" not in inputs:
        return _with_nothing_seen(backbone, inputs) if always else inputs
    # In the same order on all ranks: the encoder first.
    inputs = dict(inputs)
    grid = inputs["image_grid_thw"]
    places = _pop_list(inputs, "image_places")
    prompts, counts = _pop_list(inputs, "prompt_places"), inputs.pop("image_counts", None)
    repeats = len(places) > 0
    first = [places.index(place) for place in range(max(places) + 1)] if repeats else slice(None)
    pixels = inputs.pop("pixel_values")
    features = backbone.get_image_features(pixels, grid[first], return_dict=True)
    inputs["mm_encoder_outputs"] = {"image": _taken(features, places) if repeats else features}
    if repeats and not left_padded and "position_ids" not in inputs:
        inputs["position_ids"] = _position_ids(backbone, inputs, prompts, counts)
    return inputs


def _pop_list(inputs: dict[str, Any], key: str) -> list[int]:
    return inputs.pop(key).tolist() if key in inputs else []


def _taken(features: Any, places: Sequence[int]) -> Any:
    """The encoder's output with its images at `places`, at every depth that it reports."""
    features.pooler_output = tuple(features.pooler_output[place] for place in places)
    if getattr(features, "deepstack_features", None) is not None:
        features.deepstack_features = [
            tuple(layer[place] for place in places) for layer in features.deepstack_features
        ]
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
    features.pooler_output = (features.pooler_output[0][:0],)
    if getattr(features, "deepstack_features", None) is not None:
        features.deepstack_features = [(layer[0][:0],) for layer in features.deepstack_features]
    return inputs | {"mm_encoder_outputs": {"image": features}}


def _position_ids(
    backbone: Any, inputs: dict[str, Any], prompts: list[int], counts: torch.Tensor
) -> torch.Tensor:
    """[3, B, T] multimodal positions of right-padded rows, worked out for each prompt's longest.

    Behind the prompt there is only text: a shorter row has the longest one's positions as far as
    it goes, and its padding, which is masked, may have any.
    """
    lengths = inputs["attention_mask"].sum(-1).tolist()
    longest: dict[int, int] = {}
    for row, prompt in enumerate(prompts):
        if prompt not in longest or lengths[row] > lengths[longest[prompt]]:
            longest[prompt] = row
    rows = [longest[prompt] for prompt in sorted(longest)]
    grids = inputs["image_grid_thw"].split(counts.tolist())
    positions, _ = backbone.get_rope_index(
        inputs["input_ids"][rows],
        image_grid_thw=torch.cat([grids[row] for row in rows]),
        attention_mask=inputs["attention_mask"][rows],
        mm_token_type_ids=inputs["mm_token_type_ids"][rows],
    )
    return positions[:, prompts]
