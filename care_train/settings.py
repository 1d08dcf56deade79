"""Every setting of a run, one frozen dataclass per section; `config.py` fills them."""

from dataclasses import dataclass, field
from typing import Any, Literal

from care_train.algorithm.settings import STRICT, CareSettings, check
from care_train.rollout.settings import RolloutSettings

Algorithm = Literal["care", "grpo", "dapo", "gspo", "dr_grpo"]


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """Which model, and in which precision."""

    __pydantic_config__ = STRICT

    path: str = "tiny-qwen2.5-vl"
    """A Hugging Face folder, or a tiny model made on the spot: tiny-qwen2.5-vl | tiny-qwen3-vl |
    tiny-qwen2."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of weights and activations; bfloat16 keeps fp32 master weights in the optimiser."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """transformers' attention implementation."""
    min_pixels: int | None = None
    """Smallest image area in pixels the image processor scales to. None: the processor's own."""
    max_pixels: int | None = None
    """Largest image area in pixels the image processor scales to. None: the processor's own."""


@dataclass(frozen=True, kw_only=True)
class PromptSettings:
    """How a row becomes a prompt, and which tags the response uses."""

    __pydantic_config__ = STRICT

    system: str | None = (
        "First reason inside <think> </think>, then give the final answer inside "
        "<answer> </answer>."
    )
    """System message. None: none."""
    think_tag: str = "think"
    """Name of the rationale's tag (`reasoning` for Qwen3-VL, Sec. 8.2)."""
    answer_tag: str = "answer"
    """Name of the answer's tag."""
    max_prompt_tokens: int = 2048
    """Longest prompt in tokens, images expanded; a longer one is an error naming the row."""


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Where rows come from."""

    __pydantic_config__ = STRICT

    path: str = "easy_vqa"
    """`easy_vqa` (the published package), or a .jsonl, .json or .parquet file, or a folder saved by
    the datasets library."""
    split: str = "train"
    """Split, where the source has several."""
    max_samples: int | None = None
    """Take this many rows, chosen by the run's seed. None: all."""
    max_image_pixels: int = 50_000_000
    """Largest image accepted, in pixels: model input is untrusted."""


@dataclass(frozen=True, kw_only=True)
class RewardSettings:
    """Eq. 1."""

    __pydantic_config__ = STRICT

    format_weight: float = 0.1
    """lambda in [0, 0.5): below one half, every correct answer outranks every wrong one."""

    def __post_init__(self) -> None:
        check(
            0 <= self.format_weight < 0.5,
            "reward.format_weight",
            self.format_weight,
            "in [0, 0.5): from 0.5 on, a well-formatted wrong answer can outrank a correct one",
        )


