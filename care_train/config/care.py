"""Algorithm 1's settings: the paper's symbols and each decision the paper leaves open.

Two presets change several at once: `literal` follows Algorithm 1 to the letter, `official` the
authors' released code (github.com/yongxinwang-ai/CARE at 8c6045c) where it differs from the paper.
"""

from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from care_train.config.base import PositiveShare, check, section

Selector = Literal["cosine_diverse", "cosine_topk", "random", "nearest", "mixed", "farthest"]


@section
class ReflectionSettings:
    """Reflection-guided resampling (Sec. 3.6; Algorithm 1, lines 11-20)."""

    enabled: bool = True
    """Resample one hard negative of every group that has a correct anchor. Off: "CARE w/o RGR"."""
    negative: Literal["nearest", "random"] = "nearest"
    """Which negative reflects: the one with the smallest cosine distance, or a random one."""
    cue: str = (
        "Your previous reasoning was incorrect. Identify the failing operation, correct it, "
        "and re-derive the necessary quantities. Keep this section concise. "
        "Do not restate the question."
    )
    """The repair cue put after the failed rationale, with the think span left open."""
    context: Literal["full", "x_only"] = "full"
    """What the reflected response is conditioned on when trained: the context it was sampled from
    (prompt, failed rationale, cue), or the prompt alone, with truncated importance weights."""
    on_failure: Literal["append", "replace"] = "append"
    """A failed reflection joins S (line 18), or replaces the negative it came from (`official`)."""
    success_advantage: Literal["raw", "penalized"] = "raw"
    """A verified repair keeps A_raw, or gets -s|A_raw| as line 37 has it (`literal`)."""
    reflect_scale: PositiveFloat | None = None
    """s_refl: the negative scale of a failed reflection. None: s / 2. At most s."""
    temperature: PositiveFloat | None = None
    """Sampling temperature of the reflection. None: the rollouts' own."""
    top_p: PositiveShare | None = None
    """Nucleus threshold of the reflection. None: the rollouts' own."""
    max_new_tokens: PositiveInt | None = None
    """Length limit of the reflection in tokens. None: the rollouts' own."""


@section
class RescueSettings:
    """All-negative rescue (Sec. 3.7, Eq. 14; Algorithm 1, lines 22-24)."""

    enabled: bool = True
    """Train groups in which every rollout is wrong."""
    delta: PositiveFloat = 0.1
    """Size of the pseudo-contrast. The z-score cancels it: use `scale` to weaken a rescue."""
    scale: NonNegativeFloat = 1.0
    """Factor on a rescued group's advantages."""
    score: Literal["mean", "sum"] = "mean"
    """Pseudo-anchor: the highest mean old log-prob per token, or the highest sum (`literal`), which
    favours short output."""
    require_format: bool = True
    """Only a well-formed failure may become the pseudo-anchor; without one there is no rescue."""
    num_negatives: Literal["available", "literal"] = "available"
    """K' = min(K, failures - 1), which keeps Eq. 14 zero-sum, or line 23's min(K, failures)."""


