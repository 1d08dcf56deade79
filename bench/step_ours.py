"""Our training step as `bench.step` measures it, and what both trainers get: model, rows, reward.

The step is made of the trainer's own parts, put together alike. Run as a program under a launcher,
told by a JSON object, each rank takes its share of the steps.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from care_train.config import Config, load_config
from care_train.data import PromptOrder, Sample, load_samples
from care_train.distributed import (
    initialize_process_group,
    is_main,
    own_environment,
    own_share,
)
from care_train.models.load import LoadedModel
from care_train.models.prompts import TokenText
from care_train.models.tiny import model_folder
from care_train.reporting import MetricsLogger
from care_train.rollout.engine import banned_token_ids
from care_train.training.checkpoint import seed_all
from care_train.training.groups import RolloutScorer
from care_train.training.loop import few_collections
from care_train.training.rl import open_policy
from care_train.training.sampler import Sampler
from care_train.training.session import Session, open_session
from care_train.training.sft import cold_start_rows, run_sft
from care_train.training.step import TrainStep
from care_train.verifier import Response, Score, Verifier

QUICKSTART = Path(__file__).parents[1] / "configs" / "easy_vqa.yaml"


@dataclass(frozen=True)
class Case:
    """The size of a step; by default the quickstart's."""

    prompts: int = 32
    group_size: int = 8
    length: int = 28
    """Sampled tokens of every response."""
    micro_batch: int = 128
    """Sequences in one forward and backward."""

    @property
    def sequences(self) -> int:
        """Rollouts of a step."""
        return self.prompts * self.group_size


@dataclass(frozen=True)
class StepFigures:
    """One measured step."""

    seconds: float
    tokens: int
    """Sampled, reflections included."""
    parts: dict[str, float]
    """Seconds by part; they add up to about `seconds`."""
    trained_sequences: int

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


@dataclass(frozen=True)
class Setup:
    """The policy that all contenders start from, and their rows."""

    folder: Path
    """A cold-started tiny model."""
    rows: Sequence[Sample]
    """In the order they are drawn."""

    def prompts(self, first: int, count: int) -> list[Sample]:
        """Rows `first` to `first + count - 1`, from the start again where there are fewer."""
        return [self.rows[i % len(self.rows)] for i in range(first, first + count)]


class FixedLengthVerifier(Verifier):
    """The real verifier for responses that go on after they ended.

    All contenders sample the same number of tokens, so EOS is out of reach. Only what stands
    before the end of the first answer counts, as if EOS came there.
    """

    def score_batch(self, responses: Sequence[Response]) -> list[Score]:
        """Score each response up to its first closing answer tag."""
        tag = f"</{self._answer_tag}>"
        ended = [one.text.partition(tag) for one in responses]
        return super().score_batch(
            [
                replace(one, text=text + closed, finished=True)
                for one, (text, closed, _) in zip(responses, ended, strict=True)
            ]
        )


def case_config(case: Case, overrides: Sequence[str] = ()) -> Config:
    """The quickstart's configuration at this size."""
    sizes = (
        f"train.prompts_per_step={case.prompts}",
        f"rollout.group_size={case.group_size}",
        f"rollout.max_new_tokens={case.length}",
        f"rollout.batch_size={case.sequences}",
        f"train.micro_batch_size={case.micro_batch}",
        # The engine's log-probs are those without EOS, the trainer's with it.
        "rollout.max_log_prob_gap=null",
        "logging.report_to=[]",
        # The schedule's end, never reached.
        "train.steps=10000",
    )
    return load_config(QUICKSTART, [*sizes, *overrides])


def prepare(folder: Path, cold_steps: int, num_rows: int = 4096) -> Setup:
    """Build the tiny model, teach it the format for `cold_steps` steps, choose the rows.

    Args:
        folder: where to; a cold start that is there already is taken.
        cold_steps: steps of supervised fine-tuning; 0 leaves the weights random.
        num_rows: distinct training rows to draw from.
    """
    config = load_config(QUICKSTART, [f"sft.steps={max(cold_steps, 1)}", "logging.report_to=[]"])
    seed_all(config.seed)
    samples = load_samples(config.data, config.seed)
    cold_rows = load_samples(config.sft.data, config.seed)
    folder.mkdir(parents=True, exist_ok=True)
    base = model_folder(config, folder / "base", [*cold_rows, *samples])
    rows = draw_rows(num_rows)
    if not cold_steps:
        return Setup(base, rows)
    cold = folder / f"cold_{cold_steps}"
    if not cold.is_dir():
        device = initialize_process_group()
        session = open_session(config, base, device)
        checked = cold_start_rows(session, cold_rows, folder)
        with MetricsLogger(folder, config.logging, {}) as metrics:
            run_sft(session, checked, cold, metrics, device, None, lambda: None)
    return Setup(cold, rows)


def draw_rows(count: int) -> list[Sample]:
    """The quickstart's first `count` training rows in the order it draws them."""
    config = load_config(QUICKSTART)
    samples = load_samples(config.data, config.seed)
    return [samples[i] for i in PromptOrder(len(samples), config.seed).take(0, count)]


def end_never(loaded: LoadedModel) -> list[int]:
    """Put EOS out of reach; returns the ids that must not be sampled, the real EOS among them."""
    loaded.model.generation_config.eos_token_id = []
    return banned_token_ids(loaded)


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
        return list(own_share(self._setup.prompts(first, count)))


def measure_ranks(
    setup: Setup, case: Case, overrides: Sequence[str], ranks: int, steps: int
) -> list[StepFigures]:
    """Every step's figures with the case's prompts shared by `ranks` processes.

    Raises:
        RuntimeError: a rank failed; holds what it printed last.
    """
    task = {
        "folder": str(setup.folder),
        "num_rows": len(setup.rows),
        "case": asdict(case),
        "overrides": list(overrides),
        "steps": steps,
    }
    launch = ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}")
    command = [sys.executable, *launch, "-m", "bench.step_ours", json.dumps(task)]
    environment = own_environment()
    environment["OMP_NUM_THREADS"] = str(threads_of(ranks))
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, cwd=Path(__file__).parents[1]
    )
    if done.returncode:
        raise RuntimeError(f"bench.step on {ranks} ranks: {done.stderr[-2000:]}")
    steps_taken = json.loads(done.stdout.strip().splitlines()[-1])
    return [StepFigures(**figures) for figures in steps_taken]


def threads_of(ranks: int) -> int:
    """Of each rank: the cores shared evenly, and no more than this process uses."""
    return min(max(len(os.sched_getaffinity(0)) // ranks, 1), torch.get_num_threads())


def _run(task: dict) -> None:
    setup = Setup(Path(task["folder"]), draw_rows(task["num_rows"]))
    trainer = OurTrainer(setup, Case(**task["case"]), task["overrides"])
    with few_collections():
        figures = [asdict(trainer.run()) for _ in range(task["steps"])]
    if is_main():
        print(json.dumps(figures))


if __name__ == "__main__":
    _run(json.loads(sys.argv[1]))
