"""verl's fused head (`use_fused_kernels`) on these kernels.

verl's actor asks its fused head for the log-probs and entropies of the sampled tokens and builds
every loss on them. `FusedLinearForPPO` here answers in the same calling convention. verl's workers
import the module that `actor_rollout_ref.model.external_lib` names, so such a module puts it in:

    import verl.utils.experimental.torch_functional as fused_head

    from care_kernels.integrations.verl import FusedLinearForPPO

    fused_head.FusedLinearForPPO = FusedLinearForPPO

With it, run verl with `actor_rollout_ref.model.use_fused_kernels=True` and
`actor_rollout_ref.model.fused_kernel_options.impl_backend=torch`.
"""

from typing import Any

import torch
from torch import Tensor, nn

from care_kernels.checks import wrong
from care_kernels.log_probs import linear_log_probs


class FusedLinearForPPO(nn.Module):
    """In the shape of verl's class of this name.

    Source: `FusedLinearForPPO` in verl/utils/experimental/torch_functional.py (verl 0.5 to 0.9).
    """

    def __init__(self, chunk_size: int | None = None, impl_backend: str | None = None) -> None:
        """Take verl's arguments; how rows are cut into chunks is chosen from V instead."""
        super().__init__()

    def forward(
        self,
        hidden_states: Tensor,
        vocab_weights: Tensor,
        input_ids: Tensor,
        temperature: Any = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies of `input_ids` under softmax(hidden_states vocab_weights^T / t).

        Args:
            hidden_states: [B, T, D] or [T, D].
            vocab_weights: [V, D].
            input_ids: [B, T] or [T] int, the token each position predicts: verl rolls them before.
            temperature: a number, a tensor of one, or one for each token.

        Returns:
            log_probs and entropy in the shape of input_ids, float32, both differentiable.
        """
        shape = input_ids.shape
        if hidden_states.shape[:-1] != shape:
            wanted = f"{tuple(hidden_states.shape[:-1])}, as hidden_states is"
            raise wrong("input_ids", f"shape {tuple(shape)}", wanted)
        hidden, temperature = _with_one_temperature(hidden_states, temperature)
        log_probs, entropy = linear_log_probs(
            hidden.flatten(0, -2),
            vocab_weights,
            input_ids.flatten(),
            temperature=temperature,
            return_entropy=True,
        )
        return log_probs.view(shape), entropy.view(shape)


def _with_one_temperature(hidden: Tensor, temperature: float | Tensor) -> tuple[Tensor, float]:
    """A temperature for each token goes into the hidden states, in float32."""
    if not torch.is_tensor(temperature) or temperature.numel() == 1:
        return hidden, float(temperature)
    shape = hidden.shape[:-1]
    if temperature.numel() != shape.numel():
        wanted = f"one number or {tuple(shape)}, as hidden_states is"
        raise wrong("temperature", f"shape {tuple(temperature.shape)}", wanted)
    return hidden.float() / temperature.reshape(*shape, 1), 1.0
