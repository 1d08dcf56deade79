"""What goes to vLLM for a prompt, and what vLLM must have made of it.

vLLM expands image placeholders itself. Sent expanded ids, it expands them again: a crash, or images
in the wrong place without one. So it gets one placeholder per image, and its own expansion must
equal the trainer's.
"""

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

from care_train.models.prompts import EncodedPrompt
from care_train.rollout.types import Request


def unexpanded_ids(
    prompt: EncodedPrompt, image_token_id: int | None, merge_size: int
) -> tuple[int, ...]:
    """The prompt's ids with one placeholder per image.

    Args:
        prompt: ids with image placeholders expanded.
        image_token_id: the placeholder.
        merge_size: patches that become one token, per side.
    """
    if prompt.image_grid_thw is None:
        return prompt.token_ids
    lengths = (prompt.image_grid_thw.prod(-1) // merge_size**2).tolist()
    ids: list[int] = []
    place = 0
    for length in lengths:
        start = prompt.token_ids.index(image_token_id, place)
        ids += prompt.token_ids[place : start + 1]
        place = start + length
    return (*ids, *prompt.token_ids[place:])


def vllm_prompt(request: Request, ids: tuple[int, ...]) -> dict[str, Any]:
    """What `LLM.generate` takes: unexpanded ids with the forced prefix, and the images."""
    prompt: dict[str, Any] = {"prompt_token_ids": [*ids, *request.prefix_ids]}
    if request.prompt.images:
        prompt["multi_modal_data"] = {"image": list(request.prompt.images)}
    return prompt


def check_expansion(request: Request, expanded: Sequence[int]) -> None:
    """Compare vLLM's prompt with the trainer's.

    Raises:
        ValueError: they differ; names the sample, both lengths and the first position.
    """
    wanted = (*request.prompt.token_ids, *request.prefix_ids)
    if tuple(expanded) == wanted:
        return
    pairs = enumerate(zip_longest(expanded, wanted))
    place, (got, want) = next((i, pair) for i, pair in pairs if pair[0] != pair[1])
    raise ValueError(
        f"{request.prompt.location or 'prompt'}: vLLM expanded the prompt to {len(expanded)} "
        f"tokens, the trainer to {len(wanted)}; they first differ at position {place} (vLLM has "
        f"{got}, the trainer {want}): its processor scales images otherwise than the trainer's"
    )
