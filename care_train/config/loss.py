"""Settings of the loss, with each algorithm's own."""

from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat

from care_train.config.base import Share, check, section

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
    clip_eps_low: Share = 0.2
    """eps_low."""
    clip_eps_high: NonNegativeFloat = 0.28
    """eps_high."""
    dual_clip: Annotated[float, Field(ge=1)] | None = None
    """Upper bound on the ratio where the advantage is negative. None: none."""
    kl_coef: NonNegativeFloat = 0.02
    """beta."""
    kl_estimator: Literal["k1", "k2", "k3", "k3_unbiased", "exact"] = "k3"
    """Per-token estimator of KL[pi_theta || pi_ref]. `k3_unbiased`: k3 times the ratio to the old
    policy, whose gradient is the KL's own (arXiv:2512.02556; TRL's `use_bias_correction_kl`);
    `exact` sums over the vocabulary."""
    entropy_coef: NonNegativeFloat = 0.0
    """Coefficient of an entropy bonus."""
    ratio_level: Literal["token", "sequence"] = "token"
    """Importance ratio per token, or one per sequence (GSPO)."""
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
