"""A batch's images, each distinct one encoded once: a group's rollouts ask about the same image."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch

from care_train.models.prompts import EncodedPrompt


def image_inputs(
    prompts: Sequence[EncodedPrompt], input_ids: torch.Tensor, image_token_id: int | None
) -> dict[str, Any]:
    """Pixels, grids and token types of a batch; nothing where no row has an image.

    `pixel_values` holds the distinct prompts' images alone. Where prompts repeat, `image_places`
    [images] says which of those each of the batch's images is, and `with_encoded_images` has to
    follow before a model takes the inputs.
    """
    with_images = [prompt for prompt in prompts if prompt.pixel_values is not None]
    if not with_images:
        return {}
    first: dict[int, int] = {}
    pixels, grids, places = [], [], []
    num_distinct = 0
    for prompt in with_images:
        grid, patches = prompt.image_grid_thw, prompt.pixel_values
        assert grid is not None and patches is not None
        if id(patches) not in first:
            first[id(patches)] = num_distinct
            num_distinct += len(grid)
            pixels.append(patches)
        grids.append(grid)
        start = first[id(patches)]
        places += range(start, start + len(grid))
    inputs = {
        "pixel_values": torch.cat(pixels),
        "image_grid_thw": torch.cat(grids),
        "mm_token_type_ids": (input_ids == image_token_id).int(),
    }
    if num_distinct < len(places):
        inputs["image_places"] = torch.tensor(places)
    return inputs


def with_encoded_images(backbone: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs with images encoded, each distinct one once, where the batch repeats any.

    Gradients reach the encoder through every row that shows the image.

    Args:
        backbone: a transformers vision-language model without its head.
        inputs: its keyword arguments and perhaps `image_places`.
    """
    if "image_places" not in inputs:
        return inputs
    inputs = dict(inputs)
    places = inputs.pop("image_places").tolist()
    pixels, grid = inputs.pop("pixel_values"), inputs["image_grid_thw"]
    first = [places.index(place) for place in range(max(places) + 1)]
    if "mm_encoder_outputs" not in inspect.signature(backbone.forward).parameters:
        images = pixels.split(grid[first].prod(-1).tolist())
        return inputs | {"pixel_values": torch.cat([images[place] for place in places])}
    features = backbone.get_image_features(pixels, grid[first])
    features.pooler_output = tuple(features.pooler_output[place] for place in places)
    if getattr(features, "deepstack_features", None) is not None:
        features.deepstack_features = [
            tuple(layer[place] for place in places) for layer in features.deepstack_features
        ]
    return inputs | {"mm_encoder_outputs": {"image": features}}
