"""CARE's settings by the paper's symbols, the decisions it leaves open, and the loss.

Two presets take those decisions otherwise: `literal` follows Algorithm 1 to the letter, `official`
the authors' released code (github.com/yongxinwang-ai/CARE at 8c6045c) where it differs from the
paper.
"""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field, InstanceOf, NonNegativeFloat, PositiveFloat, PositiveInt

from care_train.config.base import PositiveShare, Share, check, section

Percent = Annotated[str, Field(pattern=r"^\d{1,2}(\.\d+)?%$")]
Selector = Literal["cosine_diverse", "random", "nearest", "mixed", "farthest", "learned"]


@dataclass(frozen=True, kw_only=True)
class Decisions:
    """What the paper leaves open, as a `preset` decides it; no key of a configuration."""

    positive: Literal["accuracy", "reward"] = "accuracy"
    """A positive has acc = 1 (Eq. 2), or reward > 0 (`official`)."""
    partial: Literal["neither", "literal"] = "neither"
    """0 < acc < 1: neither positive nor failure, so that a group holding one is not rescued and a
    reflection scoring so is dropped; or as Algorithm 1 branches (`literal`): such a reflection
    failed, and a group without positives is rescued."""
    anchor_prefers_format: bool = True
    """Positives with fmt = 1 come first: a correct rollout without a rationale has T_think = 0 and
    would otherwise always win, until the policy stops reasoning."""
    rescue_negatives: Literal["nearest", "spread"] = "nearest"
    """A rescue's negatives: chosen like an anchored group's, or by a farthest-first pass over all
    failures that starts at the farthest (`official`)."""
    failed_reflection: Literal["append", "replace"] = "append"
    """A failed reflection joins S (line 18), or replaces the negative it came from (`official`)."""
    repaired_advantage: Literal["raw", "penalized"] = "raw"
    """A verified repair keeps A_raw (Eq. 8 scales negatives only), or gets -s|A_raw| as line 37
    has it (`literal`)."""
    count_negatives_by: Literal["accuracy", "reward", "members"] = "accuracy"
    """K_S counts members with acc = 0, those with a reward below the anchor's (line 26,
    `literal`), or all but the anchor, a verified repair included (`official`)."""
    clamp_anchor: bool = True
    """Set a negative anchor advantage to 0 (possible where format scores differ)."""
    tag_weight: float | None = None
    """Weight of tag and EOS tokens. None: answer tags and EOS 1, think tags like the rationale,
    since otherwise nothing trains the closing tags."""
    malformed: Literal["penalize", "ignore"] = "penalize"
    """A malformed rollout: negatives get weight 1 on every token and positives 0 (`penalize`, since
    otherwise nothing penalises broken output), or both 0 (`ignore`)."""
    spans: Literal["text", "tokens"] = "text"
    """Where rationale and answer lie and what they weigh: by the tags in the decoded text, or by
    the tags' token ids (`official`: `algorithm.released`)."""
    repair: Literal["rationale", "answer"] = "rationale"
    """A reflection continues an open rationale, is scored with it, and trained behind what it was
    sampled behind (prompt, failed rationale, cue); or it continues the failed response from an
    opened answer tag, and its new tokens alone are scored and trained, as if they had been sampled
    after the prompt (`official`)."""
    repair_temperature: float | None = None
    """Sampling temperature of a reflection. None: the rollouts' own, as for the next two."""
    repair_top_p: float | None = None
    """Its nucleus threshold."""
    repair_max_tokens: int | None = None
    """Its length limit in tokens, where the rollouts' own is not lower."""
    beyond_subgroup: Literal["dropped", "regularized"] = "dropped"
    """Sequences outside S* are not forwarded; or they count in the loss's denominator and the KL
    pulls at them (`official`)."""
    normalize_over: Literal["step", "group"] = "step"
    """1/|S*| over the whole optimiser step, on all ranks, or per group and then over groups: the
    division per group would undo the equalisation."""
    proxy_score: Literal["mean", "sum"] = "mean"
    """Pseudo-anchor: the highest mean old log-prob per token, or the highest sum (line 22), which
    favours short output."""
    proxy_requires_format: bool = True
    """Only a well-formed failure may become the pseudo-anchor; without one there is no rescue."""
    rescue_size: Literal["available", "literal"] = "available"
    """K' = min(K, failures - 1), which keeps Eq. 14 zero-sum, or line 23's min(K, failures)."""


