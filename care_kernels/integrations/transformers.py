"""The cross-entropy of a transformers model without its logits.

    from transformers import AutoModelForCausalLM, Trainer

    from care_kernels.integrations.transformers import use_care_kernels

    model = AutoModelForCausalLM.from_pretrained(path)
    use_care_kernels(model)
    Trainer(model=model, args=args, train_dataset=dataset).train()

A training forward with labels gives the loss of the model's own forward and no logits. Generation,
evaluation and forwards without labels stay as they were.

Cross-entropy is a policy loss whose only term is the k1 estimator against a reference of
log-prob 0: with kl_weights -1 each labelled token adds -log p, and its gradient.

Shape letters: B sequences, L positions, N rows, D hidden.
"""

import functools
import inspect
import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutputWithPast

from care_kernels.checks import wrong
from care_kernels.heads import check_forward, head_parameters, logit_options, output_head
from care_kernels.loss import linear_policy_loss


def use_care_kernels(model: Any) -> None:
    """Make training forwards of `model` compute their cross-entropy through `linear_policy_loss`.

    Changes this model object, nothing else. Call it before or after wrapping the model with PEFT
    and before giving it to a `Trainer`. With `label_smoothing_factor` or `compute_loss_func` the
    Trainer takes the labels away, and the model's own logits are used.

    Args:
        model: a causal language model, text or vision-language, or a PEFT model around one.

    Raises:
        ValueError: no decoder-only language model with transformers' causal loss, a head that
            `head_parameters` cannot write as one matrix (quantised, DoRA), a forward that does
            more with its output (BERT's, Chameleon's, Aya Vision's), or a router's own loss.
    """
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    _check_model(model)
    own_forward = unbound_forward(model)

    # generate() and Trainer read the signature.
    @functools.wraps(type(model).forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        kwargs = _by_name(self, args, kwargs)
        if not _wants_loss_alone(self, kwargs):
            return own_forward(self, **kwargs)
        return _loss_output(self, kwargs)

    model.forward = types.MethodType(forward, model)


def _check_model(model: Any) -> None:
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise wrong("model", name, "a transformers PreTrainedModel")
    if model.config.is_encoder_decoder:
        raise wrong("model", f"{name}, an encoder-decoder", "a decoder-only model")
    if model.loss_function is not ForCausalLMLoss:
        got = getattr(model.loss_function, "__name__", model.loss_function)
        raise wrong("model", f"{name} with the loss {got}", "ForCausalLMLoss")
    _check_router(model, {})
    check_head(model, with_loss=True)


def _check_router(model: Any, arguments: dict[str, Any]) -> None:
    configured = getattr(model.config.get_text_config(), "output_router_logits", False)
    if arguments.get("output_router_logits", configured):
        wanted = "False: the router's auxiliary loss is not computed here"
        raise wrong("output_router_logits", True, wanted)


def _by_name(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    if not args:
        return kwargs
    names = list(inspect.signature(type(model).forward).parameters)[1:]
    return dict(zip(names, args, strict=False)) | kwargs


def _wants_loss_alone(model: Any, arguments: dict[str, Any]) -> bool:
    """A training forward with labels whose caller can do without logits."""
    keep, as_dict = arguments.get("logits_to_keep"), arguments.get("return_dict")
    return (
        model.training
        and arguments.get("labels") is not None
        and torch.is_grad_enabled()
        and (model.config.return_dict if as_dict is None else as_dict)
        and (keep is None or (isinstance(keep, int) and keep == 0))
    )


def _loss_output(model: Any, arguments: dict[str, Any]) -> CausalLMOutputWithPast:
    labels, shift_labels = arguments.pop("labels"), arguments.pop("shift_labels", None)
    num_items = arguments.pop("num_items_in_batch", None)
    ignored = arguments.pop("ignore_index", -100)
    arguments.pop("logits_to_keep", None)
    _check_router(model, arguments)
    arguments.setdefault("use_cache", False)
    backbone, hidden, targets = backbone_rows(model, labels, shift_labels, **arguments)
    mask = targets != ignored
    with head_rows(model, hidden, targets, mask) as rows:
        zeros = torch.zeros(len(rows["hidden"]), device=rows["hidden"].device)
        rows |= {"advantages": zeros, "ref_log_probs": zeros, "kl_weights": zeros - 1}
        total = linear_policy_loss(**rows, kl_estimator="k1").loss
    count = mask.sum() if num_items is None else num_items
    loss: Any = total / (count.to(total.device) if torch.is_tensor(count) else count)
    return CausalLMOutputWithPast(
        loss=loss,
        past_key_values=backbone.get("past_key_values"),
        hidden_states=backbone.get("hidden_states"),
        attentions=backbone.get("attentions"),
    )


def backbone_rows(
    model: Any, labels: Tensor | None, shift_labels: Tensor | None, *args: Any, **arguments: Any
) -> tuple[Any, Tensor, Tensor]:
    """The backbone's output; its last hidden states [B, L, D], and the labels [B, L] they predict.

    These are the next position's, or `shift_labels` where given.
    """
    # A few vision-language backbones build their attention mask from the labels.
    if "labels" in inspect.signature(model.base_model.forward).parameters:
        arguments["labels"] = labels
    backbone = model.base_model(*args, **arguments)
    hidden = backbone.last_hidden_state
    if shift_labels is not None:
        return backbone, hidden, shift_labels
    assert labels is not None
    return backbone, hidden[:, :-1], labels[:, 1:]


@contextmanager
def head_rows(
    model: Any, hidden: Tensor, targets: Tensor, mask: Tensor
) -> Iterator[dict[str, Any]]:
    """The kernels' arguments for the positions of hidden [B, L, D] and targets [B, L] in `mask`."""
    with gathered_head(model) as (weight, bias):
        device, config = weight.device, model.config.get_text_config()
        yield {
            "hidden": hidden.to(device)[mask.to(device)],
            "head_weight": weight,
            "target_ids": targets.to(device)[mask.to(device)],
            "bias": bias,
            **logit_options(config),
        }


def unbound_forward(model: Any) -> Callable[..., Any]:
    """The forward that `model` has now, as a function of the model it is called on.

    A deep copy of a patched model (a reference, an average of weights) carries the patch along; the
    patch must then run the copy's own forward, not the original's.
    """
    current = model.__dict__.get("forward")
    if current is None:
        return lambda self, *args, **kwargs: type(self).forward(self, *args, **kwargs)
    if isinstance(current, types.MethodType) and current.__self__ is model:
        return current.__func__

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self is not model:
            raise RuntimeError(
                f"{type(self).__name__}: a copy of a model whose forward another library had "
                f"wrapped ({current!r}) before use_care_kernels; wanted the copy made first, then "
                "use_care_kernels on each"
            )
        return current(*args, **kwargs)

    return forward


def check_head(model: Any, *, with_loss: bool = False) -> None:
    """Refuse a head that `head_parameters` cannot write as one matrix, or that is not all of it."""
    with gathered_head(model) as (weight, _):
        check_forward(model, weight, with_loss=with_loss)


@contextmanager
def gathered_head(model: Any) -> Iterator[tuple[Tensor, Tensor | None]]:
    """The head's weight [V, D] and bias [V] or None, whole: gathered under ZeRO-3 and FSDP2."""
    head = output_head(model)
    with gathered(*head.parameters()):
        yield head_parameters(head)


@contextmanager
def gathered(*parameters: Tensor | None) -> Iterator[None]:
    """Hold ZeRO-3 parameters whole; without ZeRO-3, or where they are whole already, nothing."""
    with ExitStack() as stack:
        if is_deepspeed_zero3_enabled():
            import deepspeed  # pyright: ignore[reportMissingImports]
            from deepspeed.runtime.zero.partition_parameters import (  # pyright: ignore[reportMissingImports]
                ZeroParamStatus,
            )

            whole = ZeroParamStatus.AVAILABLE
            parted = [
                p for p in parameters if p is not None and getattr(p, "ds_status", whole) != whole
            ]
            if parted:
                stack.enter_context(deepspeed.zero.GatheredParameters(parted))
        yield
