"""Sample, decode and score rollouts (Algorithm 1, lines 1-2 and 13-14)."""

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from care_train.algorithm.reflection import reflection_prefix
from care_train.algorithm.spans import parse_spans, token_spans
from care_train.algorithm.types import Member, Rollout, Subgroup
from care_train.config import Config, PromptSettings
from care_train.data import Sample
from care_train.models.batch import TokenSequence
from care_train.models.prompts import EncodedPrompt, PromptEncoder, TokenText
from care_train.rollout.engine import (
    Completion,
    Request,
    RolloutEngine,
    SamplingSettings,
    in_background,
    request_seed,
)
from care_train.training.engine import PolicyEngine
from care_train.training.timer import timer
from care_train.verifier import Response, Score, Verifier


@dataclass(frozen=True)
class SampledGroup:
    """The G rollouts of one prompt."""

    sample: Sample
    prompt: EncodedPrompt = field(repr=False)
    rollouts: tuple[Rollout, ...]

    def sequence(
        self, rollout: Rollout, prefix_ids: tuple[int, ...] | None = None
    ) -> TokenSequence:
        """Prompt, prefix and response of one rollout; `prefix_ids` replaces the forced prefix."""
        prefix = rollout.prefix_ids if prefix_ids is None else prefix_ids
        return TokenSequence(self.prompt, prefix, rollout.token_ids)


@dataclass(frozen=True)
class StartedGroups:
    """The groups of a step, being sampled."""

    step: int
    samples: Sequence[Sample]
    prompts: Sequence[EncodedPrompt] = field(repr=False)
    completions: Future[list[Completion]]


class RolloutScorer:
    """Turns completions into scored rollouts with spans."""

    def __init__(self, token_text: TokenText, verifier: Verifier, prompt: PromptSettings) -> None:
        self._token_text = token_text
        self.verifier = verifier
        self._tags = (prompt.think_tag, prompt.answer_tag)

    def text(self, completion: Completion) -> str:
        """The response's text, without special tokens."""
        return self._token_text.decode(completion.token_ids)[0]

    def score(
        self,
        sample: Sample,
        completion: Completion,
        prefix_ids: tuple[int, ...] = (),
        *,
        reflected: bool = False,
    ) -> Rollout:
        """`score_all` of one completion."""
        return self.score_all([(sample, completion, prefix_ids)], reflected=reflected)[0]

    @timer("score")
    def score_all(
        self,
        completions: Sequence[tuple[Sample, Completion, tuple[int, ...]]],
        *,
        reflected: bool = False,
    ) -> list[Rollout]:
        """Decode, locate the spans, verify (Eq. 1): all at once, each with its forced prefix."""
        decoded = [
            self._token_text.decode(prefix_ids + completion.token_ids)
            for _, completion, prefix_ids in completions
        ]
        responses = [
            Response(text, sample, completion.finished, len(completion.token_ids))
            for (text, _), (sample, completion, _) in zip(decoded, completions, strict=True)
        ]
        scores = self.verifier.score_batch(responses)
        return [
            self._rollout(completion, prefix_ids, *text_and_ends, score, reflected)
            for (_, completion, prefix_ids), text_and_ends, score in zip(
                completions, decoded, scores, strict=True
            )
        ]

    def _rollout(
        self,
        completion: Completion,
        prefix_ids: tuple[int, ...],
        text: str,
        ends: Sequence[int],
        score: Score,
        reflected: bool,
    ) -> Rollout:
        if completion.finished:
            ends = ends[:-1]
        spans = token_spans(parse_spans(text, *self._tags), ends, len(prefix_ids))
        return Rollout(
            token_ids=completion.token_ids,
            text=text,
            spans=spans,
            accuracy=score.accuracy,
            format_score=score.format_score,
            reward=score.reward,
            finished=completion.finished,
            prefix_ids=prefix_ids,
            reflected=reflected,
            verdict=score.reason,
            log_probs=completion.log_probs,
        )


