"""TRL's GRPO loss written as arguments of `linear_policy_loss`.

Shape letters: B sequences, T completion tokens, N rows.
"""

from typing import Any

import torch
from torch import Tensor
from trl import GRPOTrainer

FUSED_LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
"""TRL's clipped losses; they differ in how tokens are averaged."""


class PolicyTerms:
    """What the fused loss needs besides the model's inputs.

    A plain class, so that wrappers which cast or copy the tensors of dicts, tuples and dataclasses
    (FSDP's mixed precision rounds them to bfloat16) leave these alone.
    """

    def __init__(
        self, mask: Tensor, per_token: dict[str, Tensor | None], options: dict[str, Any]
    ) -> None:
        """
        Args:
            mask: [B, T], which completion tokens count.
            per_token: [B, T] each, under `linear_policy_loss`'s names.
            options: its other keyword arguments.
        """
        self.mask, self.per_token, self.options = mask, per_token, options

    def at(self, rows: Tensor) -> dict[str, Any]:
        """Keyword arguments of `linear_policy_loss` for rows [N] of the flattened [B * T]."""
        picked = {
            name: None if value is None else value.flatten()[rows]
            for name, value in self.per_token.items()
        }
        return {**picked, "sequence_ids": rows // self.mask.shape[1], **self.options}

    def magnitude(self) -> Tensor:
        """Sum of the absolute advantages: the size of the loss, were nothing to cancel."""
        advantages = self.per_token["advantages"]
        assert advantages is not None
        return advantages.abs().sum()


def why_not_fused(trainer: Any) -> str | None:
    """The first option of `trainer` that `linear_policy_loss` cannot express; None: it has none."""
    args = trainer.args
    peft = getattr(trainer.model, "active_peft_config", None)
    delta_is_dual_clip = args.delta is None or args.delta >= 1 + max(trainer.epsilon_high, 1e-6)
    obstacles = {
        f"loss_type={trainer.loss_type!r} (fused: {', '.join(FUSED_LOSS_TYPES)})": (
            trainer.loss_type not in FUSED_LOSS_TYPES
        ),
        f"{type(trainer).__name__}'s own _compute_loss": not _is_trl_own(trainer),
        f"delta={args.delta} under 1 + epsilon_high": not delta_is_dual_clip,
        f"top_entropy_quantile={trainer.top_entropy_quantile}": trainer.top_entropy_quantile < 1,
        f"off_policy_mask_threshold={trainer.off_policy_mask_threshold}": (
            trainer.off_policy_mask_threshold is not None
        ),
        "use_bias_correction_kl=True": trainer.beta != 0 and args.use_bias_correction_kl,
        "use_adaptive_entropy=True": trainer.use_adaptive_entropy,
        "the router's auxiliary loss": trainer.aux_loss_enabled,
        f"DataParallel over {args.n_gpu} devices": args.n_gpu > 1,
        "prompt learning": peft is not None and getattr(peft, "is_prompt_learning", False),
    }
    return next((name for name, is_obstacle in obstacles.items() if is_obstacle), None)


def policy_terms(trainer: Any, inputs: dict[str, Any]) -> PolicyTerms:
    """One micro-batch of `trainer`'s loss as arguments of `linear_policy_loss`.

    Source: `GRPOTrainer._compute_loss` of TRL 1.16.

    Args:
        trainer: without an obstacle to `why_not_fused`.
        inputs: the micro-batch that `_compute_loss` gets.
    """
    mask = inputs["completion_mask"]
    if "tool_mask" in inputs:
        mask = mask * inputs["tool_mask"]
    accumulation = trainer.current_gradient_accumulation_steps if trainer.model.training else 1.0
    weights = mask / _normaliser(trainer, inputs, mask, accumulation)
    advantages = inputs["advantages"]
    advantages = weights * (advantages.unsqueeze(1) if advantages.dim() == 1 else advantages)
    if trainer.use_vllm and trainer.vllm_importance_sampling_correction:
        advantages = advantages * inputs["importance_sampling_ratio"]
    has_kl = trainer.beta != 0
    # Also where there is no bonus: asking for the entropy is what computes it for the metrics.
    bonus = trainer.entropy_coef * mask / mask.sum().clamp(min=1.0) / accumulation
    per_token = {
        "advantages": advantages,
        "old_log_probs": inputs.get("old_per_token_logps"),
        "ref_log_probs": inputs["ref_per_token_logps"] if has_kl else None,
        "kl_weights": trainer.beta * weights if has_kl else None,
        "entropy_weights": bonus,
    }
    options = {
        "clip_eps_low": trainer.epsilon_low,
        "clip_eps_high": trainer.epsilon_high,
        "dual_clip": trainer.args.delta,
        "ratio_level": trainer.importance_sampling_level,
    }
    return PolicyTerms(mask, per_token, options)


def check_agreement(fused: Tensor, trl: Tensor, terms: PolicyTerms) -> None:
    """Hold the fused loss against the one TRL's own code finds from the same log-probs.

    Raises:
        RuntimeError: they differ by more than round-off, so an option was misread.
    """
    fused, trl = fused.detach(), trl.detach()
    allowed = 1e-3 * trl.abs() + 1e-4 * terms.magnitude() + 1e-7
    if bool(torch.isfinite(trl)) and not bool((fused - trl).abs() <= allowed):
        raise RuntimeError(
            f"the fused loss is {fused.item()}, TRL's own {trl.item()}: use "
            "use_care_kernels(trainer, path='log_probs'), and please report the trainer's settings"
        )


def _is_trl_own(trainer: Any) -> bool:
    """Whether both methods that make the loss are GRPOTrainer's, not a subclass's."""
    names = ("_compute_loss", "_get_per_token_logps_and_entropies")
    return all(getattr(type(trainer), name) is getattr(GRPOTrainer, name) for name in names)


def _normaliser(
    trainer: Any, inputs: dict[str, Any], mask: Tensor, accumulation: float
) -> Tensor | float:
    """What each token's loss is divided by: a number or [B, 1]."""
    num_sequences = mask.shape[0]
    if trainer.loss_type == "grpo":
        return num_sequences * mask.sum(-1, keepdim=True).clamp(min=1.0) * accumulation
    if trainer.loss_type == "bnpo":
        return mask.sum().clamp(min=1.0) * accumulation
    if trainer.loss_type == "dr_grpo":
        return num_sequences * trainer.max_completion_length * accumulation
    if trainer.loss_type == "luspo":
        return num_sequences * accumulation
    assert trainer.loss_type == "dapo"
    # The count spans a generation batch; one accumulation window is a part of it.
    window = trainer.args.steps_per_generation if trainer.model.training else 1.0
    total = inputs["num_items_in_batch"].clamp(min=1.0) / trainer.accelerator.num_processes
    return total * accumulation / window
