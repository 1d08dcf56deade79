"""The cross-entropy of a transformers model without its logits.

    from transformers import AutoModelForCausalLM, Trainer

    from care_kernels.integrations.transformers import use_care_kernels

    model = AutoModelForCausalLM.from_pretrained(path)
    use_care_kernels(model)
    Trainer(model=model, args=args, train_dataset=dataset).train()

A training forward with labels gives the loss of the model's own forward and no logits, from three
matrix products with the head. Generation, evaluation and forwards without labels stay as they
were, so metrics that need logits have them.

Cross-entropy is a policy loss whose only term is the k1 estimator against a reference of
log-prob 0: with kl_weights -1 each labelled token adds -log p, and its gradient.

Shape letters: B sequences, L positions, N rows, D hidden.
"""

import functools
import inspect
import types
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutputWithPast

from care_kernels.integrations._output_head import gathered_head, logit_options, output_head
from care_kernels.linear_policy_loss import linear_policy_loss

_IGNORED = -100


def use_care_kernels(model: Any) -> None:
    """Make training forwards of `model` compute their cross-entropy through `linear_policy_loss`.

    Changes this model object, nothing else. Call it before or after wrapping the model with PEFT
    and before giving it to a `Trainer`. With `label_smoothing_factor` or `compute_loss_func` the
    Trainer takes the labels away, and the model's own logits are used.

    Args:
        model: a causal language model, text or vision-language, or a PEFT model around one.

    Raises:
        ValueError: no decoder-only language model with transformers' causal loss, or a head that
            is not one plain matrix (LoRA on it, quantised).
    """
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    _check_model(model)
    own_forward = model.forward
    options = logit_options(model.config.get_text_config())

    # generate() and Trainer read the signature.
    @functools.wraps(type(model).forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        kwargs = _by_name(self, args, kwargs)
        if not _wants_loss_alone(self, kwargs):
            return own_forward(**kwargs)
        return _loss_output(self, kwargs, options)

    model.forward = types.MethodType(forward, model)


def _check_model(model: Any) -> None:
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"model: got {name}; wanted a transformers PreTrainedModel")
    output_head(model)
    if model.config.is_encoder_decoder:
        raise ValueError(f"model: got {name}, an encoder-decoder; wanted a decoder-only model")
    if model.loss_function is not ForCausalLMLoss:
        got = getattr(model.loss_function, "__name__", model.loss_function)
        raise ValueError(f"model: got {name} with the loss {got}; wanted ForCausalLMLoss")


def _by_name(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    if not args:
        return kwargs
    names = list(inspect.signature(type(model).forward).parameters)[1:]
    return dict(zip(names, args, strict=False)) | kwargs


def _wants_loss_alone(model: Any, arguments: dict[str, Any]) -> bool:
    """A training forward with labels whose caller can do without logits."""
    keep = arguments.get("logits_to_keep")
    return (
        model.training
        and arguments.get("labels") is not None
        and torch.is_grad_enabled()
        and _returns_dict(model, arguments)
        and (keep is None or (isinstance(keep, int) and keep == 0))
    )


def _returns_dict(model: Any, arguments: dict[str, Any]) -> bool:
    asked = arguments.get("return_dict")
    return model.config.return_dict if asked is None else asked


def _loss_output(
    model: Any, arguments: dict[str, Any], options: dict[str, Any]
) -> CausalLMOutputWithPast:
    labels, shift_labels = arguments.pop("labels"), arguments.pop("shift_labels", None)
    num_items = arguments.pop("num_items_in_batch", None)
    ignored = arguments.pop("ignore_index", _IGNORED)
    arguments.pop("logits_to_keep", None)
    if arguments.get("output_router_logits", _configured_router(model)):
        raise ValueError(
            "output_router_logits: got True; wanted False: the router's auxiliary loss is not "
            "computed here"
        )
    # Nothing goes on from a training forward.
    arguments.setdefault("use_cache", False)
    # A few vision-language backbones build their attention mask from the labels.
    if "labels" in inspect.signature(model.base_model.forward).parameters:
        arguments["labels"] = labels
    backbone = model.base_model(**arguments)
    hidden, head = backbone.last_hidden_state, output_head(model)
    if shift_labels is None:
        hidden, shift_labels = hidden[:, :-1], labels[:, 1:]
    hidden, targets = hidden.to(head.weight.device), shift_labels.to(head.weight.device)
    total, count = _summed_cross_entropy(hidden, head, targets, ignored, options)
    if torch.is_tensor(num_items):
        num_items = num_items.to(total.device)
    loss: Any = total / (count if num_items is None else num_items)
    return CausalLMOutputWithPast(
        loss=loss,
        past_key_values=backbone.get("past_key_values"),
        hidden_states=backbone.get("hidden_states"),
        attentions=backbone.get("attentions"),
    )


def _configured_router(model: Any) -> bool:
    return getattr(model.config.get_text_config(), "output_router_logits", False)


def _summed_cross_entropy(
    hidden: Tensor, head: Any, targets: Tensor, ignored: int, options: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Sum of -log p over the targets [B, L] that are not `ignored`, and how many these are."""
    mask = targets != ignored
    rows = hidden[mask]
    zeros = torch.zeros(rows.shape[0], dtype=torch.float32, device=rows.device)
    with gathered_head(head) as (weight, bias):
        out = linear_policy_loss(
            rows,
            weight,
            targets[mask],
            advantages=zeros,
            ref_log_probs=zeros,
            kl_weights=zeros - 1,
            kl_estimator="k1",
            bias=bias,
            **options,
        )
    return out.loss, mask.sum()
