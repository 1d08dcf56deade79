"""The embedded engine: transformers' `generate` on the training process's own model."""

import logging
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import transformers
from packaging.version import Version
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from care_train.models.batch import image_inputs, with_encoded_images
from care_train.models.load import LoadedModel
from care_train.models.policy import first_broken_weight
from care_train.rollout.engine import (
    Completion,
    Request,
    SamplingSettings,
    WeightParts,
    banned_token_ids,
)
from care_train.rollout.errors import NotFiniteLogitsError, is_out_of_memory

logger = logging.getLogger(__name__)

_CACHE = "cache" if Version(transformers.__version__) >= Version("5.24") else "past_key_values"
"""`generate`'s argument, which transformers renamed."""


class TransformersEngine:
    """Left-padded batched sampling; image, vision and other special tokens are never sampled."""

    wanted = WeightParts.MERGED
    """A copy has no adapters."""
    num_starts = 0
    """It computes with the trainer's own model, or a copy of it."""

    def __init__(self, loaded: LoadedModel, batch_size: int, *, is_copy: bool = False) -> None:
        """Generate with `loaded`, so many sequences at once: the policy itself, or a copy of it
        that `sync` brings up to date."""
        self._loaded = loaded
        self._model = loaded.model
        self._batch_size = batch_size
        self._is_copy = is_copy
        self._is_halved = False
        self._banned = banned_token_ids(loaded)

    def generate(self, requests: Sequence[Request], sampling: SamplingSettings) -> list[Completion]:
        """One completion per request, in order; longer contexts are batched together.

        Where memory runs out, the batch size is halved, once for the engine's lifetime. The
        responses do not change, because each request has its own seed.

        Raises:
            NotFiniteLogitsError: names the first weight that is not finite, if one is.
        """
        order = sorted(range(len(requests)), key=lambda i: len(_context(requests[i])), reverse=True)
        completions: dict[int, Completion] = {}
        was_training = self._model.training
        self._model.eval()
        while len(completions) < len(order):
            start = len(completions)
            places = order[start : start + self._batch_size]
            batch = self._generate_or_halve([requests[i] for i in places], sampling)
            completions.update(zip(places, batch, strict=False))
        self._model.train(was_training)
        return [completions[i] for i in range(len(requests))]

    def _generate_or_halve(
        self, requests: Sequence[Request], sampling: SamplingSettings
    ) -> list[Completion]:
        """Completions of the requests, or of none where the batch size was halved instead."""
        try:
            return self._generate_batch(requests, sampling)
        except (MemoryError, RuntimeError) as error:
            if self._is_halved or len(requests) < 2 or not is_out_of_memory(error):
                raise
            reason = (str(error).strip().splitlines() or ["no memory"])[0]
        self._is_halved, self._batch_size = True, len(requests) // 2
        logger.warning(
            "warning: out of memory while %d responses were generated (%s): going on with %d at "
            "once; set rollout.batch_size so",
            *(len(requests), reason, self._batch_size),
        )
        if self._model.device.type == "cuda":
            torch.cuda.empty_cache()
        return []

    @torch.no_grad()
    def sync(self, weights: Iterable[tuple[str, torch.Tensor]]) -> dict[str, float]:
        """Copies where the model is a copy; otherwise it is the policy itself."""
        if self._is_copy:
            own = dict(self._model.named_parameters())
            for name, tensor in weights:
                own[name].copy_(tensor)
        return {}

    def rest(self) -> None:
        """Nothing to free: the model is the policy's, or stays whole beside it."""

    @torch.no_grad()
    def _generate_batch(
        self, requests: Sequence[Request], sampling: SamplingSettings
    ) -> list[Completion]:
        inputs = self._inputs(requests)
        width = inputs["input_ids"].shape[1]
        sampler = SeededSampler(
            [r.seed for r in requests], sampling, self._banned, width, self._model.device
        )
        try:
            output = self._model.generate(
                **self._with_prefill(requests, inputs),
                generation_config=self._generation_config(sampling),
                logits_processor=LogitsProcessorList([sampler]),
            )
        except NotFiniteLogitsError as error:
            broken = first_broken_weight(self._model)
            why = "though all weights are" if broken is None else f"nor is the weight {broken}"
            raise NotFiniteLogitsError(f"{error}, {why}") from error
        return [self._cut(row) for row in output[:, width:].tolist()]

    def _with_prefill(
        self, requests: Sequence[Request], inputs: dict[str, torch.Tensor]
    ) -> dict[str, Any]:
        """What `generate` takes: where contexts repeat, as a group's do, with each one's keys and
        values computed once, for all of it but the last token."""
        backbone = self._model.base_model
        if hasattr(backbone, "rope_deltas"):
            # Left over from the last batch, they would shift a batch without images.
            backbone.rope_deltas = None
        contexts = [(request.prompt, request.prefix_ids) for request in requests]
        place_of = {context: place for place, context in enumerate(dict.fromkeys(contexts))}
        if len(place_of) == len(requests):
            return with_encoded_images(backbone, inputs)
        distinct = [contexts.index(context) for context in place_of]
        part = self._inputs([requests[i] for i in distinct], inputs["input_ids"].shape[1])
        for key in ("input_ids", "attention_mask", "mm_token_type_ids"):
            if key in part:
                part[key] = part[key][:, :-1]
        if "pixel_values" not in part:
            part["position_ids"] = (part["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        part = with_encoded_images(backbone, part)
        filled = backbone(**part, use_cache=True)
        places = torch.tensor([place_of[context] for context in contexts])
        places = places.to(self._model.device)
        filled.past_key_values.batch_select_indices(places)
        deltas = getattr(backbone, "rope_deltas", None)
        if deltas is not None:
            backbone.rope_deltas = deltas[places]
        kept = {key: inputs[key] for key in ("input_ids", "attention_mask")}
        return kept | {_CACHE: filled.past_key_values}

    def _generation_config(self, sampling: SamplingSettings) -> GenerationConfig:
        # Everything the model's own generation_config could bend (Qwen2.5-VL ships a repetition
        # penalty) is set: the sampled distribution must be the one the trainer scores.
        return GenerationConfig(
            max_new_tokens=sampling.max_new_tokens,
            do_sample=False,
            num_beams=1,
            temperature=1.0,
            top_k=50,
            top_p=1.0,
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
            eos_token_id=list(self._loaded.eos_token_ids),
            pad_token_id=self._loaded.pad_token_id,
            use_cache=True,
        )

    def _inputs(self, requests: Sequence[Request], width: int = 0) -> dict[str, torch.Tensor]:
        """Left-padded to the longest context, or `width`."""
        contexts = [_context(request) for request in requests]
        width = max(width, *(len(context) for context in contexts))
        input_ids = torch.full((len(contexts), width), self._loaded.pad_token_id)
        attention_mask = torch.zeros_like(input_ids)
        for place, context in enumerate(contexts):
            input_ids[place, width - len(context) :] = torch.tensor(context)
            attention_mask[place, width - len(context) :] = 1
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        prompts = [request.prompt for request in requests]
        inputs |= image_inputs(prompts, input_ids, self._loaded.image_token_id)
        return {key: value.to(self._model.device) for key, value in inputs.items()}

    def _cut(self, row: list[int]) -> Completion:
        for place, token in enumerate(row):
            if token in self._loaded.eos_token_ids:
                return Completion(tuple(row[: place + 1]), finished=True)
        return Completion(tuple(row), finished=False)


def _context(request: Request) -> tuple[int, ...]:
    return request.prompt.token_ids + request.prefix_ids


class SeededSampler(LogitsProcessor):
    """Leaves one finite score per row: the token drawn with that row's own random numbers.

    `generate` then takes the argmax. Drawing by inverse CDF needs one uniform number per token, so
    a response depends on its seed and its logits, not on what it is batched with.
    """

    def __init__(
        self,
        seeds: Sequence[int],
        sampling: SamplingSettings,
        banned_ids: Sequence[int],
        prompt_width: int,
        device: torch.device,
    ) -> None:
        self._greedy = sampling.greedy
        self._temperature = sampling.temperature
        self._prompt_width = prompt_width
        self._banned = torch.tensor(list(banned_ids), dtype=torch.int64, device=device)
        self._filters: list[Any] = []
        if sampling.top_k:
            self._filters.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            self._filters.append(TopPLogitsWarper(sampling.top_p))
        if not self._greedy:
            self._uniforms = _uniforms(seeds, sampling.max_new_tokens).to(device)

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """[rows, V] scores: -inf but for the drawn token; untouched but for bans where greedy.

        Raises:
            NotFiniteLogitsError: a row has a NaN or +inf, or nothing but -inf.
        """
        place = input_ids.shape[1] - self._prompt_width
        if not bool(scores.amax(-1).isfinite().all()):
            raise NotFiniteLogitsError(f"the logits of response token {place} are not finite")
        scores = scores.float().index_fill(1, self._banned, -torch.inf)
        if self._greedy:
            return scores
        scores = scores / self._temperature
        for warp in self._filters:
            scores = warp(input_ids, scores)
        cumulative = scores.double().softmax(-1).cumsum(-1)
        uniform = self._uniforms[:, place, None]
        # Scaled by the total, which rounding keeps from being exactly 1: u < 1 cannot run past it.
        token = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)
        return torch.full_like(scores, -torch.inf).scatter_(1, token, 0.0)


def _uniforms(seeds: Sequence[int], count: int) -> torch.Tensor:
    """[rows, count] fp64 in [0, 1), each row from its own seed."""
    rows = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        rows.append(torch.rand(count, dtype=torch.float64, generator=generator))
    return torch.stack(rows)
