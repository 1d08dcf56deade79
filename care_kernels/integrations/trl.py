"""TRL's `GRPOTrainer` on these kernels, with TRL's own options and metrics.

    from trl import GRPOTrainer

    from care_kernels.integrations.trl import use_care_kernels

    trainer = GRPOTrainer(model=model, reward_funcs=reward, args=args, train_dataset=dataset)
    use_care_kernels(trainer)
    trainer.train()

There are two paths, and `choose_path` takes the first that can express the trainer's options.
"fused" is one call of `linear_policy_loss` inside the model's forward: three matrix products with
the head instead of TRL's four (four, too, for a sequence's ratio to older log-probs), and one for
what the loss skips. "log_probs" is `linear_log_probs` under TRL's own loss: every option of TRL's.

On both paths TRL's own `_compute_loss` runs on the log-probs and entropies, so the metrics are its
own; on the fused path the loss it finds is held against the fused one at every step. The reference
model's log-probs come from the same kernel.

Shape letters: B sequences, L positions, T completion tokens, N rows, D hidden.
"""

import functools
import inspect
import logging
import types
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import trl
from accelerate.utils import is_peft_model
from torch import Tensor
from trl import GRPOTrainer

try:
    from trl.trainer.utils import FusedCausalLMOutput
except ImportError as error:
    raise ImportError(f"trl: got version {trl.__version__}; wanted 1.16.x") from error

from care_kernels.checks import wrong
from care_kernels.integrations.transformers import (
    backbone_rows,
    check_head,
    gathered,
    head_rows,
    unbound_forward,
)
from care_kernels.log_probs import linear_log_probs
from care_kernels.loss import linear_policy_loss
from care_kernels.objective import Cispo, Clip, Sapo, Surrogate

TESTED_VERSIONS = ("1.16",)
"""TRL releases whose internals this module knows."""
PATHS = ("fused", "log_probs")
FUSED_LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo")

_logger = logging.getLogger(__name__)


class Choice(NamedTuple):
    """Which path a trainer's loss takes."""

    path: str
    reason: str


def use_care_kernels(trainer: GRPOTrainer, path: str | None = None) -> Choice:
    """Make `trainer` compute its loss and all its log-probs through these kernels.

    Call it once, after constructing the trainer. Changes this trainer, its model and its reference
    model, nothing else; generation and plain forwards stay as they were.

    Args:
        trainer: a `GRPOTrainer` or a subclass, text or vision-language, with or without PEFT.
        path: "fused" or "log_probs"; None: the first that can express the trainer's options.

    Returns:
        The path taken and why; also logged at level INFO.

    Raises:
        ValueError: an untested TRL version, something that is no GRPOTrainer, a head that
            `head_parameters` cannot write as one matrix (quantised, DoRA), logits that are more
            than its output scaled and capped, or "fused" with an option it cannot express.
    """
    check_version()
    if not isinstance(trainer, GRPOTrainer):
        raise wrong("trainer", type(trainer).__name__, "a GRPOTrainer")
    choice = choose_path(trainer, path)
    for model, with_entropy in ((trainer.model, True), (trainer.ref_model, False)):
        if model is not None:
            _replace_fused_head(base_model(trainer, model), trainer.temperature, with_entropy)
    if choice.path == "fused":
        trainer._compute_loss = types.MethodType(_fused_loss, trainer)
    _logger.info("GRPOTrainer's loss takes the %s path: %s", *choice)
    return choice


def check_version() -> None:
    """ValueError: a TRL whose internals this module does not know."""
    if ".".join(trl.__version__.split(".")[:2]) not in TESTED_VERSIONS:
        wanted = " or ".join(f"{version}.x" for version in TESTED_VERSIONS)
        raise wrong("trl", f"version {trl.__version__}", wanted)


def choose_path(trainer: GRPOTrainer, path: str | None = None) -> Choice:
    """The path that `use_care_kernels` takes, with the same arguments and errors."""
    if path not in (None, *PATHS):
        raise wrong("path", repr(path), f"None or one of {PATHS}")
    obstacle = why_not_fused(trainer)
    if path == "log_probs":
        return Choice("log_probs", "asked for")
    if obstacle is None:
        return Choice("fused", "linear_policy_loss covers every option")
    if path == "fused":
        raise wrong("path", f"'fused' with {obstacle}", "None or 'log_probs'")
    return Choice("log_probs", f"TRL's own formula runs, because of {obstacle}")