@dataclass(frozen=True, kw_only=True)
class LossSettings:
    """The surrogate and its regulariser (Eqs. 12-13). Table 5 sets the defaults per algorithm."""

    __pydantic_config__ = STRICT

    clip_eps_low: float = 0.2
    """eps_low."""
    clip_eps_high: float = 0.28
    """eps_high."""
    dual_clip: float | None = None
    """Upper bound on the ratio where the advantage is negative. None: none."""
    kl_coef: float = 0.02
    """beta."""
    kl_estimator: Literal["k1", "k2", "k3", "exact"] = "k3"
    """Per-token estimator of KL[pi_theta || pi_ref]; `exact` sums over the vocabulary."""
    entropy_coef: float = 0.0
    """Coefficient of an entropy bonus."""
    ratio_level: Literal["token", "sequence"] = "token"
    """Importance ratio per token, or one per sequence (GSPO)."""
    aggregation: Literal["sequence", "token", "max_length"] = "sequence"
    """What the summed loss is divided by: sequences trained, their response tokens, or sequences
    times `rollout.max_new_tokens` (Dr. GRPO)."""
    importance_sampling: Literal["none", "token", "sequence"] = "token"
    """Weigh by pi_trainer / pi_engine, per token or per response, where the rollout engine returns
    log-probs (vLLM): it computes the policy a little differently."""
    importance_cap: float = 2.0
    """Largest such weight."""
    importance_over_cap: Literal["truncate", "mask"] = "truncate"
    """What happens above the cap: the weight is the cap, or 0."""

    def __post_init__(self) -> None:
        check(self.importance_cap > 0, "loss.importance_cap", self.importance_cap, "above 0")


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """The optimiser's loop."""

    __pydantic_config__ = STRICT

    steps: int = 100
    """Rollout batches to train on."""
    prompts_per_step: int = 32
    """Prompts per rollout batch, over all ranks."""
    num_iterations: int = 1
    """Passes over each rollout batch."""
    mini_batches: int = 1
    """Optimiser steps per pass; the batch is split by prompts."""
    micro_batch_size: int = 64
    """Sequences per forward and backward on one rank; gradients accumulate over them."""
    learning_rate: float = 1e-6
    """Peak learning rate."""
    min_learning_rate: float = 0.0
    """Learning rate at the end of a cosine or linear schedule."""
    warmup_steps: int = 10
    """Optimiser steps of linear warm-up."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """Shape of the learning rate after the warm-up."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay."""
    adam_betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's betas."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global norm."""
    freeze_vision: bool = False
    """Train the language model alone."""
    dynamic_sampling: bool = False
    """Draw more prompts until every group of the batch has both right and wrong rollouts (DAPO)."""
    max_resample_rounds: int = 3
    """Rounds of dynamic sampling before the batch is trained as it is."""
    save_every: int = 0
    """Steps between checkpoints; 0 keeps the final one only."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints are kept."""
    keep_best: Literal["accuracy", "format", "greedy_accuracy", "greedy_format"] | None = None
    """Also keep the checkpoint that was best in this number of the evaluations every `eval_every`
    steps, saved whenever one beats those before; `checkpoints/best.json` names it."""
    eval_every: int = 0
    """Steps between evaluations on `eval.data`; 0: before and after only."""

    def __post_init__(self) -> None:
        for key in (
            "steps",
            "prompts_per_step",
            "num_iterations",
            "mini_batches",
            "micro_batch_size",
            "keep_checkpoints",
        ):
            check(getattr(self, key) >= 1, f"train.{key}", getattr(self, key), "at least 1")
        check(self.learning_rate > 0, "train.learning_rate", self.learning_rate, "above 0")
        check(
            self.keep_best is None or self.eval_every > 0,
            "train.keep_best",
            self.keep_best,
            "null, or train.eval_every above 0: without evaluations none is best",
        )
        check(
            self.prompts_per_step % self.mini_batches == 0,
            "train.mini_batches",
            self.mini_batches,
            f"a divisor of train.prompts_per_step = {self.prompts_per_step}",
        )


@dataclass(frozen=True, kw_only=True)
class SftSettings:
    """Cold start (Sec. 3.1's format), before reinforcement learning."""

    __pydantic_config__ = STRICT

    data: DataSettings = field(default_factory=DataSettings)
    """Rows with a `rationale`."""
    steps: int = 160
    """Optimiser steps."""
    batch_size: int = 64
    """Rows per step, over all ranks."""
    micro_batch_size: int = 64
    """Rows per forward and backward on one rank."""
    learning_rate: float = 1e-5
    """Peak learning rate."""
    warmup_steps: int = 10
    """Steps of linear warm-up."""
    schedule: Literal["constant", "cosine", "linear"] = "cosine"
    """Shape of the learning rate after the warm-up."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global norm."""
    save_every: int = 0
    """Steps between checkpoints, deleted at the cold start's end; 0 saves where a signal asks."""
    repair_share: float = 0.0
    """Share of rows shown as a repair: a wrong rationale, the cue, then the right one. A model that
    cannot follow instructions yet learns there what the cue asks for."""


@dataclass(frozen=True, kw_only=True)
class EvalSettings:
    """Evaluation: single decode, no reflection (Sec. 8.3)."""

    __pydantic_config__ = STRICT

    data: DataSettings = field(default_factory=lambda: DataSettings(split="test"))
    """Held-out rows."""
    greedy: bool = True
    """Report greedy decoding too, beside the training temperature."""
    batch_size: int = 256
    """Sequences generated at once on one rank."""


