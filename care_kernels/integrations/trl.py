"""TRL's `GRPOTrainer` on these kernels, with TRL's own options and metrics.

    from trl import GRPOTrainer

    from care_kernels.integrations.trl import use_care_kernels

    trainer = GRPOTrainer(model=model, reward_funcs=reward, args=args, train_dataset=dataset)
    use_care_kernels(trainer)
    trainer.train()

There are two paths, and `choose_path` takes the first that can express the trainer's options.
"fused" is one call of `linear_policy_loss` inside the model's forward: three matrix products with
the head instead of TRL's four (four, too, for a sequence's ratio to older log-probs), and one where
the advantage is zero and there is neither KL nor an entropy bonus. "log_probs" is
`linear_log_probs` under TRL's own loss: every option of TRL's.

On both paths TRL's own `_compute_loss` runs on the log-probs and entropies, so the metrics are its
own; on the fused path the loss it finds is held against the fused one at every step. The reference
model's log-probs come from the same kernel. An enclosing autocast does not reach the head: it takes
hidden states and weight as they are.

Shape letters: B sequences, L positions, T completion tokens, N rows, D hidden.
"""

import functools
import inspect
import logging
import types
from typing import Any, NamedTuple

import torch
import trl
from accelerate.utils import is_peft_model
from torch import Tensor
from trl import GRPOTrainer
from trl.trainer.utils import FusedCausalLMOutput

from care_kernels.integrations._output_head import (
    gathered_head,
    log_probs_and_entropy,
    logit_options,
    output_head,
)
from care_kernels.integrations._trl_loss import (
    PolicyTerms,
    check_agreement,
    policy_terms,
    why_not_fused,
)
from care_kernels.linear_policy_loss import linear_policy_loss

TESTED_VERSIONS = ("1.16",)
"""TRL releases whose internals this module knows."""

PATHS = ("fused", "log_probs")

_logger = logging.getLogger(__name__)