class PolicyTerms:
    """What the fused loss needs besides the model's inputs: `linear_policy_loss`'s arguments.

    A plain class, so that wrappers which cast or copy the tensors of dicts, tuples and dataclasses
    (FSDP's mixed precision rounds them to bfloat16) leave these alone.
    """

    def __init__(
        self, mask: Tensor, per_token: dict[str, Tensor | None], options: dict[str, Any]
    ) -> None:
        """Those of every token, and `mask` of the tokens that count, are [B, T]."""
        self.mask, self.per_token, self.options = mask, per_token, options

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of `linear_policy_loss` for the tokens [N] that count."""
        counts = self.mask.bool()
        picked = {
            name: None if value is None else value[counts] for name, value in self.per_token.items()
        }
        return {**picked, "sequence_ids": counts.nonzero()[:, 0], **self.options}


def why_not_fused(trainer: Any) -> str | None:
    """What of `trainer` `linear_policy_loss` cannot stand for; None: nothing."""
    makers = ("_compute_loss", "_get_per_token_logps_and_entropies")
    if any(getattr(type(trainer), name) is not getattr(GRPOTrainer, name) for name in makers):
        return f"{type(trainer).__name__}'s own _compute_loss"
    return unfusable_option(trainer)


def unfusable_option(trainer: Any) -> str | None:
    """The first option of TRL's that `linear_policy_loss` cannot express; None: it has none."""
    args, threshold = trainer.args, trainer.off_policy_mask_threshold
    fused, loss_type = ", ".join(FUSED_LOSS_TYPES), trainer.loss_type
    peft = getattr(trainer.model, "active_peft_config", None)
    obstacles = {
        f"loss_type={loss_type!r} (fused: {fused})": loss_type not in FUSED_LOSS_TYPES,
        f"delta={args.delta} under 1": args.delta is not None and args.delta < 1,
        f"top_entropy_quantile={trainer.top_entropy_quantile}": trainer.top_entropy_quantile < 1,
        f"off_policy_mask_threshold={threshold}": threshold is not None,
        "use_adaptive_entropy=True": trainer.use_adaptive_entropy,
        "the router's auxiliary loss (router_aux_loss_coef=0: none)": trainer.aux_loss_enabled,
        f"DataParallel over {args.n_gpu} devices": args.n_gpu > 1,
        "prompt learning": peft is not None and getattr(peft, "is_prompt_learning", False),
    }
    return next((name for name, is_obstacle in obstacles.items() if is_obstacle), None)