class GroupSampler:
    """Draws groups and reflections from the current policy."""

    def __init__(
        self,
        engine: RolloutEngine,
        encoder: PromptEncoder,
        scorer: RolloutScorer,
        config: Config,
    ) -> None:
        self._engine = engine
        self._encoder = encoder
        self._scorer = scorer
        self._config = config
        rollout = config.rollout
        self._sampling = SamplingSettings(
            rollout.max_new_tokens, rollout.temperature, rollout.top_p, rollout.top_k
        )
        self._in_flight: Future[list[Completion]] | None = None

    def sync(self, policy: PolicyEngine) -> dict[str, float]:
        """Bring the rollout engine up to date with the policy; returns what there is to log."""
        self.wait()
        bucket_bytes = self._config.rollout.vllm.sync_bucket_mib << 20
        with timer("sync"):
            return self._engine.sync(policy.weights(bucket_bytes, self._engine.wanted))

    def wait(self) -> None:
        """Until what was started is sampled: it is to be of the weights before the next `sync`."""
        if self._in_flight is not None:
            with timer("generate"):
                self._in_flight.result()

    def rest(self) -> None:
        """This batch is sampled: the engine may free memory until the next `sync`."""
        with timer("sync"):
            self._engine.rest()

    def sample_groups(self, samples: Sequence[Sample], step: int) -> list[SampledGroup]:
        """Line 1: G rollouts of every prompt, in one batched call."""
        with timer("prepare"):
            prompts = self._encoder.encode(samples)
            requests = self._requests(samples, prompts, step)
        with timer("generate"):
            completions = self._engine.generate(requests, self._sampling)
        return self._groups(samples, prompts, completions)

    @timer("prepare")
    def start_groups(self, samples: Sequence[Sample], step: int) -> StartedGroups:
        """`sample_groups` in the background, with the weights that the engine has now."""
        prompts = self._encoder.encode(samples)
        requests = self._requests(samples, prompts, step)
        self._in_flight = in_background(lambda: self._engine.generate(requests, self._sampling))
        return StartedGroups(step, samples, prompts, self._in_flight)

    def resume_groups(
        self, samples: Sequence[Sample], step: int, completions: list[Completion]
    ) -> StartedGroups:
        """What `start_groups` returned in a run before this one, sampled already."""
        done: Future[list[Completion]] = Future()
        done.set_result(completions)
        return StartedGroups(step, samples, self._encoder.encode(samples), done)

    def finish_groups(self, started: StartedGroups) -> list[SampledGroup]:
        """Wait for the samples and score them."""
        with timer("generate"):
            completions = started.completions.result()
        return self._groups(started.samples, started.prompts, completions)

    def _requests(
        self, samples: Sequence[Sample], prompts: Sequence[EncodedPrompt], step: int
    ) -> list[Request]:
        return [
            Request(prompt, request_seed(self._config.seed, step, sample.draw, index))
            for sample, prompt in zip(samples, prompts, strict=True)
            for index in range(self._config.rollout.group_size)
        ]

    def _groups(
        self,
        samples: Sequence[Sample],
        prompts: Sequence[EncodedPrompt],
        completions: Sequence[Completion],
    ) -> list[SampledGroup]:
        size = self._config.rollout.group_size
        rollouts = self._scorer.score_all(
            [(samples[i // size], completion, ()) for i, completion in enumerate(completions)]
        )
        return [
            SampledGroup(sample, prompt, tuple(rollouts[place * size : (place + 1) * size]))
            for place, (sample, prompt) in enumerate(zip(samples, prompts, strict=True))
        ]

    def reflect(
        self,
        groups: Sequence[SampledGroup],
        subgroups: Sequence[Subgroup | str],
        step: int,
    ) -> list[Rollout | None]:
        """Lines 12-14 for all groups in one batched call; None where a group does not reflect."""
        requests: dict[int, Request] = {}
        with timer("prepare"):
            for place, (group, subgroup) in enumerate(zip(groups, subgroups, strict=True)):
                if isinstance(subgroup, str) or subgroup.reflect_on is None:
                    continue
                negative = subgroup.others[subgroup.reflect_on]
                request = self._reflection_request(group, negative, step)
                if request is not None:
                    requests[place] = request
        reflected: list[Rollout | None] = [None] * len(groups)
        # Also without requests: ranks that share a vLLM by tensor parallelism generate together.
        wanted = list(requests.values())
        with timer("reflect"):
            completions = self._engine.generate(wanted, self._reflection_sampling)
        scored = self._scorer.score_all(
            [
                (groups[place].sample, completion, request.prefix_ids)
                for (place, request), completion in zip(requests.items(), completions, strict=True)
            ],
            reflected=True,
        )
        for place, rollout in zip(requests, scored, strict=True):
            reflected[place] = rollout
        return reflected

    def _reflection_request(
        self, group: SampledGroup, negative: Member, step: int
    ) -> Request | None:
        """Line 13; None where the context would be over the limit: it is never truncated."""
        prompt, cue = self._config.prompt, self._config.care.reflection.cue
        text = reflection_prefix(negative.rollout, cue, prompt.think_tag, prompt.answer_tag)
        prefix_ids = self._encoder.encode_text(text)
        limit = prompt.max_prompt_tokens + self._config.rollout.max_new_tokens
        if len(group.prompt.token_ids) + len(prefix_ids) > limit:
            return None
        # The group's own rollouts have the indices below.
        index = self._config.rollout.group_size
        seed = request_seed(self._config.seed, step, group.sample.draw, index)
        return Request(group.prompt, seed, prefix_ids)

    @property
    def _reflection_sampling(self) -> SamplingSettings:
        own, shared = self._config.care.reflection, self._sampling
        return SamplingSettings(
            shared.max_new_tokens if own.max_new_tokens is None else own.max_new_tokens,
            shared.temperature if own.temperature is None else own.temperature,
            shared.top_p if own.top_p is None else own.top_p,
            shared.top_k,
        )
