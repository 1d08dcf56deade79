"""What goes to vLLM for a prompt, and what vLLM must have made of it.

vLLM expands image placeholders itself. Sent expanded ids, it expands them again: a crash, or images
in the wrong place without one. So it gets one placeholder per image, and its own expansion must
equal the trainer's.
"""

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

from PIL import Image

from care_train.models.load import LoadedModel
from care_train.models.prompts import EncodedPrompt
from care_train.rollout.engine import Request, SamplingSettings


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


def vllm_prompt(
    ids: Sequence[int], prefix_ids: Sequence[int], images: Sequence[Image.Image]
) -> dict[str, Any]:
    """What `LLM.generate` takes: unexpanded ids with the forced prefix, and the images."""
    prompt: dict[str, Any] = {"prompt_token_ids": [*ids, *prefix_ids]}
    if images:
        prompt["multi_modal_data"] = {"image": list(images)}
    return prompt


def sampling_parameters(sampling: SamplingSettings, seed: int, eos_ids: Sequence[int]) -> Any:
    """vLLM's `SamplingParams` of one request."""
    from vllm import SamplingParams  # pyright: ignore[reportMissingImports]

    is_greedy = sampling.greedy
    return SamplingParams(
        n=1,
        max_tokens=sampling.max_new_tokens,
        temperature=0.0 if is_greedy else sampling.temperature,
        top_p=1.0 if is_greedy else sampling.top_p,
        top_k=0 if is_greedy else sampling.top_k,
        seed=seed,
        # The trainer's EOS ids and no others.
        ignore_eos=True,
        stop_token_ids=list(eos_ids),
        logprobs=0,
        flat_logprobs=True,
        detokenize=False,
        skip_clone=True,
    )


def sampled_log_probs(output: Any) -> tuple[float, ...]:
    """Per sampled token of one of vLLM's `CompletionOutput`s, its log-prob."""
    flat = output.logprobs
    log_probs = tuple(flat.logprobs[start] for start in flat.start_indices)
    assert len(log_probs) == len(output.token_ids)
    return log_probs


def check_length(request: Request, sampling: SamplingSettings, limit: int) -> None:
    """Refuse a context that vLLM would cut short.

    Args:
        request: what is to be sampled.
        sampling: says how long the response may get.
        limit: the longest context vLLM was started for.

    Raises:
        ValueError: prompt, prefix and response can exceed it; names the sample.
    """
    length = len(request.prompt.token_ids) + len(request.prefix_ids)
    if length + sampling.max_new_tokens > limit:
        raise ValueError(
            f"{request.prompt.location or 'prompt'}: a context of {length} tokens and "
            f"max_new_tokens {sampling.max_new_tokens} exceed the {limit} that vLLM was "
            "started for: the model's positions, or prompt.max_prompt_tokens and "
            "rollout.max_new_tokens, are fewer"
        )


def merge_size_of(loaded: LoadedModel) -> int:
    """Patches that become one image token, per side; 1 for a text model."""
    return 1 if loaded.processor is None else loaded.processor.image_processor.merge_size


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