def policy_terms(trainer: Any, inputs: dict[str, Any]) -> PolicyTerms:
    """The micro-batch that `_compute_loss` gets, where `why_not_fused` knows no obstacle.

    Source: `GRPOTrainer._compute_loss` of TRL 1.16.
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
    bonus = trainer.entropy_coef * mask / mask.sum().clamp(min=1.0) / accumulation
    return terms_of(trainer, inputs, mask, advantages, weights, bonus)


def terms_of(
    trainer: Any,
    inputs: Mapping[str, Any],
    mask: Tensor,
    advantages: Tensor,
    kl_shares: Tensor,
    entropy_weights: Tensor,
) -> PolicyTerms:
    """The terms of a micro-batch whose tokens [B, T] have these advantages, shares of beta, and
    coefficients of the entropy."""
    has_kl = trainer.beta != 0
    per_token = {
        "advantages": advantages,
        "old_log_probs": inputs.get("old_per_token_logps"),
        "ref_log_probs": inputs["ref_per_token_logps"] if has_kl else None,
        "kl_weights": trainer.beta * kl_shares if has_kl else None,
        "entropy_weights": entropy_weights if trainer.entropy_coef else None,
    }
    options = {
        "surrogate": policy_surrogate(trainer),
        "kl_estimator": "k3_unbiased" if trainer.args.use_bias_correction_kl else "k3",
        "ratio_level": trainer.importance_sampling_level,
    }
    return PolicyTerms(mask, per_token, options)


def check_agreement(fused: Tensor, trl: Tensor, terms: PolicyTerms) -> None:
    """RuntimeError where TRL's own code finds another loss from the same log-probs.

    A difference beyond round-off says that an option was misread.
    """
    fused, trl = fused.detach(), trl.detach()
    advantages = terms.per_token["advantages"]
    assert advantages is not None
    # The size of the loss, were nothing to cancel, says what round-off is.
    allowed = 1e-3 * trl.abs() + 1e-4 * advantages.abs().sum() + 1e-7
    if bool(torch.isfinite(trl)) and not bool((fused - trl).abs() <= allowed):
        raise RuntimeError(
            f"the fused loss is {fused.item()}, TRL's own {trl.item()}: use "
            "use_care_kernels(trainer, path='log_probs'), and please report the trainer's settings"
        )


def policy_surrogate(trainer: Any) -> Surrogate:
    """TRL's loss type as a surrogate of `linear_policy_loss`.

    `delta` bounds the ratio of the unclipped branch alone: for a < 0 the larger of it and
    1 + epsilon_high counts, for a > 0 the smaller.
    """
    if trainer.loss_type == "cispo":
        return Cispo(max_ratio=trainer.epsilon_high)
    if trainer.loss_type == "sapo":
        args = trainer.args
        return Sapo(args.sapo_temperature_pos, args.sapo_temperature_neg)
    high, delta = trainer.epsilon_high, trainer.args.delta
    if delta is None:
        return Clip(trainer.epsilon_low, high)
    upper = max(delta, 1 + high)
    return Clip(trainer.epsilon_low, min(high, delta - 1), upper if upper > 1 else None)


def _normaliser(
    trainer: Any, inputs: dict[str, Any], mask: Tensor, accumulation: float
) -> Tensor | float:
    """What each token's loss is divided by: a number or [B, 1]."""
    num_sequences = mask.shape[0]
    if trainer.loss_type in ("grpo", "sapo"):
        return num_sequences * mask.sum(-1, keepdim=True).clamp(min=1.0) * accumulation
    if trainer.loss_type == "bnpo":
        return mask.sum().clamp(min=1.0) * accumulation
    if trainer.loss_type == "dr_grpo":
        return num_sequences * trainer.max_completion_length * accumulation
    if trainer.loss_type == "luspo":
        return num_sequences * accumulation
    assert trainer.loss_type in ("dapo", "cispo")
    # The count spans a generation batch; one accumulation window is a part of it.
    window = trainer.args.steps_per_generation if trainer.model.training else 1.0
    total = inputs["num_items_in_batch"].clamp(min=1.0) / trainer.accelerator.num_processes
    return total * accumulation / window


def base_model(trainer: GRPOTrainer, model: Any) -> Any:
    model = trainer.accelerator.unwrap_model(model)
    return model.get_base_model() if is_peft_model(model) else model


def _replace_fused_head(model: Any, temperature: float, with_entropy: bool) -> None:
    """Replace what TRL put before the model's forward: calls with `fused_lm_head=True`."""
    check_head(model)
    others = _forward_under_trl(model)

    # generate() and Trainer read the signature.
    @functools.wraps(type(model).forward)
    def forward(
        self: Any,
        *args: Any,
        fused_lm_head: bool = False,
        policy_terms: PolicyTerms | None = None,
        **kwargs: Any,
    ) -> Any:
        if not fused_lm_head:
            return others(self, *args, **kwargs)
        names = ("labels", "shift_labels", "num_items_in_batch")
        labels, shift_labels, num_items = (kwargs.pop(name, None) for name in names)
        kwargs["use_cache"] = False
        if getattr(self.config.get_text_config(), "output_router_logits", False):
            kwargs.setdefault("output_router_logits", True)
        backbone, hidden, targets = backbone_rows(self, labels, shift_labels, *args, **kwargs)
        if policy_terms is not None:
            return _policy_loss_output(self, hidden, targets, policy_terms, temperature)
        mask = targets != -100
        with head_rows(self, hidden, targets, mask) as rows:
            found = linear_log_probs(
                **rows, temperature=temperature, return_entropy=with_entropy, gathered=gathered
            )
        log_probs, entropy = found if with_entropy else (found, None)
        count = mask.sum().clamp(min=1) if num_items is None else num_items
        output = _output(-log_probs.sum() / count, log_probs, entropy, mask)
        return _with_router_loss(output, self, backbone, kwargs)

    model.forward = types.MethodType(forward, model)


