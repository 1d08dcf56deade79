"""The vLLM engine, in process: every rank has its own, or shares one by tensor parallelism."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from care_train.config import VllmSettings
from care_train.models.load import LoadedModel
from care_train.rollout.adapter_sync import adapter_request
from care_train.rollout.engine import Completion, Request, SamplingSettings, WeightParts
from care_train.rollout.errors import RolloutError, is_out_of_memory
from care_train.rollout.vllm_inputs import (
    check_expansion,
    check_length,
    merge_size_of,
    sampled_log_probs,
    sampling_parameters,
    unexpanded_ids,
    vllm_prompt,
)
from care_train.rollout.vllm_process import adapter_rank, untouched_process, vllm_process
from care_train.rollout.weight_sync import send_weights


class VllmEngine:
    """Samples with vLLM from weights that `sync` sent; special tokens are never sampled."""

    def __init__(
        self, loaded: LoadedModel, settings: VllmSettings, *, max_context: int, batch_size: int
    ) -> None:
        """Start vLLM, or take the one this process runs for such a model.

        Args:
            loaded: gives configuration, tokenizer, processor and precision; its weights come by
                `sync`.
            settings: `rollout.vllm`.
            max_context: longest prompt, forced prefix and response together, in tokens.
            batch_size: sequences generated at once.
        """
        self._loaded = loaded
        self._dtype = loaded.model.dtype
        self._process = vllm_process(loaded, settings, max_context, batch_size)
        self._lora = adapter_request() if adapter_rank(loaded, settings) else None
        self._llm = self._process.llm
        # vLLM has no sleep mode on CPUs, whose memory it does not reserve either.
        self._sleeps = settings.sleep and torch.cuda.is_available()
        self._merge_size = merge_size_of(loaded)

    def generate(self, requests: Sequence[Request], sampling: SamplingSettings) -> list[Completion]:
        """One completion per request, in order, with the log-probs of what was sampled.

        Raises:
            ValueError: a context over the limit, or one that vLLM expands otherwise than the
                trainer; named.
            RuntimeError: the weights are not this engine's: `sync` comes first.
            RolloutError: vLLM failed, for want of anything but memory.
        """
        if self._process.owner is not self:
            raise RuntimeError("vLLM has no weights of this policy: wanted a sync before generate")
        for request in requests:
            check_length(request, sampling, self._process.max_context)
        mine, everyone = self._gathered(list(requests))
        short = {
            id(r.prompt): unexpanded_ids(r.prompt, self._loaded.image_token_id, self._merge_size)
            for r in everyone
        }
        prompts = [
            vllm_prompt(short[id(r.prompt)], r.prefix_ids, r.prompt.images) for r in everyone
        ]
        eos_ids = self._loaded.eos_token_ids
        parameters = [sampling_parameters(sampling, request.seed, eos_ids) for request in everyone]
        with untouched_process(), _explained("generating"):
            outputs = (
                self._llm.generate(prompts, parameters, use_tqdm=False, lora_request=self._lora)
                if prompts
                else []
            )
        for request, output in zip(everyone, outputs, strict=True):
            check_expansion(request, output.prompt_token_ids)
        return [self._completion(output.outputs[0]) for output in outputs[mine]]

    @property
    def wanted(self) -> WeightParts:
        """Base weights where vLLM does not have this policy's, and where it slept."""
        if self._lora is None:
            return WeightParts.MERGED
        has_base = self._process.owner is self
        return WeightParts.ADAPTER if has_base else WeightParts.BASE_AND_ADAPTER

    def sync(self, weights: Iterable[tuple[str, torch.Tensor]]) -> dict[str, float]:
        """Send what is `wanted` to vLLM and check that it holds it.

        Raises:
            RuntimeError: it does not; names the tensor.
        """
        self._process.owner = None
        if self._process.asleep:
            with _explained("waking up"):
                self._llm.wake_up()
            self._process.asleep = False
        with untouched_process():
            report = send_weights(self._llm, weights, self._dtype)
        self._process.owner = self
        return {"sync_bytes": float(report.num_bytes)}

    def rest(self) -> None:
        """Free vLLM's weights and caches; the next `sync` brings them back. Nothing on CPUs."""
        if self._sleeps and not self._process.asleep:
            # Level 2 drops the weights instead of keeping them in main memory: they are old.
            self._llm.sleep(level=2)
            self._process.asleep, self._process.owner = True, None

    def _completion(self, output: Any) -> Completion:
        ids = tuple(output.token_ids)
        return Completion(ids, ids[-1] in self._loaded.eos_token_ids, sampled_log_probs(output))

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
    # What vLLM's workers raise is not ours to list; running out of memory has an answer of its own.
    except Exception as error:
        if is_out_of_memory(error):
            raise
        reason = (str(error).strip().splitlines() or ["no reason given"])[0]
        kind = type(error).__name__
        raise RolloutError(f"vLLM failed while {what}: {kind}: {reason}") from error