LITERAL = Decisions(
    partial="literal",
    anchor_prefers_format=False,
    repaired_advantage="penalized",
    count_negatives_by="reward",
    clamp_anchor=False,
    tag_weight=0.0,
    malformed="ignore",
    normalize_over="group",
    proxy_score="sum",
    proxy_requires_format=False,
    rescue_size="literal",
)
OFFICIAL = Decisions(
    positive="reward",
    anchor_prefers_format=False,
    rescue_negatives="spread",
    failed_reflection="replace",
    count_negatives_by="members",
    clamp_anchor=False,
    spans="tokens",
    repair="answer",
    repair_temperature=0.6,
    repair_top_p=0.95,
    repair_max_tokens=512,
    beyond_subgroup="regularized",
    proxy_score="sum",
    proxy_requires_format=False,
)


@section
class ReflectionSettings:
    """Reflection-guided resampling (Sec. 3.6; Algorithm 1, lines 11-20)."""

    negative: Literal["nearest", "random", "none"] = "nearest"
    """Which hard negative is resampled in every group that has a correct anchor: the one with the
    smallest cosine distance, or a random one (with an empty cue, Figure 4's controls); `none`: no
    reflection ("CARE w/o RGR")."""
    cue: str = (
        "Your previous reasoning was incorrect. Identify the failing operation, correct it, "
        "and re-derive the necessary quantities. Keep this section concise. "
        "Do not restate the question."
    )
    """The repair cue put after the failed rationale, with the think span left open."""
    reflect_scale: PositiveFloat | None = None
    """s_refl: the negative scale of a failed reflection. null: s / 2. At most s."""

    @property
    def enabled(self) -> bool:
        """Whether a negative reflects."""
        return self.negative != "none"