class Choice(NamedTuple):
    """Which path a trainer's loss takes."""

    path: str
    """One of `PATHS`."""
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
        ValueError: an untested TRL version, something that is no GRPOTrainer, a head that is not
            one plain matrix (LoRA on it, quantised), or "fused" with an option it cannot express.
    """
    if ".".join(trl.__version__.split(".")[:2]) not in TESTED_VERSIONS:
        wanted = " or ".join(f"{version}.x" for version in TESTED_VERSIONS)
        raise ValueError(f"trl: got version {trl.__version__}; wanted {wanted}")
    if not isinstance(trainer, GRPOTrainer):
        raise ValueError(f"trainer: got {type(trainer).__name__}; wanted a GRPOTrainer")
    choice = choose_path(trainer, path)
    for model, with_entropy in ((trainer.model, True), (trainer.ref_model, False)):
        if model is not None:
            _replace_fused_head(_base_model(trainer, model), trainer.temperature, with_entropy)
    if choice.path == "fused":
        trainer._compute_loss = types.MethodType(_fused_loss, trainer)
    _logger.info("GRPOTrainer's loss takes the %s path: %s", *choice)
    return choice


def choose_path(trainer: GRPOTrainer, path: str | None = None) -> Choice:
    """The path for `trainer`: "fused" unless one of its options needs TRL's own formula.

    Raises:
        ValueError: an unknown path, or "fused" with an option it cannot express.
    """
    if path not in (None, *PATHS):
        raise ValueError(f"path: got {path!r}; wanted None or one of {PATHS}")
    obstacle = why_not_fused(trainer)
    if path == "log_probs":
        return Choice("log_probs", "asked for")
    if obstacle is None:
        return Choice("fused", "linear_policy_loss covers every option")
    if path == "fused":
        raise ValueError(f"path: got 'fused' with {obstacle}; wanted None or 'log_probs'")
    return Choice("log_probs", f"TRL's own formula runs, because of {obstacle}")


def _base_model(trainer: GRPOTrainer, model: Any) -> Any:
    model = trainer.accelerator.unwrap_model(model)
    return model.get_base_model() if is_peft_model(model) else model


def _replace_fused_head(model: Any, temperature: float, with_entropy: bool) -> None:
    """Replace what TRL put before the model's forward: calls with `fused_lm_head=True`."""
    output_head(model)
    others = model.forward
    options = {"temperature": temperature, **logit_options(model.config.get_text_config())}

    # generate() and Trainer read the signature.
    @functools.wraps(type(model).forward)
    def forward(
        self: Any,
        *args: Any,
        fused_lm_head: bool = False,
        policy_terms: PolicyTerms | None = None,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> Any:
        if not fused_lm_head:
            given = {
                "labels": labels,
                "shift_labels": shift_labels,
                "num_items_in_batch": num_items_in_batch,
            }
            given = {name: value for name, value in given.items() if value is not None}
            return others(*args, **given, **kwargs)
        kwargs = _backbone_arguments(self, labels, kwargs)
        backbone = self.base_model(*args, **kwargs)
        head = output_head(self)
        hidden = backbone.last_hidden_state.to(head.weight.device)
        if shift_labels is None:
            assert labels is not None
            hidden, shift_labels = hidden[:, :-1], labels[:, 1:]
        targets = shift_labels.to(hidden.device)
        if policy_terms is not None:
            return _policy_loss_output(hidden, head, targets, policy_terms, options)
        output = _log_probs_output(hidden, head, targets, options, with_entropy, num_items_in_batch)
        return _with_router_loss(output, self, backbone, kwargs)

    model.forward = types.MethodType(forward, model)


def _backbone_arguments(model: Any, labels: Tensor | None, given: dict[str, Any]) -> dict[str, Any]:
    arguments = {**given, "use_cache": False}
    if getattr(model.config.get_text_config(), "output_router_logits", False):
        arguments.setdefault("output_router_logits", True)
    # A few vision-language backbones build their attention mask from the labels.
    if "labels" in inspect.signature(model.base_model.forward).parameters:
        arguments["labels"] = labels
    return arguments


def _log_probs_output(
    hidden: Tensor,
    head: Any,
    targets: Tensor,
    options: dict[str, Any],
    with_entropy: bool,
    num_items: Tensor | int | None,
) -> FusedCausalLMOutput:
    """Log-probs and entropies [B, L-1] of hidden [B, L-1, D] at targets, 0 where these are -100."""
    mask = targets != -100
    with gathered_head(head) as (weight, bias):
        log_probs, entropy = log_probs_and_entropy(
            hidden[mask], weight, bias, targets[mask], with_entropy=with_entropy, **options
        )
    count = mask.sum().clamp(min=1) if num_items is None else num_items
    return FusedCausalLMOutput(
        loss=-log_probs.sum() / count,
        log_probs=_spread(log_probs, mask),
        entropy=None if entropy is None else _spread(entropy, mask),
        label_mask=mask,
    )


def _spread(rows: Tensor, mask: Tensor) -> Tensor:
    """[N] into zeros [B, L], keeping the graph even where N is 0."""
    return rows.new_zeros(mask.shape).masked_scatter(mask, rows)


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
    hidden: Tensor, head: Any, targets: Tensor, terms: PolicyTerms, options: dict[str, Any]
) -> FusedCausalLMOutput:
    """The fused loss, with detached log-probs and entropies [B, T] for TRL's metrics.

    Rows that the loss skips (a zero advantage, and neither KL nor entropy bonus) are counted in
    the metrics all the same: one more matrix product for these alone.
    """
    num_tokens = terms.mask.shape[1]
    hidden, targets = hidden[:, -num_tokens:], targets[:, -num_tokens:]
    rows = terms.mask.flatten().nonzero()[:, 0]
    with gathered_head(head) as (weight, bias):
        out = linear_policy_loss(
            hidden.flatten(0, 1)[rows],
            weight,
            targets.flatten()[rows],
            **terms.at(rows),
            bias=bias,
            report_all_rows=True,
            **options,
        )
    assert out.entropy is not None
    mask = terms.mask.bool()
    return FusedCausalLMOutput(
        loss=out.loss,
        log_probs=_spread(out.log_probs, mask),
        entropy=_spread(out.entropy, mask),
        label_mask=mask,
    )


class _PolicyLossCall:
    """Stands for the model inside TRL's `_compute_loss`: asks it for the fused loss and keeps it.

    The loss is an output of the wrapped model's own forward, which is where DDP, FSDP and ZeRO-3
    hang their hooks.
    """

    def __init__(self, model: Any, terms: PolicyTerms) -> None:
        self._model, self._terms = model, terms
        self.loss: Tensor | None = None

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
    call = _PolicyLossCall(model, terms)
    value = trl_loss(trainer, call, inputs)
    assert call.loss is not None
    check_agreement(call.loss, value, terms)
    return call.loss