@dataclass(frozen=True, kw_only=True)
class DeepSpeedSettings:
    """What deepspeed.initialize gets."""

    __pydantic_config__ = STRICT

    zero_stage: Literal[0, 1, 2, 3] = 0
    """ZeRO stage."""
    config: dict[str, Any] = field(default_factory=dict)
    """More DeepSpeed keys, merged over those made here (for example `zero_optimization`)."""


@dataclass(frozen=True, kw_only=True)
class LoggingSettings:
    """What a run tells."""

    __pydantic_config__ = STRICT

    tensorboard: bool = True
    """Write TensorBoard event files."""
    wandb: bool = False
    """Log to Weights & Biases, when installed."""
    trackio: bool = False
    """Log to trackio, when installed."""
    project: str = "care"
    """Project name for wandb and trackio."""
    samples_every: int = 25
    """Steps between printed sample completions; 0: never."""
    progress: bool = True
    """Show progress bars."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """A run."""

    __pydantic_config__ = STRICT

    name: str = "care"
    """The run's folder below `output_dir`."""
    output_dir: str = "runs"
    """Where runs are written."""
    seed: int = 0
    """Seeds the model's first weights, the order of rows and every rollout."""
    algorithm: Algorithm = "care"
    """care | grpo | dapo | gspo | dr_grpo, configured as in Table 5."""
    preset: Literal["default", "literal", "official"] = "default"
    """`literal`: Algorithm 1 to the letter. `official`: the authors' released code."""
    resume: bool = False
    """Go on from the newest usable checkpoint of the run (also `--resume`). `resume=runs/x` names
    its folder, and without a `--config` takes its config.yaml."""
    allow_changes: list[str] = field(default_factory=list)
    """Keys and sections that `resume` may find changed although they decide where the run goes.
    Those of `eval`, `logging` and checkpoints may change anyway, and train.steps under a constant
    schedule."""
    overwrite: bool = False
    """Let a new run replace one of the same name; without it that is an error."""
    model: ModelSettings = field(default_factory=ModelSettings)
    prompt: PromptSettings = field(default_factory=PromptSettings)
    data: DataSettings = field(default_factory=DataSettings)
    rollout: RolloutSettings = field(default_factory=RolloutSettings)
    reward: RewardSettings = field(default_factory=RewardSettings)
    care: CareSettings = field(default_factory=CareSettings)
    loss: LossSettings = field(default_factory=LossSettings)
    train: TrainSettings = field(default_factory=TrainSettings)
    sft: SftSettings = field(default_factory=SftSettings)
    eval: EvalSettings = field(default_factory=EvalSettings)
    deepspeed: DeepSpeedSettings = field(default_factory=DeepSpeedSettings)
    logging: LoggingSettings = field(default_factory=LoggingSettings)

    def __post_init__(self) -> None:
        per_group = self.algorithm == "care" and self.care.normalize_over == "group"
        check(
            not per_group or self.loss.aggregation == "sequence",
            "loss.aggregation",
            self.loss.aggregation,
            "'sequence' with care.normalize_over = 'group': a token mean has no per-group form",
        )


def _loss(low: float, high: float, kl_coef: float, **more: Any) -> dict[str, Any]:
    return {"loss": {"clip_eps_low": low, "clip_eps_high": high, "kl_coef": kl_coef, **more}}


TABLE_5: dict[str, dict[str, Any]] = {
    "care": _loss(0.2, 0.28, 0.02),
    "grpo": _loss(0.2, 0.2, 0.02),
    "dapo": _loss(0.2, 0.28, 0.0, aggregation="token"),
    "gspo": _loss(3e-4, 4e-4, 0.0, ratio_level="sequence"),
    "dr_grpo": _loss(0.2, 0.2, 0.0, aggregation="max_length"),
}
"""The loss each algorithm brings, below the user's own settings. The paper's Table 5 has CARE,
GRPO, DAPO and GSPO; Dr. GRPO (arXiv:2503.20783) drops the KL, the length and the std."""
