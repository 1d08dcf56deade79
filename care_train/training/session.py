"""The parts a run is made of, put together once for training, cold start and evaluation."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch

from care_train.algorithm.released import tag_patterns
from care_train.algorithm.spans import overlong_penalty
from care_train.config import Config
from care_train.models.load import LoadedModel, load_model
from care_train.models.prompts import PromptEncoder, TokenText
from care_train.rollout.engine import RolloutEngine
from care_train.rollout.remote_engine import VllmServerEngine
from care_train.rollout.transformers_engine import TransformersEngine
from care_train.rollout.vllm_engine import VllmEngine
from care_train.training.given import Given
from care_train.training.groups import RolloutScorer
from care_train.training.weights import policy_weights
from care_train.verifier import Verifier

Item = TypeVar("Item")


@dataclass(frozen=True)
class Session:
    """A loaded model with what feeds and judges it."""

    config: Config
    loaded: LoadedModel
    encoder: PromptEncoder
    scorer: RolloutScorer
    given: Given = field(default_factory=Given)

    def rollout_engine(self, loaded: LoadedModel, batch_size: int) -> RolloutEngine:
        """The configured engine, ready to generate with `loaded` as it is."""
        engine = self.new_engine(loaded, batch_size)
        with torch.no_grad():
            weights = policy_weights(loaded.model, engine.wanted)
            engine.sync((weight.name, weight.make()) for weight in weights)
        return engine

    def new_engine(
        self, loaded: LoadedModel, batch_size: int, *, is_copy: bool = False
    ) -> RolloutEngine:
        """The configured engine; it can generate after its first `sync`.

        Args:
            loaded: the policy; its weights may be sharded where the engine is vLLM.
            batch_size: sequences generated at once.
            is_copy: `loaded` is a copy of the policy, updated by `sync`.
        """
        rollout = self.config.rollout
        if rollout.engine == "transformers":
            return TransformersEngine(loaded, batch_size, is_copy=is_copy)
        if rollout.vllm.server is not None:
            return VllmServerEngine(loaded, rollout.vllm)
        max_context, batch_size = vllm_limits(self.config)
        return VllmEngine(loaded, rollout.vllm, max_context=max_context, batch_size=batch_size)


def vllm_limits(config: Config) -> tuple[int, int]:
    """The longest context in tokens and the sequences at once that vLLM must be ready for."""
    rollout = config.rollout
    longest = max(rollout.max_new_tokens, config.care.reflection.max_new_tokens or 0)
    # A reflection's prompt and prefix together have as many as a prompt and a response.
    max_context = config.prompt.max_prompt_tokens + rollout.max_new_tokens + longest
    return max_context, rollout.batch_size


def open_session(
    config: Config, folder: Path, device: torch.device, given: Given | None = None
) -> Session:
    """Load the model of `folder` with its prompt encoder and verifier."""
    given = given or Given()
    loaded = load_model(config.model, folder)
    loaded.model.to(device)
    prompt, encoder, patterns = config.prompt, PromptEncoder(loaded, config.prompt), None
    if config.care.decisions.spans == "tokens":
        patterns = tag_patterns(encoder.encode_text, prompt.think_tag, prompt.answer_tag)
    limit, buffer, length_bonus = config.rollout.max_new_tokens, config.reward.overlong_buffer, None
    if buffer is not None:
        length_bonus = partial(overlong_penalty, limit=limit, buffer=buffer)
    verifier = Verifier(prompt, config.reward, given.rewards)
    text = TokenText(loaded.tokenizer)
    scorer = RolloutScorer(text, verifier, prompt, patterns, length_bonus)
    return Session(config, loaded, encoder, scorer, given)


def rank_share(batch: Sequence[Item], rank: int, world_size: int) -> list[Item]:
    """This rank's part of a batch: every world_size-th of its items."""
    return list(batch[rank::world_size])