@section
class CareSettings:
    """CARE's settings (paper Table 5 and Sec. 3)."""

    max_negatives: PositiveInt = 4
    """K: target number of hard negatives in the subgroup."""
    preselect_size: PositiveInt = 6
    """M: nearest failures kept before the farthest-first pass."""
    selector: Selector = "cosine_diverse"
    """How hard negatives are chosen: `cosine_diverse` (nearest M, then farthest-first),
    `cosine_topk` and its Figure 5 name `nearest`, `mixed` (half nearest, half farthest),
    `farthest`, `random`."""
    farthest_first_start: Literal["nearest", "farthest"] = "nearest"
    """Where the farthest-first pass starts: the hardest negative, or the easiest (`official`)."""
    positive: Literal["accuracy", "reward"] = "accuracy"
    """What a positive is: acc = 1 (Eq. 2), or reward > 0 (`official`)."""
    partial: Literal["neither", "literal"] = "neither"
    """0 < acc < 1: neither positive nor failure, so that a group holding one is not rescued and a
    reflection scoring so is dropped; or as Algorithm 1 branches (`literal`): such a reflection
    failed, and a group without positives is rescued."""
    anchor: Literal["shortest_think", "random"] = "shortest_think"
    """The anchor among the positives: Eq. 2, or a random one (Sec. 9.2's control)."""
    anchor_prefers_format: bool = True
    """Positives with fmt = 1 come first: a correct rollout without a rationale has T_think = 0 and
    would otherwise always win, until the policy stops reasoning."""
    neg_scale: PositiveShare = 0.5
    """s in (0, 1]: factor on the negatives' advantages (Eq. 8)."""
    equalize: bool = True
    """Multiply by sqrt(K / K_S) where K_S < K."""
    count_negatives_by: Literal["accuracy", "reward"] = "accuracy"
    """K_S counts members with acc = 0, or with a reward below the anchor's (line 26, `literal`)."""
    clamp_anchor: bool = True
    """Set a negative anchor advantage to 0 (possible where format scores differ)."""
    think_weight: NonNegativeFloat = 0.005
    """gamma+: weight of a positive's rationale tokens; a negative's weigh 0 (Eq. 11)."""
    tag_weight: NonNegativeFloat | None = None
    """Weight of tag and EOS tokens. None: answer tags and EOS 1, think tags like the rationale."""
    malformed: Literal["penalize", "ignore", "uniform"] = "penalize"
    """A malformed rollout: negatives get weight 1 on every token and positives 0 (`penalize`), both
    get 0 (`ignore`: Algorithm 1 to the letter), or both 1 (`uniform`)."""
    malformed_when: Literal["no_answer", "bad_format"] = "no_answer"
    """Malformed is a rollout without a complete answer span, or any with fmt < 1: a policy that
    still breaks its think tags is corrected only by the second, for a negative's rationale weighs
    0. Under `bad_format` a correct rollout keeps its region weights."""
    normalize_over: Literal["step", "group"] = "step"
    """1/|S*| over the whole optimiser step, on all ranks, or per group and then over groups."""
    robust: bool = False
    """Trimmed mean and median absolute deviation instead of Eqs. 5-6; Eq. 6 where the MAD is 0."""
    robust_trim: Annotated[float, Field(ge=0, lt=0.5)] = 0.2
    """Share of members the robust mean trims at each end, in [0, 0.5)."""
    norm_eps: NonNegativeFloat = 1e-6
    """Added to sigma_S, outside the root (Eq. 6)."""
    weight_eps: PositiveFloat = 1e-8
    """eps_w of Eq. 11."""
    reflection: ReflectionSettings = field(default_factory=ReflectionSettings)
    """Reflection-guided resampling."""
    rescue: RescueSettings = field(default_factory=RescueSettings)
    """All-negative rescue."""

    def __post_init__(self) -> None:
        scale = self.reflect_scale
        check(
            scale <= self.neg_scale,
            "care.reflection.reflect_scale",
            scale,
            f"in (0, neg_scale = {self.neg_scale}]",
        )

    @property
    def reflect_scale(self) -> float:
        """s_refl: half of s unless set."""
        scale = self.reflection.reflect_scale
        return self.neg_scale / 2 if scale is None else scale


PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "literal": {
        "care": {
            "partial": "literal",
            "normalize_over": "group",
            "anchor_prefers_format": False,
            "count_negatives_by": "reward",
            "clamp_anchor": False,
            "malformed": "ignore",
            "tag_weight": 0.0,
            "reflection": {"success_advantage": "penalized"},
            "rescue": {"score": "sum", "require_format": False, "num_negatives": "literal"},
        },
    },
    "official": {
        "care": {
            "positive": "reward",
            "anchor_prefers_format": False,
            "farthest_first_start": "farthest",
            "malformed": "uniform",
            "tag_weight": 0.0,
            "reflection": {
                "on_failure": "replace",
                "temperature": 0.6,
                "top_p": 0.95,
                "max_new_tokens": 512,
            },
            "rescue": {"score": "sum", "require_format": False},
        },
        "loss": {"aggregation": "token"},
    },
}
"""Settings each `preset` lays under the user's own."""
