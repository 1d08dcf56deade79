"""Settings of the loss, with each algorithm's own."""

from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat

from care_train.config.base import Share, section

Algorithm = Literal["care", "grpo", "dapo", "gspo", "dr_grpo"]


@section
class LossSettings:
    """The surrogate and its regulariser (Eqs. 12-13). Table 5 sets the defaults per algorithm."""

    clip_eps_low: Share = 0.2
    """eps_low."""
    clip_eps_high: NonNegativeFloat = 0.28
    """eps_high."""
    dual_clip: Annotated[float, Field(ge=1)] | None = None
    """Upper bound on the ratio where the advantage is negative. None: none."""
    kl_coef: NonNegativeFloat = 0.02
    """beta."""
    kl_estimator: Literal["k1", "k2", "k3", "exact"] = "k3"
    """Per-token estimator of KL[pi_theta || pi_ref]; `exact` sums over the vocabulary."""
    entropy_coef: NonNegativeFloat = 0.0
    """Coefficient of an entropy bonus."""
    ratio_level: Literal["token", "sequence"] = "token"
    """Importance ratio per token, or one per sequence (GSPO)."""
    aggregation: Literal["sequence", "token", "max_length"] = "sequence"
    """What the summed loss is divided by: sequences trained, their response tokens, or sequences
    times `rollout.max_new_tokens` (Dr. GRPO)."""
    importance_sampling: Literal["none", "token", "sequence"] = "token"
    """Weigh by pi_trainer / pi_engine, per token or per response, where the rollout engine returns
    log-probs (vLLM): it computes the policy a little differently."""
    importance_cap: PositiveFloat = 2.0
    """Largest such weight: what is above becomes the cap."""


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