@section
class CareSettings:
    """CARE's settings (paper Table 5 and Sec. 3)."""

    max_negatives: PositiveInt = 4
    """K: target number of hard negatives in the subgroup."""
    preselect_size: PositiveInt = 6
    """M: nearest failures kept before the farthest-first pass."""
    selector: Selector = "cosine_diverse"
    """How hard negatives are chosen: `cosine_diverse` (nearest M, then farthest-first), `nearest`
    (Figure 5's COSINE-TOPK'), `mixed` (half nearest, half farthest), `farthest`, `random`.
    `learned`: those that a reflection would most likely repair, the likeliest reflects, by a model
    of the run's own reflections; as `cosine_diverse` until 64 of them are known."""
    anchor: Literal["shortest_think", "random", "all"] = "shortest_think"
    """The anchor among the positives: Eq. 2, or a random one (Sec. 9.2's control). `all`: Eq. 2's
    for the distances, and the other positives join S beside it."""
    neg_scale: PositiveShare = 0.5
    """s: factor on the negatives' advantages (Eq. 8)."""
    target_snr: PositiveFloat | None = None
    """Signal-to-noise ratio that K' and s adapt to in each group with an anchor: the fewest of the
    chosen negatives that reach it are taken; where all of them do not, s is lowered until they do.
    One negative reaches 1 / s, four with nothing in common 2 / s. null: K and s as they are set."""
    equalize: bool = True
    """Multiply by sqrt(K / K_S) where K_S < K."""
    credit: Literal["regions", "unmasked", "uniform", "departure", "steps"] = "regions"
    """Which tokens weigh. `regions`: Eq. 11's. `unmasked`: a negative's rationale too, like a
    positive's (Figure 8's control). `uniform`: every token 1. `departure`: 1 from the token on
    where a negative departs from the positive it follows longest, 0 before; a positive from the
    first such departure on; a rescued group, which has no positive, as under `regions`. `steps`:
    a reward function names a response's first wrong step (docs/verifier.md): of A's size, the
    tokens before it are credited, its own are blamed, later ones weigh 0, whether the answer is
    right or wrong; a response without one as under `uniform`, a rescued group with such a one is
    skipped."""
    think_weight: NonNegativeFloat | Percent = 0.005
    """gamma+: weight of a positive's rationale tokens; a negative's weigh 0 (Eq. 11). A share such
    as `50%` is what the rationale gets of a positive's credit, however long it is: 0.005 gives 24
    tokens 2 % of it and 1,000 tokens half."""
    malformed_when: Literal["no_answer", "bad_format"] = "no_answer"
    """Malformed is a rollout without a complete answer span, or any with fmt < 1: a policy that
    still breaks its think tags is corrected only by the second, for a negative's rationale weighs
    0. Under `bad_format` a correct rollout keeps its region weights."""
    reflection: ReflectionSettings = field(default_factory=ReflectionSettings)
    """Reflection-guided resampling."""
    rescue: NonNegativeFloat = 1.0
    """All-negative rescue (Sec. 3.7, Eq. 14; Algorithm 1, lines 22-24): factor on the advantages of
    a group in which every rollout is wrong; 0: such groups are not trained. delta has no effect, as
    the z-score cancels it."""
    decisions: Annotated[InstanceOf[Decisions], Field(exclude=True)] = field(
        default_factory=Decisions
    )
    """Set by `preset`."""

    def __post_init__(self) -> None:
        scale, wanted = self.reflect_scale, f"in (0, neg_scale = {self.neg_scale}]"
        check(scale <= self.neg_scale, "care.reflection.reflect_scale", scale, wanted)

    @property
    def think_share(self) -> float | None:
        """`think_weight` as a share of the credit; None where it is a weight per token."""
        weight = self.think_weight
        return float(weight[:-1]) / 100 if isinstance(weight, str) else None

    @property
    def gamma(self) -> float:
        """gamma+; 0 where the rationale has a share of the credit instead."""
        return 0.0 if isinstance(self.think_weight, str) else self.think_weight

    @property
    def reflect_scale(self) -> float:
        """s_refl: half of s unless set."""
        scale = self.reflection.reflect_scale
        return self.neg_scale / 2 if scale is None else scale


_OFFICIAL_SETTINGS: dict[str, Any] = {
    "care": {
        "decisions": OFFICIAL,
        "reflection": {
            "cue": "\n<repair>\n- Mistake:\n- Fix:\n- Corrected final answer:\n</repair>\n"
        },
    },
    "model": {"image_pixels": [262_144, 4_194_304]},
    "prompt": {
        "system": None,
        "suffix": (
            "You FIRST think about the reasoning process as an internal monologue and then provide "
            "the final answer. The reasoning process MUST BE enclosed within <think> </think> "
            "tags. The final answer MUST BE put in \\boxed{}."
        ),
        "tags": ["think", "boxed"],
        "overlong": "drop",
    },
    "rollout": {"max_new_tokens": 2048},
    "loss": {
        "aggregation": "token",
        "clip_eps_high": 0.3,
        "dual_clip": 3.0,
        "kl_coef": 0.01,
        "importance_sampling": "none",
    },
    "train": {"prompts_per_step": 512, "mini_batches": 4, "warmup_steps": 0, "weight_decay": 0.01},
}
PRESETS: dict[str, dict[str, Any]] = {
    "default": {"care": {"decisions": Decisions()}},
    "literal": {"care": {"decisions": LITERAL}},
    "official": _OFFICIAL_SETTINGS,
}
"""What each `preset` lays under the user's own settings."""


Algorithm = Literal[
    "care", "grpo", "dapo", "gspo", "dr_grpo", "rloo", "reinforce_pp", "cispo", "sapo"
]
ImportanceSampling = Literal[
    "none", "token", "sequence", "geometric", "token_mask", "sequence_mask", "geometric_mask"
]