def _forward_under_trl(model: Any) -> Callable[..., Any]:
    """The forward that TRL's own fused head goes on to, as a function of the model.

    TRL 1.16's holds the original model's bound method, so a copy would run the original's weights.
    """
    fused = getattr(model.__dict__.get("forward"), "__func__", None)
    inner = inspect.getclosurevars(fused).nonlocals.get("original_forward") if fused else None
    if isinstance(inner, types.MethodType) and inner.__self__ is model:
        return inner.__func__
    return unbound_forward(model)


def _output(
    loss: Tensor, log_probs: Tensor, entropy: Tensor | None, mask: Tensor
) -> FusedCausalLMOutput:
    """Log-probs and entropies [N] of the positions in `mask` [B, L] as TRL wants them, 0 elsewhere.

    The graph stays even where N is 0.
    """
    mask = mask.to(log_probs.device)

    def spread(rows: Tensor) -> Tensor:
        return rows.new_zeros(mask.shape).masked_scatter(mask, rows)

    entropies = None if entropy is None else spread(entropy)
    return FusedCausalLMOutput(loss, spread(log_probs), entropies, label_mask=mask)


def _with_router_loss(
    output: FusedCausalLMOutput, model: Any, backbone: Any, arguments: dict[str, Any]
) -> FusedCausalLMOutput:
    """Add a mixture of experts' load-balancing loss, as the model's own forward does."""
    if not arguments.get("output_router_logits"):
        return output
    # The one that every family's modelling file takes over.
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    config = model.config.get_text_config()
    aux_loss: Any = load_balancing_loss_func(
        backbone.router_logits,
        config.num_experts,
        config.num_experts_per_tok,
        arguments.get("attention_mask"),
    )
    output.aux_loss = aux_loss
    output.loss = output.loss + getattr(config, "router_aux_loss_coef", 0.0) * aux_loss
    return output


def _policy_loss_output(
    model: Any, hidden: Tensor, targets: Tensor, terms: PolicyTerms, temperature: float
) -> FusedCausalLMOutput:
    """The fused loss, with detached log-probs and entropies [B, T] for TRL's metrics.

    Rows that the loss skips (a zero advantage, and neither KL nor entropy bonus) are counted in
    the metrics all the same: one more matrix product for these alone.
    """
    mask = terms.mask.bool()
    last = slice(-mask.shape[1], None)
    with head_rows(model, hidden[:, last], targets[:, last], mask) as rows:
        rows |= {"return_entropy": True, "report_all_rows": True, "temperature": temperature}
        found = linear_policy_loss(**rows, **terms.arguments())
    return _output(found.loss, found.log_probs, found.entropy, mask)


class PolicyLossCall:
    """Stands for the model inside TRL's `_compute_loss`: asks it for the fused loss and keeps it.

    The loss is an output of the wrapped model's own forward, which is where DDP, FSDP and ZeRO-3
    hang their hooks.
    """

    def __init__(self, model: Any, terms: PolicyTerms) -> None:
        self._model, self._terms = model, terms
        self.loss: Any = None

    def __call__(self, **inputs: Any) -> FusedCausalLMOutput:
        output = self._model(**inputs, policy_terms=self._terms)
        self.loss = output.loss
        return output


def _fused_loss(trainer: Any, model: Any, inputs: dict[str, Any]) -> Tensor:
    """`GRPOTrainer._compute_loss` whose gradient is the fused loss's.

    TRL's own method runs on the detached log-probs, for its metrics and as a check.
    """
    trl_loss = type(trainer)._compute_loss
    if not torch.is_grad_enabled():
        return trl_loss(trainer, model, inputs)
    terms = policy_terms(trainer, inputs)
    call = PolicyLossCall(model, terms)
    value = trl_loss(trainer, call, inputs)
    check_agreement(call.loss, value, terms)
    return call.loss
