"""What trainer and server say to each other: plain JSON, each prompt and image once per batch."""

import base64
import io
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from PIL import Image

from care_train.rollout.types import Completion, Request, SamplingSettings
from care_train.rollout.vllm_inputs import unexpanded_ids, vllm_prompt


def pack_requests(
    requests: Sequence[Request],
    sampling: SamplingSettings,
    eos_ids: Sequence[int],
    image_token_id: int | None,
    merge_size: int,
) -> dict[str, Any]:
    """A batch of requests: prompts with one placeholder per image, images as PNG (lossless)."""
    places: dict[int, int] = {}
    prompts = []
    for request in requests:
        if id(request.prompt) not in places:
            places[id(request.prompt)] = len(prompts)
            ids = unexpanded_ids(request.prompt, image_token_id, merge_size)
            images = [_encode_image(image) for image in request.prompt.images]
            prompts.append({"token_ids": ids, "images": images})
    return {
        "sampling": asdict(sampling),
        "eos_ids": list(eos_ids),
        "prompts": prompts,
        "requests": [
            {"prompt": places[id(r.prompt)], "prefix_ids": r.prefix_ids, "seed": r.seed}
            for r in requests
        ],
    }


def unpack_prompts(message: dict[str, Any]) -> list[dict[str, Any]]:
    """What vLLM takes for each request of a batch; requests of a prompt share its images."""
    images = [[_decode_image(text) for text in p["images"]] for p in message["prompts"]]
    ids = [prompt["token_ids"] for prompt in message["prompts"]]
    return [
        vllm_prompt(ids[request["prompt"]], request["prefix_ids"], images[request["prompt"]])
        for request in message["requests"]
    ]


def pack_expansions(
    message: dict[str, Any], expanded: Sequence[Sequence[int]]
) -> list[list[int] | None]:
    """vLLM's expansion of each prompt, once, without the requests' prefixes.

    Args:
        message: the batch.
        expanded: per request, all of its prompt's tokens in vLLM.

    Returns:
        Per prompt; None for one that no request has.

    Raises:
        RuntimeError: vLLM expanded one prompt in two ways.
    """
    prompts: list[list[int] | None] = [None] * len(message["prompts"])
    for request, ids in zip(message["requests"], expanded, strict=True):
        own, place = list(ids[: len(ids) - len(request["prefix_ids"])]), request["prompt"]
        if prompts[place] not in (None, own):
            raise RuntimeError(f"vLLM expanded prompt {place} of the batch in two ways")
        prompts[place] = own
    return prompts


def unpack_completion(values: dict[str, Any], eos_ids: Sequence[int]) -> Completion:
    """One completion of the server's answer."""
    ids = tuple(values["token_ids"])
    return Completion(ids, ids[-1] in eos_ids, tuple(values["log_probs"]))


def _encode_image(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=1)
    return base64.b64encode(buffer.getvalue()).decode()


def _decode_image(text: str) -> Image.Image:
    image = Image.open(io.BytesIO(base64.b64decode(text)), formats=["PNG"])
    image.load()
    return image