@section
class LossSettings:
    """The surrogate and its regulariser (Eqs. 12-13). Table 5 sets the defaults per algorithm."""

    surrogate: Annotated[Literal["clip", "cispo", "sapo"], Field(exclude=True)] = "clip"
    """Set by `algorithm`. `clip`: Eq. 12. `cispo` (arXiv:2506.13585): the ratio, held within
    1 - clip_eps_low and 1 + clip_eps_high, weighs each token's log-prob, whose gradient is never
    cut. `sapo` (arXiv:2511.20347): a smooth gate around a ratio of 1, which reads no clip range."""
    ratio_level: Annotated[Literal["token", "sequence"], Field(exclude=True)] = "token"
    """Set by `algorithm`: one importance ratio per token, or one per sequence (`gspo`)."""
    clip_eps_low: Share = 0.2
    """eps_low: the ratio's clip range begins at 1 - eps_low (Eq. 12)."""
    clip_eps_high: NonNegativeFloat = 0.28
    """eps_high: it ends at 1 + eps_high."""
    dual_clip: Annotated[float, Field(ge=1)] | None = None
    """Upper bound on the ratio where the advantage is negative. None: none."""
    kl_coef: NonNegativeFloat = 0.02
    """beta: weight of the KL that pulls towards the reference policy (Eq. 13); 0: none."""
    kl_estimator: Literal["k1", "k2", "k3", "k3_unbiased", "exact"] = "k3"
    """Per-token estimator of KL[pi_theta || pi_ref]. `k3_unbiased`: k3 times the ratio to the old
    policy, whose gradient is the KL's own (arXiv:2512.02556; TRL's `use_bias_correction_kl`);
    `exact` sums over the vocabulary."""
    entropy_coef: NonNegativeFloat = 0.0
    """Weight of a bonus for the policy's entropy."""
    aggregation: Literal["sequence", "token", "max_length"] = "sequence"
    """What the summed loss is divided by: sequences trained, their response tokens, or sequences
    times `rollout.max_new_tokens` (Dr. GRPO)."""
    mask_truncated: bool = False
    """Responses that the length limit cut train nothing and count in no denominator; their rewards
    still count in their group's."""
    importance_sampling: ImportanceSampling = "token"
    """Weigh by pi_trainer / pi_engine where the rollout engine returns log-probs (vLLM), as it
    computes the policy a little differently: per token, by the response's product (`sequence`), or
    by the geometric mean over its tokens. A weight outside `importance_range` becomes the nearer
    end of it; with `_mask` 0, so that the token or response trains nothing."""
    importance_range: Annotated[list[NonNegativeFloat], Field(min_length=2, max_length=2)] = field(
        default_factory=lambda: [0.0, 2.0]
    )
    """Smallest and largest such weight. IcePop (arXiv:2510.18855) is `token_mask` within
    [0.5, 5]."""

    def __post_init__(self) -> None:
        low, high = self.importance_range
        check(low <= high, "loss.importance_range", [low, high], "the smaller number first")


def _loss(low: float, high: float, kl_coef: float, **more: Any) -> dict[str, Any]:
    return {"loss": {"clip_eps_low": low, "clip_eps_high": high, "kl_coef": kl_coef, **more}}


TABLE_5: dict[str, dict[str, Any]] = {
    "care": _loss(0.2, 0.28, 0.02),
    "grpo": _loss(0.2, 0.2, 0.02),
    "dapo": _loss(0.2, 0.28, 0.0, aggregation="token"),
    "gspo": _loss(3e-4, 4e-4, 0.0, ratio_level="sequence"),
    "dr_grpo": _loss(0.2, 0.2, 0.0, aggregation="max_length"),
    "rloo": _loss(0.2, 0.2, 0.02, aggregation="max_length"),
    "reinforce_pp": _loss(0.2, 0.2, 0.02, aggregation="token"),
    "cispo": _loss(1.0, 4.0, 0.0, aggregation="token", surrogate="cispo"),
    "sapo": _loss(0.2, 0.2, 0.0, surrogate="sapo"),
}
"""The loss each algorithm brings, below the user's own settings. The paper's Table 5 has CARE,
GRPO, DAPO and GSPO; Dr. GRPO (arXiv:2503.20783) drops the KL, the length and the std. RLOO sums
over a response's tokens, REINFORCE++ averages over the batch's, with GRPO's KL in the loss. CISPO
weighs by a ratio of at most 5."""
