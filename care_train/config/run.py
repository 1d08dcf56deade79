"""The whole of a run's settings, and the rules that several sections share."""

import re
from dataclasses import field
from typing import Annotated, Literal

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveInt

from care_train.config.base import Role, check, section
from care_train.config.care import Algorithm, CareSettings, LossSettings
from care_train.config.data import SHIPPED_DATA, DataSettings, EvalSettings, source_of
from care_train.config.model import ModelSettings, PromptSettings, RolloutSettings
from care_train.config.reward import RewardSettings
from care_train.config.training import DeepSpeedSettings, SftSettings, TrainSettings


@section
class HubSettings:
    """What a run uploads to the Hugging Face Hub."""

    push_to: str | None = None
    """`ORG/NAME`: the model repository that `final/` and a model card are uploaded to at the end of
    a run. It is made at the start, so that a missing token is known then, and is private. None:
    none."""

    def __post_init__(self) -> None:
        good = self.push_to is None or re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", self.push_to)
        check(bool(good), "hub.push_to", self.push_to, "ORG/NAME")


@section
class LimitSettings:
    """Seconds that things may take; a run that is over them ends and says where it hung. A rank
    that waits for another one, which is within its own limit, does not hang. 0: no limit.
    And how many steps may train nothing."""

    step: NonNegativeFloat = 3600.0
    """One part of a step: sampling a batch, verifying it, its log-probs, or an optimiser step with
    all its micro-batches. Anything else at a stretch, such as loading, sending weights to the
    rollout engine and a checkpoint, may take as long, and at least an hour."""
    rank: NonNegativeFloat = 300.0
    """Silence of a rank, after which it counts as lost; and of another machine's process that holds
    the lock of the run's folder. One that dies on the same machine is noticed within seconds."""
    empty_steps: PositiveInt | None = 2
    """Steps in a row without a group to learn from (all right, all wrong, equal rewards), after
    which a run ends: as finished where nearly all groups are right, else with an error that says
    what they were. The first one is a warning. With few prompts per step it takes at least 8
    groups, and 64 to be finished, or as many as there are rows. None: never."""

    @property
    def collective(self) -> float:
        """Seconds of one collective operation (NCCL's or gloo's own timeout): long enough for
        `step` to be what ends a hang, and says where it is."""
        return max(7200.0, 2 * self.step) if self.step else 30 * 86400.0


Tracker = Literal["tensorboard", "wandb", "trackio", "mlflow", "swanlab"]


@section
class LoggingSettings:
    """What a run tells, beside a bar on a terminal or a line per step in a log."""

    report_to: list[Tracker] = field(default_factory=lambda: ["tensorboard"])
    """Where metrics go beside metrics.jsonl: tensorboard (event files in the run's folder), wandb,
    trackio, mlflow, swanlab; all but the first must be installed."""
    project: str = "care"
    """Project name for the trackers that have projects."""
    samples_every: NonNegativeInt = 25
    """Steps between groups that the terminal and the trackers show: the anchor, the nearest hard
    negative, its repair; 0: never."""
    archive_gib: NonNegativeFloat | None = 20.0
    """Every group of every step and every evaluated answer is kept in the run's `archive/`, for
    `care-train report` and `care-train replay` (docs/archive.md), up to this size in GiB, images
    included, at which its oldest steps are dropped. null: no limit. 0: no archive."""


