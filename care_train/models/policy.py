"""The policy as one module: backbone, then only the head rows a loss or a log-prob needs.

The head is a module of its own so that engines which shard parameters (ZeRO-3) gather its weight
around the fused loss as they do around any layer.
"""

from typing import Any

import torch
from torch import nn

from care_kernels import PolicyLoss, linear_log_probs, linear_policy_loss, pool_rationale
from care_kernels.heads import check_forward, head_parameters, logit_options, output_head
from care_kernels.softmax import LogitTransform
from care_train.models.batch import ModelBatch, has_vision_tower, with_encoded_images


class PolicyHead(nn.Module):
    """The language-model head, never applied to more than a chunk of rows at a time."""

    def __init__(self, model: Any) -> None:
        """The head of `model`, with how its family scales or caps logits (Granite, Cohere, Gemma).

        Raises:
            ValueError: a head that is more than one plain matrix, or logits that are more than it.
        """
        super().__init__()
        linear = output_head(model)
        if hasattr(linear, "base_layer"):
            raise ValueError(
                f"model: got {type(model).__name__} with an adapter on its output head; wanted a "
                "plain head, whose weight the loss reads: take it out of the adapter's targets"
            )
        weight, bias = head_parameters(linear)
        if not isinstance(weight, nn.Parameter):
            raise ValueError(
                f"model: got {type(model).__name__} whose output head is a "
                f"{type(linear).__name__}; wanted one whose weight is a parameter [V, D]"
            )
        check_forward(model, weight)
        self.weight, self.bias = weight, bias
        self._options = logit_options(model.config.get_text_config())

    def forward(
        self,
        hidden: torch.Tensor,
        target_ids: torch.Tensor,
        temperature: float,
        loss_arguments: dict[str, Any] | None = None,
        *,
        with_log_normalizer: bool = False,
    ) -> torch.Tensor | PolicyLoss:
        """[N] log-probs of the targets, [N, 2] with their log-normalisers, or the fused loss."""
        shared = {"temperature": temperature, "bias": self.bias} | self._options
        if loss_arguments is None:
            found = linear_log_probs(
                hidden, self.weight, target_ids, return_log_normalizer=with_log_normalizer, **shared
            )
            return torch.stack(found, 1) if with_log_normalizer else found
        return linear_policy_loss(hidden, self.weight, target_ids, **shared, **loss_arguments)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[N, V] fp32 before the temperature, all at once: for checks of a few tokens."""
        logits = nn.functional.linear(hidden, self.weight, self.bias).float()
        options = self._options
        LogitTransform(1.0, options["logit_softcap"], options["logit_scale"]).apply_(logits)
        return logits


class Policy(nn.Module):
    """A transformers model whose logits are never held."""

    def __init__(self, model: Any, *, always_sees: bool = False) -> None:
        """Wrap a transformers model.

        With `always_sees` the vision tower runs for batches without images too, so that ranks which
        share weights or gradients run the same layers.
        """
        super().__init__()
        self.model = model
        self.head = PolicyHead(model)
        self._always_sees = always_sees and has_vision_tower(model.base_model)

    def forward(
        self,
        batch: ModelBatch,
        temperature: float = 1.0,
        loss_arguments: dict[str, Any] | None = None,
        pool_spans: torch.Tensor | None = None,
        *,
        rows_only: bool = False,
        with_log_normalizer: bool = False,
    ) -> tuple[Any, torch.Tensor | None]:
        """Log-probs [N] or the loss, and the pooled embeddings [B, D] where `pool_spans` is given.

        Args:
            batch: the sequences, padded or packed.
            temperature: the rollouts' temperature: log-probs are those of the sampled distribution.
            loss_arguments: keyword arguments of `linear_policy_loss`; None for log-probs.
            pool_spans: [B, 2] position ranges of the rationales, from each sequence's start.
            rows_only: the rows' final hidden states [N, D] in place of what the head makes of them.
            with_log_normalizer: log-probs and log-normalisers, [N, 2].
        """
        hidden = self.hidden_states(batch)
        embeddings = None
        if pool_spans is not None:
            embeddings = _pooled(hidden, pool_spans, batch.row_starts)
        rows = hidden.flatten(0, 1)[batch.rows]
        if rows_only:
            return rows, embeddings
        made = self.head(
            rows,
            batch.target_ids,
            temperature,
            loss_arguments,
            with_log_normalizer=with_log_normalizer,
        )
        return made, embeddings

    def hidden_states(self, batch: ModelBatch) -> torch.Tensor:
        """[B, T, D] final hidden states, after the last norm; [1, T, D] of a packed batch."""
        backbone = self.model.base_model
        inputs = with_encoded_images(backbone, batch.inputs, always=self._always_sees)
        outputs = backbone(**inputs, use_cache=False)
        return outputs.last_hidden_state


def _pooled(hidden: torch.Tensor, spans: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
    """`pool_rationale` of [B, T, D], or of the packed [1, T, D] whose sequences start at [B]."""
    if len(hidden) == len(starts):
        return pool_rationale(hidden, spans)
    ends = starts.new_tensor([hidden.shape[1]])
    return pool_rationale(hidden[0], spans, cu_seqlens=torch.cat((starts, ends)))


def first_broken_weight(model: torch.nn.Module) -> str | None:
    """Name of the first parameter that holds a NaN or an infinity; None: all are finite.

    Under ZeRO-3 only this rank's shard of each parameter is looked at.
    """
    for name, parameter in model.named_parameters():
        own = getattr(parameter, "ds_tensor", parameter)
        if own.numel() and not bool(own.isfinite().all()):
            return name
    return None
