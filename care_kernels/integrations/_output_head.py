"""The output projection of a transformers model, as the kernels need it.

Shape letters: N rows, D hidden, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from care_kernels._checks import FLOAT_DTYPES
from care_kernels.linear_log_probs import linear_log_probs
from care_kernels.linear_policy_loss import linear_policy_loss


def output_head(model: Any) -> Any:
    """The head module of `model`, looked up anew since wrappers replace it.

    Raises:
        ValueError: it is not one plain matrix, so its weight alone is not what the model computes.
    """
    head = model.get_output_embeddings()
    name = type(model).__name__
    if head is None:
        raise ValueError(f"model: got {name} without output embeddings; wanted a language model")
    if hasattr(head, "base_layer"):
        raise ValueError(
            f"model: got {name} with an adapter on its output head ({type(head).__name__}); wanted "
            "a plain head: its weight is read directly, so the adapter would never be trained. "
            "Take 'lm_head' out of the adapter's target modules"
        )
    if not isinstance(head, nn.Linear) and not hasattr(head, "modules_to_save"):
        raise ValueError(
            f"model: got {name} whose output head is a {type(head).__name__}; wanted nn.Linear"
        )
    if head.weight.dtype not in FLOAT_DTYPES:
        raise ValueError(
            f"model: got {name} with a quantised output head ({head.weight.dtype}); wanted one in "
            "bfloat16, float16 or float32: leave 'lm_head' out of the quantisation"
        )
    return head


def logit_options(config: Any) -> dict[str, Any]:
    """`logit_softcap` and `logit_scale` of a text config, under the names its family uses.

    Source: the forwards of Gemma 2-4 (softcap), Cohere (logit_scale), Muse Glimmer
    (output_multiplier), Falcon-H1 (lm_head_multiplier), Granite and MiniCPM3 (divide by
    logits_scaling) and HyperCLOVA X (multiplies by it) in transformers 5.19.
    """
    scale = None
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        scale = getattr(config, name, None) if scale is None else scale
    if scale is None and getattr(config, "logits_scaling", None) is not None:
        inverted = config.model_type != "hyperclovax"
        scale = 1 / config.logits_scaling if inverted else config.logits_scaling
    return {
        "logit_softcap": getattr(config, "final_logit_softcapping", None),
        "logit_scale": 1.0 if scale is None else scale,
    }


@contextmanager
def gathered_head(head: Any) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Weight [V, D] and bias [V] or None, whole: gathered under ZeRO-3 and FSDP2."""
    with gathered(head.weight, head.bias):
        weight, bias = head.weight, head.bias
        if isinstance(weight, DTensor):
            weight = weight.full_tensor()
            bias = bias.full_tensor() if isinstance(bias, DTensor) else bias
        yield weight, bias


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


def log_probs_and_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target_ids: Tensor,
    *,
    with_entropy: bool,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """`linear_log_probs` of hidden [N, D] at target_ids [N], with the head of `gathered_head`.

    Args:
        hidden, weight, bias, target_ids: as for `linear_log_probs`.
        with_entropy: also return the entropy.
        options: temperature, logit_softcap and logit_scale.

    Returns:
        log_probs [N] and entropy [N], None unless asked for; both float32.
    """
    if is_deepspeed_zero3_enabled():
        return GatheringLogProbs.apply(hidden, weight, bias, target_ids, with_entropy, options)
    result = linear_log_probs(
        hidden, weight, target_ids, bias=bias, return_entropy=with_entropy, **options
    )
    return result if isinstance(result, tuple) else (result, None)


class GatheringLogProbs(torch.autograd.Function):
    """`linear_log_probs` with a head that is gathered in the forward and again in the backward.

    By then the upstream gradients are known numbers, so the backward is the gradient of a policy
    loss that is linear in log-probs and entropies.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target_ids: Tensor,
        with_entropy: bool,
        options: dict[str, Any],
    ) -> tuple[Tensor, Tensor | None]:
        """log_probs [N] and entropy [N] or None."""
        ctx.save_for_backward(hidden, weight, bias, target_ids)
        ctx.options = options
        result = linear_log_probs(
            hidden, weight, target_ids, bias=bias, return_entropy=with_entropy, **options
        )
        return result if isinstance(result, tuple) else (result, None)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad_log_probs: Tensor, grad_entropy: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """dX, dW and db."""
        hidden, weight, bias, target_ids = ctx.saved_tensors
        zeros = torch.zeros_like(grad_log_probs)
        with gathered(weight, bias), torch.enable_grad():
            inputs: list[Any] = [
                None if x is None else x.detach().requires_grad_(needed)
                for x, needed in zip((hidden, weight, bias), ctx.needs_input_grad[:3], strict=True)
            ]
            loss = linear_policy_loss(
                inputs[0],
                inputs[1],
                target_ids,
                zeros,
                ref_log_probs=zeros,
                kl_weights=grad_log_probs,
                kl_estimator="k1",
                entropy_weights=None if grad_entropy is None else -grad_entropy,
                bias=inputs[2],
                **ctx.options,
            ).loss
            wanted = [x for x in inputs if x is not None and x.requires_grad]
            found = iter(torch.autograd.grad(loss, wanted))
        grads = (None if x is None or not x.requires_grad else next(found) for x in inputs)
        return *grads, None, None, None
