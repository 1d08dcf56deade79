"""What both trainers of `bench.step` get: the model, the rows, the lengths and the reward."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from care_train.config import Config, load_config
from care_train.data import PromptOrder, Sample, load_samples
from care_train.distributed import initialize_process_group
from care_train.models.load import LoadedModel
from care_train.models.tiny import model_folder
from care_train.reporting import MetricsLogger
from care_train.rollout.engine import banned_token_ids
from care_train.training.checkpoint import seed_all
from care_train.training.session import open_session
from care_train.training.sft import cold_start_rows, run_sft
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

    @property
    def tokens(self) -> int:
        """Sampled tokens of a step, without reflections."""
        return self.sequences * self.length


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
