"""Settings of the loss, with each algorithm's own."""

from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat

from care_train.config.base import Share, check, section

Algorithm = Literal[
    "care", "grpo", "dapo", "gspo", "dr_grpo", "rloo", "reinforce_pp", "cispo", "sapo"
]


@section
class LossSettings:
    """The surrogate and its regulariser (Eqs. 12-13). Table 5 sets the defaults per algorithm."""

    surrogate: Literal["clip", "cispo", "sapo"] = "clip"
    """`clip`: Eq. 12. `cispo` (arXiv:2506.13585): the ratio, held within 1 - clip_eps_low and
    1 + clip_eps_high, weighs each token's log-prob, whose gradient is never cut. `sapo`
    (arXiv:2511.20347): a smooth gate around a ratio of 1, which reads no clip range."""
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
    importance_sampling: Literal["none", "token", "sequence", "geometric"] = "token"
    """Weigh by pi_trainer / pi_engine where the rollout engine returns log-probs (vLLM), as it
    computes the policy a little differently: per token, by the response's product, or by the
    geometric mean over its tokens."""
    importance_cap: PositiveFloat = 2.0
    """Largest such weight."""
    importance_floor: NonNegativeFloat = 0.0
    """Smallest such weight."""
    importance_beyond: Literal["truncate", "mask"] = "truncate"
    """What becomes of a weight outside floor and cap: the nearer of them, or 0, so that the token
    (or response) trains nothing. IcePop (arXiv:2510.18855) is `token` and `mask` within 0.5 and 5;
    a sequence mask is `geometric` and `mask`."""

    def __post_init__(self) -> None:
        floor, wanted = self.importance_floor, f"at most importance_cap = {self.importance_cap}"
        check(floor <= self.importance_cap, "loss.importance_floor", floor, wanted)


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
