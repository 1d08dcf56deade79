"""Sample groups and reflections (Algorithm 1, lines 1 and 11-13)."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

from care_train.algorithm.released import answer_prefix
from care_train.algorithm.selection import reflection_prefix
from care_train.config import Config
from care_train.data import Sample
from care_train.models.prompts import PromptEncoder
from care_train.rollout.engine import (
    Completion,
    Request,
    RolloutEngine,
    SamplingSettings,
    in_background,
    request_seed,
)
from care_train.rollout.errors import RolloutServerError
from care_train.rollout.weight_sync import BUCKET_BYTES
from care_train.training.engine import PolicyEngine
from care_train.training.groups import Answer, Group
from care_train.training.timer import timer

Draw = Callable[[], Sequence[Sample]]
"""Deals this rank's next prompts."""


class _Started(NamedTuple):
    """The groups of a step whose completions are sampled, or being sampled in the background."""

    step: int
    groups: list[Group]
    completions: Future[list[Completion]]


class Sampler:
    """Draws groups and reflections from the current policy.

    With `train.rollouts_ahead` the next step's rollouts are sampled in the background while this
    step trains. They come from the weights before this step's update, one update old when they are
    trained on. The engine's log-probs, those of the policy that sampled, correct for it: each
    token's (or sequence's) gradient is weighed by pi_trainer / pi_engine
    (`algorithm.region_weights`).
    """

    def __init__(self, engine: RolloutEngine, encoder: PromptEncoder, config: Config) -> None:
        self._engine, self._encoder, self._config = engine, encoder, config
        rollout, own = config.rollout, config.care.decisions
        self._sampling = SamplingSettings(
            rollout.max_new_tokens, rollout.temperature, rollout.top_p, rollout.top_k
        )
        self._reflection_sampling = SamplingSettings(
            config.longest_reflection,
            own.repair_temperature or rollout.temperature,
            own.repair_top_p or rollout.top_p,
            rollout.top_k,
        )
        self._next: _Started | None = None

    @property
    def has_next(self) -> bool:
        """Whether the prompts drawn last are still to be trained on."""
        return self._next is not None

    @property
    def num_starts(self) -> int:
        """How often the rollout engine started or woke up."""
        return self._engine.num_starts

    def sync(self, policy: PolicyEngine) -> dict[str, float]:
        """Bring the rollout engine up to date with the policy, once what the background samples
        from the weights so far is there; returns what there is to log."""
        if self._next is not None:
            with timer("generate"):
                self._next.completions.result()
        with timer("sync"):
            return self._engine.sync(policy.weights(BUCKET_BYTES, self._engine.wanted))

    def rest(self) -> None:
        """This batch is sampled: the engine may free memory until the next `sync`."""
        with timer("sync"):
            self._engine.rest()

    def sample(self, draw: Draw, step: int) -> list[Group]:
        """Line 1: G responses to each of the next prompts, in one batched call.

        `step` counts from 0 and is part of every response's seed.
        """
        started = self._next or self._start(draw, step)
        assert started.step == step
        completions, self._next = started.completions.result(), None
        train = self._config.train
        if train.rollouts_ahead and step + 1 < train.steps:
            self._next = self._start(draw, step + 1)  # with the weights synced last
        size = self._config.rollout.group_size
        return [
            replace(group, completions=tuple(completions[place * size : (place + 1) * size]))
            for place, group in enumerate(started.groups)
        ]

    def reflect(self, groups: Sequence[Group], step: int) -> list[Group]:
        """Lines 11-13: one repair for every group that wants one, in one batched call."""
        with timer("prepare"):
            requests = [self._reflection_request(group, step) for group in groups]
        # Also without requests: ranks that share a vLLM by tensor parallelism generate together.
        wanted = [request for request in requests if request is not None]
        completions = iter(self._engine.generate(wanted, self._reflection_sampling))
        return [
            group
            if request is None
            else replace(group, repair=Answer(group.sample, next(completions), request.prefix_ids))
            for group, request in zip(groups, requests, strict=True)
        ]

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of this rank's sampler, in plain types: the waiting rollouts,
        once they are sampled; empty where there are none."""
        if self._next is None:
            return {}
        try:
            completions = self._next.completions.result()
        except RolloutServerError:
            # The next step will report it. A checkpoint without them is usable: a resumed run
            # samples them anew.
            return {}
        return {
            "step": self._next.step,
            "token_ids": [list(c.token_ids) for c in completions],
            "finished": [c.finished for c in completions],
            "log_probs": [None if c.log_probs is None else list(c.log_probs) for c in completions],
        }

    def restore(self, state: Mapping[str, Any], draw: Draw) -> None:
        """Be where `state` was taken; its prompts are drawn again."""
        if not state:
            return
        fields = zip(state["token_ids"], state["finished"], state["log_probs"], strict=True)
        completions = [
            Completion(tuple(ids), finished, None if values is None else tuple(values))
            for ids, finished, values in fields
        ]
        self._next = _Started(state["step"], self._encoded(draw()), _done(completions))

    def _start(self, draw: Draw, step: int) -> _Started:
        groups = self._encoded(draw())
        requests = [
            Request(group.prompt, request_seed(self._config.seed, step, group.sample.draw, index))
            for group in groups
            for index in range(self._config.rollout.group_size)
        ]
        generate = partial(self._engine.generate, requests, self._sampling)
        if self._config.train.rollouts_ahead:
            return _Started(step, groups, in_background(generate))
        return _Started(step, groups, _done(generate()))

    def _encoded(self, samples: Sequence[Sample]) -> list[Group]:
        with timer("prepare"):
            prompts = self._encoder.encode(samples)
        pairs = zip(samples, prompts, strict=True)
        return [Group((), sample=sample, prompt=prompt) for sample, prompt in pairs]

    def _reflection_request(self, group: Group, step: int) -> Request | None:
        """None where the group has no reflection, or one with too long a context (line 13)."""
        subgroup, config = group.subgroup, self._config
        if isinstance(subgroup, str) or subgroup.reflect_on is None:
            return None
        negative = subgroup.others[subgroup.reflect_on].rollout
        own = (config.care.reflection.cue, config.prompt.think_tag, config.prompt.answer_tag)
        if config.care.decisions.repair == "answer":
            text = answer_prefix(negative.text, *own)
        else:
            text = reflection_prefix(negative, *own)
        prefix_ids = self._encoder.encode_text(text)
        limit = config.prompt.max_prompt_tokens + config.rollout.max_new_tokens
        if len(group.prompt.token_ids) + len(prefix_ids) > limit:
            return None  # A context is never truncated.
        # The group's own rollouts have the indices below.
        index = config.rollout.group_size
        seed = request_seed(config.seed, step, group.sample.draw, index)
        return Request(group.prompt, seed, prefix_ids)


def _done(completions: list[Completion]) -> Future[list[Completion]]:
    future: Future[list[Completion]] = Future()
    future.set_result(completions)
    return future
