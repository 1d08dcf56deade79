"""Our training step as `bench.step` measures it: the trainer's own parts, put together alike."""

import time
from collections.abc import Sequence

from bench.step_case import Case, FixedLengthVerifier, Setup, StepFigures, case_config, end_never
from care_train.data import Sample
from care_train.distributed import initialize_process_group, rank, world_size
from care_train.models.prompts import TokenText
from care_train.training.groups import RolloutScorer
from care_train.training.rl import open_policy
from care_train.training.sampler import Sampler
from care_train.training.session import Session, open_session, rank_share
from care_train.training.step import TrainStep


class OurTrainer:
    """A trainer that makes one step at a time."""

    def __init__(self, setup: Setup, case: Case, overrides: Sequence[str]) -> None:
        """Load the policy and build its engines.

        Args:
            setup: policy and rows.
            case: sizes.
            overrides: settings such as `algorithm=grpo` and `rollout.engine=vllm`.
        """
        device = initialize_process_group()
        config = case_config(case, overrides)
        opened = open_session(config, setup.folder, device)
        end_never(opened.loaded)
        verifier = FixedLengthVerifier(config.prompt, config.reward)
        scorer = RolloutScorer(TokenText(opened.loaded.tokenizer), verifier, config.prompt)
        session = Session(config, opened.loaded, opened.encoder, scorer)
        engine, rollout, reference = open_policy(session, device)
        sampler = Sampler(rollout, session.encoder, config)
        self._step = TrainStep(config, engine, sampler, scorer, reference)
        self._setup, self._case, self._done = setup, case, 0

    def run(self) -> StepFigures:
        """One step, timed.

        Raises:
            RuntimeError: a response is not of the length asked for.
        """
        start = time.perf_counter()
        outcome = self._step.run(self._draw, self._done)
        seconds = time.perf_counter() - start
        self._done += 1
        metrics = outcome.metrics
        tokens, sequences = int(metrics["decoded_tokens"]), int(metrics["sampled_sequences"])
        if tokens != sequences * self._case.length:
            raise RuntimeError(
                f"bench.step: got {tokens} tokens of {sequences} sequences, wanted "
                f"{self._case.length} of each"
            )
        parts = {
            key.removeprefix("seconds_"): value
            for key, value in metrics.items()
            if key.startswith("seconds_") and key != "seconds_overhead"
        }
        return StepFigures(seconds, tokens, parts, int(metrics["trained_sequences"]))

    def _draw(self) -> list[Sample]:
        first, count = self._done * self._case.prompts, self._case.prompts
        return rank_share(self._setup.prompts(first, count), rank(), world_size())
