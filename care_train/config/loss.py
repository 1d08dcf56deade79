"""Settings of the loss, with each algorithm's own."""

from dataclasses import dataclass
from typing import Any, Literal

from care_train.config.base import STRICT, check, check_at_least

Algorithm = Literal["care", "grpo", "dapo", "gspo", "dr_grpo"]


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
        check(0 <= self.clip_eps_low <= 1, "loss.clip_eps_low", self.clip_eps_low, "in [0, 1]")
        check_at_least(self, "loss", clip_eps_high=0, dual_clip=1, kl_coef=0, entropy_coef=0)
        check(self.importance_cap > 0, "loss.importance_cap", self.importance_cap, "above 0")


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