@section
class Config:
    """A run."""

    name: Annotated[str, Role.FREE] = "care"
    """The run's folder below `output_dir`; `a/b` is one in another. No part begins with a dot."""
    output_dir: Annotated[str, Role.FREE] = "runs"
    """Where runs are written."""
    seed: int = 0
    """Seeds the model's first weights, the order of rows and every rollout."""
    algorithm: Algorithm = "care"
    """care, or a baseline: grpo | dapo | gspo (as in Table 5) | dr_grpo | rloo | reinforce_pp |
    cispo | sapo."""
    preset: Literal["default", "literal", "official"] = "default"
    """`literal`: Algorithm 1 to the letter; `official`: the authors' released code."""
    resume: Annotated[bool, Role.FREE] = False
    """Go on from the newest usable checkpoint of the run (also `--resume`). `resume=runs/x` names
    its folder, and without a `--config` takes its config.yaml."""
    allow_changes: Annotated[list[str], Role.FREE] = field(default_factory=list)
    """Keys and sections that `resume` may find changed although they decide where the run goes.
    Those of `eval`, `logging` and checkpoints may change anyway, and train.steps under a constant
    schedule."""
    overwrite: Annotated[bool, Role.FREE] = False
    """Let a new run replace one of the same name, once it has begun its first step; without it that
    is an error. Only a folder that care-train made is ever deleted."""
    model: ModelSettings = field(default_factory=ModelSettings)
    prompt: PromptSettings = field(default_factory=PromptSettings)
    data: DataSettings = field(default_factory=DataSettings)
    rollout: RolloutSettings = field(default_factory=RolloutSettings)
    reward: RewardSettings = field(default_factory=RewardSettings)
    care: CareSettings = field(default_factory=CareSettings)
    loss: LossSettings = field(default_factory=LossSettings)
    train: TrainSettings = field(default_factory=TrainSettings)
    sft: SftSettings = field(default_factory=SftSettings)
    eval: Annotated[EvalSettings, Role.FREE] = field(default_factory=EvalSettings)
    deepspeed: DeepSpeedSettings = field(default_factory=DeepSpeedSettings)
    hub: Annotated[HubSettings, Role.FREE] = field(default_factory=HubSettings)
    limits: Annotated[LimitSettings, Role.FREE] = field(default_factory=LimitSettings)
    logging: Annotated[LoggingSettings, Role.FREE] = field(default_factory=LoggingSettings)

    def __post_init__(self) -> None:
        is_name = all(part and not part.startswith(".") for part in self.name.split("/"))
        wanted = "a folder's name below output_dir; no part of it is empty or begins with '.'"
        check(is_name and self.name.isprintable(), "name", self.name, wanted)
        every, has_rows = self.train.eval_every, bool(self.held_out or self.sft.eval_data)
        wanted = "0 without eval.data or sft.eval_data: there are no held-out rows to evaluate on"
        check(every == 0 or has_rows, "train.eval_every", every, wanted)
        self.deepspeed.check_dtype(self.model.dtype)
        self._check_micro_batch_tokens()
        per_group = self.algorithm == "care" and self.care.decisions.normalize_over == "group"
        mean = self.loss.aggregation
        wanted = "'sequence' with preset = 'literal': a token mean has no per-group form"
        check(not per_group or mean == "sequence", "loss.aggregation", mean, wanted)
        if self.train.rollouts_ahead:
            self._check_rollouts_ahead()
        if self.rollout.vllm.lora == "adapter":
            self._check_adapter_sync()

    @property
    def held_out(self) -> DataSettings | None:
        """Where the held-out rows are; None without any."""
        path, own = self.eval.data, source_of(self.data.path)
        if path is None:
            if own.path not in SHIPPED_DATA:
                return None
            path = "@test"
        if path.startswith("@"):
            path = f"{own.path}{path}" + (f"#{own.revision}" if own.revision else "")
        return DataSettings(path=path, max_samples=self.eval.max_samples)

    @property
    def longest_reflection(self) -> int:
        """Most new tokens of a reflection."""
        own, limit = self.care.decisions.repair_max_tokens, self.rollout.max_new_tokens
        return limit if own is None else min(own, limit)

    def _check_micro_batch_tokens(self) -> None:
        """Any sequence must fit: one that does not would end the run hours in."""
        rollout, care, got = self.rollout, self.care, self.train.micro_batch_tokens
        longest = self.prompt.max_prompt_tokens + rollout.max_new_tokens
        if self.algorithm == "care" and care.reflection.enabled:
            # Its prompt and prefix together have as many as a prompt and a response.
            longest += self.longest_reflection
        wanted = f"null, or at least {longest}: the longest sequence by prompt.max_prompt_tokens "
        wanted += "and rollout.max_new_tokens"
        check(got is None or got >= longest, "train.micro_batch_tokens", got, wanted)

    def _check_adapter_sync(self) -> None:
        """vLLM's LoRA layers must be able to hold all that is trained."""
        for refused, why in (
            (not self.model.lora.rank, "without model.lora.rank: there is no adapter"),
            (self.model.train_vision, "with model.train_vision: vLLM does not adapt vision towers"),
            (self.model.lora.modules_to_save, "with model.lora.modules_to_save: no adapters"),
        ):
            check(not refused, "rollout.vllm.lora", "adapter", f"'merged' {why}")

    def _check_rollouts_ahead(self) -> None:
        has_server = self.rollout.engine == "vllm" and self.rollout.vllm.server is not None
        wanted = "0 without rollout.engine=vllm and rollout.vllm.server: other engines generate in "
        wanted += "the process that trains"
        check(has_server, "train.rollouts_ahead", 1, wanted)
        wanted = "0 with loss.importance_sampling=none: those rollouts are one update old"
        check(self.loss.importance_sampling != "none", "train.rollouts_ahead", 1, wanted)
        wanted = "0 with train.dynamic_sampling, which decides by one step's rollouts how many more"
        check(not self.train.dynamic_sampling, "train.rollouts_ahead", 1, wanted)
