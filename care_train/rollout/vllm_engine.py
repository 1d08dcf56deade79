"""The vLLM engine in the training processes, and what every use of vLLM needs for a prompt.

vLLM expands image placeholders itself, and would expand expanded ids again. So it gets one
placeholder per image, and its own expansion must then equal the trainer's.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from typing import Any

import torch
import torch.distributed as dist
from PIL import Image

from care_train.models.load import LoadedModel
from care_train.models.lora import has_adapters
from care_train.models.prompts import EncodedPrompt
from care_train.rollout.engine import Completion, Request, SamplingSettings, WeightParts
from care_train.rollout.errors import RolloutError, is_out_of_memory
from care_train.rollout.vllm_process import VllmSetup, untouched_process, vllm_process
from care_train.rollout.weight_sync import ADAPTER_ID, send_weights


class VllmEngine:
    """Samples with vLLM from weights that `sync` sent; special tokens are never sampled."""

    def __init__(self, loaded: LoadedModel, setup: VllmSetup) -> None:
        """Start vLLM, or take the one that this process runs for such a model; `loaded` gives all
        but the weights, which come by `sync`."""
        self._loaded, self._max_context = loaded, setup.max_context
        self._process = vllm_process(loaded, setup)
        self._lora = adapter_request() if setup.lora_rank and has_adapters(loaded.model) else None
        self._llm = self._process.llm
        # vLLM has no sleep mode on CPUs, whose memory it does not reserve either.
        self._sleep_level = setup.settings.sleep_level if torch.cuda.is_available() else 0

    @property
    def num_starts(self) -> int:
        """How often vLLM started or woke up."""
        return self._process.num_starts

    def generate(self, requests: Sequence[Request], sampling: SamplingSettings) -> list[Completion]:
        """One completion per request, in order, with the log-probs of what was sampled.

        Raises:
            ValueError: a context over the limit, or one that vLLM expands otherwise than the
                trainer; named.
            RuntimeError: vLLM does not have this engine's weights, so `sync` is due.
            RolloutError: vLLM failed for another reason than memory.
        """
        if self._process.owner is not self:
            raise RuntimeError("vLLM has no weights of this policy: wanted a sync before generate")
        for request in requests:
            check_length(request, sampling, self._max_context)
        mine, everyone = self._gathered(list(requests))
        eos_ids = self._loaded.eos_token_ids
        prompts = [
            vllm_prompt(unexpanded_ids(r.prompt, self._loaded), r.prefix_ids, r.prompt.images)
            for r in everyone
        ]
        parameters = [sampling_parameters(sampling, request.seed, eos_ids) for request in everyone]
        outputs: list[Any] = []
        with untouched_process(), _explained("generating"):
            if prompts:
                outputs = self._llm.generate(
                    prompts, parameters, use_tqdm=False, lora_request=self._lora
                )
        for request, output in zip(everyone, outputs, strict=True):
            check_expansion(request, output.prompt_token_ids)
        return [completion_of(output.outputs[0], eos_ids) for output in outputs[mine]]

    @property
    def wanted(self) -> WeightParts:
        """With the base weights, unless adapters go alone and vLLM still has this policy's."""
        if self._lora is None:
            return WeightParts.MERGED
        has_base = self._process.owner is self
        return WeightParts.ADAPTER if has_base else WeightParts.BASE_AND_ADAPTER

    def sync(self, weights: Iterable[tuple[str, torch.Tensor]]) -> dict[str, float]:
        """Send what is `wanted` to vLLM and check that vLLM holds it.

        Raises:
            RolloutError: it does not; names the tensor.
        """
        self._process.owner = None
        if self._process.asleep:
            with _explained("waking up"):
                self._llm.wake_up()
            self._process.asleep = False
            self._process.num_starts += 1
        with untouched_process():
            num_bytes = send_weights(self._llm, weights, self._loaded.model.dtype)
        self._process.owner = self
        return {"sync_bytes": float(num_bytes)}

    def rest(self) -> None:
        """Free vLLM's caches, and its weights or their GPU memory."""
        if self._sleep_level and not self._process.asleep:
            self._llm.sleep(level=self._sleep_level)
            self._process.asleep = True
            if self._sleep_level == 2:
                self._process.owner = None

    def _gathered(self, requests: list[Request]) -> tuple[slice, list[Request]]:
        """All requests of the ranks that share a vLLM, and where this rank's are among them."""
        from vllm.distributed import get_tp_group  # pyright: ignore[reportMissingImports]

        group = get_tp_group()
        if group.world_size == 1:
            return slice(None), requests
        parts: list[Any] = [None] * group.world_size
        dist.all_gather_object(parts, requests, group=group.cpu_group)
        start = sum(len(part) for part in parts[: group.rank_in_group])
        everyone = [request for part in parts for request in part]
        return slice(start, start + len(requests)), everyone


@contextmanager
def _explained(what: str) -> Iterator[None]:
    try:
        yield
    # vLLM's workers raise whatever they like. Running out of memory has an answer of its own.
    except Exception as error:
        if is_out_of_memory(error):
            raise
        reason = (str(error).strip().splitlines() or ["no reason given"])[0]
        kind = type(error).__name__
        raise RolloutError(f"vLLM failed while {what}: {kind}: {reason}") from error


def adapter_request() -> Any:
    """What makes vLLM sample with the adapter that was sent: its `LoRARequest`."""
    from vllm.lora.request import LoRARequest  # pyright: ignore[reportMissingImports]

    return LoRARequest("policy", ADAPTER_ID, "sent by the trainer")


def unexpanded_ids(prompt: EncodedPrompt, loaded: LoadedModel) -> tuple[int, ...]:
    """A prompt's ids with one placeholder per image."""
    ids, grid = prompt.token_ids, prompt.image_grid_thw
    if grid is None:
        return ids
    tokens_per_image = grid.prod(-1) // loaded.processor.image_processor.merge_size**2
    short: list[int] = []
    place = 0
    for length in tokens_per_image.tolist():
        start = ids.index(loaded.image_token_id, place)
        short += ids[place : start + 1]
        place = start + length
    return (*short, *ids[place:])


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


def completion_of(output: Any, eos_ids: Sequence[int]) -> Completion:
    """One of vLLM's `CompletionOutput`s, with its sampled tokens' log-probs."""
    ids, flat = tuple(output.token_ids), output.logprobs
    log_probs = tuple(flat.logprobs[start] for start in flat.start_indices)
    assert len(log_probs) == len(ids)
    return Completion(ids, ids[-1] in eos_ids, log_probs)


def check_length(request: Request, sampling: SamplingSettings, limit: int) -> None:
    """Refuse a context that vLLM would cut short.

    Raises:
        ValueError: prompt, prefix and response can exceed `limit` tokens; names the sample.
    """
    length = len(request.prompt.token_ids) + len(request.prefix_ids)
    if length + sampling.max_new_tokens > limit:
        raise ValueError(
            f"{request.prompt.location or 'prompt'}: a context of {length} tokens and "
            f"max_new_tokens {sampling.max_new_tokens} exceed the {limit} that vLLM was "
            "started for: the model's positions, or prompt.max_prompt_tokens and "
            "rollout.max_new_tokens, are fewer"
        )


def check_expansion(request: Request, expanded: Sequence[int]) -> None:
    """Compare vLLM's expansion of prompt and prefix with the trainer's.

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
