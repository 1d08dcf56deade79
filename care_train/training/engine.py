"""DeepSpeed around the policy."""

import contextlib
import copy
import io
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from torch.optim.lr_scheduler import LambdaLR

from care_train.compat import deferred_write_errors, patch_deepspeed, plain_data_alone
from care_train.config import Config
from care_train.distributed import all_max, all_sum, is_main, world_size
from care_train.models.batch import (
    ModelBatch,
    TokenSequence,
    collate,
    multimodal_positions,
    pack,
    packed_positions,
)
from care_train.models.load import LoadedModel, recompute_activations
from care_train.models.lora import add_adapters
from care_train.models.policy import Policy
from care_train.models.prompts import EncodedPrompt
from care_train.rollout.engine import WeightParts
from care_train.training.optimizer import (
    BETAS,
    LeftOut,
    OptimizerSettings,
    adamw,
    cause_of,
    deepspeed_config,
    learning_rate_factor,
)
from care_train.training.timer import timer
from care_train.training.weights import policy_weights, stream, tensor_bytes

logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
patch_deepspeed()

_CHECKPOINT_TAG = "state"
"""The subfolder of DeepSpeed's files in a checkpoint."""


@dataclass(frozen=True)
class MicroBatch:
    """Sequences of one forward and backward, with the loss's arguments per row."""

    batch: ModelBatch
    loss_arguments: dict[str, Any]
    labels: tuple[str, ...] = ()
    """For messages: the file and row of each sequence."""


@dataclass(frozen=True)
class StepResult:
    """The outcome of one optimiser step; sums are over this rank's rows."""

    loss: float
    grad_norm: float
    outputs: list[Any]
    """The `PolicyLoss` of each micro-batch."""
    applied: bool = True
    """False where loss or gradient was not finite, so that nothing was updated."""


class PolicyEngine:
    """Forwards, backwards and optimiser steps of the policy, sharded as the configuration says."""

    def __init__(
        self,
        loaded: LoadedModel,
        optimizer: OptimizerSettings,
        config: Config,
        device: torch.device,
        *,
        copy_for_rollouts: bool = False,
    ) -> None:
        """Shard `loaded` and make its optimiser.

        Args:
            loaded: the policy.
            optimizer: AdamW and its schedule.
            config: its `deepspeed`; dtype and LoRA of `model`; packing and gradient checkpointing
                of `train`; the seed of the adapters' first weights.
            device: this rank's.
            copy_for_rollouts: under ZeRO-3 keep a whole copy for engines that generate with the
                policy's own model.
        """
        settings, train = config.deepspeed, config.train
        self.loaded, self.device, self._settings = loaded, device, optimizer
        self.zero_stage = settings.zero_stage
        loaded.model.to(device)
        self.rollout_copy: LoadedModel | None = None
        if settings.zero_stage == 3 and copy_for_rollouts:
            self.rollout_copy = replace(loaded, model=copy.deepcopy(loaded.model))
        if config.model.adapters is not None:  # after the copy, which gets merged weights
            add_adapters(loaded.model, config.model.adapters, config.seed)
        self._weights = {parts: policy_weights(loaded.model, parts) for parts in WeightParts}
        self._packs = train.packing
        positions_of = packed_positions if self._packs else multimodal_positions
        self._positions = positions_of(loaded.model)
        if train.gradient_checkpointing:
            recompute_activations(loaded.model)
        # Ranks wait for each other in every layer, so all must run the same ones. One rank has no
        # collective to match: its batches without images may skip the vision tower.
        policy = Policy(loaded.model, always_sees=world_size() > 1)
        if config.model.train_vision is False:
            _freeze_vision(loaded.model)
        parameters = [p for p in policy.parameters() if p.requires_grad]
        self.optimizer = adamw(parameters, optimizer, settings)
        schedule: Any = LambdaLR(self.optimizer, learning_rate_factor(optimizer))
        self._policy, self._trained = policy, parameters
        engine, *_ = deepspeed.initialize(
            model=policy,
            optimizer=self.optimizer,
            lr_scheduler=schedule,
            config=deepspeed_config(optimizer, settings, config.model.dtype == "bfloat16"),
            dist_init_required=False,
        )
        self._engine: Any = engine
        self._left_out = LeftOut(optimizer.max_skipped_updates)

    @property
    def learning_rate(self) -> float:
        return self._engine.get_lr()[0]

    @property
    def filler(self) -> TokenSequence:
        """The shortest sequence there is, for a rank that has fewer batches than others."""
        end = self.loaded.eos_token_ids[:1]
        return TokenSequence(EncodedPrompt(end), (), end)

    def collate(self, sequences: Sequence[TokenSequence]) -> ModelBatch:
        """One batch on this rank's device, padded or packed."""
        loaded, positions = self.loaded, self._positions
        if self._packs and positions is not None:
            return pack(sequences, positions, loaded.image_token_id).to(self.device)
        batch = collate(sequences, loaded.pad_token_id, loaded.image_token_id, positions)
        return batch.to(self.device)

    @torch.no_grad()
    def log_probs(
        self,
        batch: ModelBatch,
        temperature: float,
        pool_spans: torch.Tensor | None = None,
        *,
        with_log_normalizer: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """One forward without gradient, of B sequences with N response tokens.

        Returns:
            log-probs [N], or [N, 2] with the log-normalisers; embeddings [B, D] of `pool_spans`,
            [B, 2] positions, None without them.
        """
        self._engine.eval()
        return self._engine(
            batch, temperature, pool_spans=pool_spans, with_log_normalizer=with_log_normalizer
        )

    @torch.no_grad()
    def rows(self, batch: ModelBatch) -> torch.Tensor:
        """Final hidden states [N, D] of the batch's rows."""
        self._engine.eval()
        return self._engine(batch, rows_only=True)[0]

    def step(self, micro_batches: Sequence[MicroBatch], temperature: float) -> StepResult:
        """Accumulate over the micro-batches and update once.

        The loss is a sum over rows whose weights already hold the global denominator, so gradients
        are summed over ranks: DeepSpeed averages, hence the factor world_size. Ranks may have
        different numbers of micro-batches, or none; they fill up with `filler` at zero weight.

        An update that is not finite is left out as often as `max_skipped_updates` allows.

        Raises:
            NotFiniteError: the loss or the gradient is not finite; nothing was updated.
        """
        self._engine.train()
        count = all_max(len(micro_batches), self.device)
        assert count, "some rank needs a micro-batch"
        outputs, total, cause = [], 0.0, None
        for place in range(count):
            self._engine.set_gradient_accumulation_boundary(place == count - 1)
            is_filler = place >= len(micro_batches)
            micro = self._silent_micro_batch() if is_filler else micro_batches[place]
            output, _ = self._engine(micro.batch, temperature, micro.loss_arguments)
            loss = output.loss * world_size()
            total += float(output.loss.detach())
            if cause is None and not math.isfinite(total):
                rows = micro.batch.sequence_ids
                cause = cause_of(self._policy, micro.loss_arguments, output, rows, micro.labels)
            if place == count - 1 and all_max(not math.isfinite(total), self.device):
                # Every gradient, on all ranks, becomes one that is not applied.
                loss = loss * math.nan
            self._engine.backward(loss, scale_wrt_gas=False)
            if not is_filler:
                outputs.append(output)
        with timer("optimizer"):
            grad_norm, applied = self._apply()
            if not applied:
                self._left_out.add(cause, total, grad_norm)
        return StepResult(total, grad_norm, outputs, applied)

    def _silent_micro_batch(self) -> MicroBatch:
        batch = self.collate([self.filler])
        return MicroBatch(batch, {"advantages": torch.zeros(len(batch.rows), device=self.device)})

    def _apply(self) -> tuple[float, bool]:
        """Update, where the gradient is finite; its norm before clipping, and whether it was."""
        if self.zero_stage == 0 and not self._engine.bfloat16_enabled():
            gradients = [p.grad for p in self._trained if p.grad is not None]
            norm = float(torch.nn.utils.get_total_norm(gradients))
            if not math.isfinite(norm):
                self._engine.zero_grad()
                return norm, False
            self._engine.step()
            return norm, True
        # DeepSpeed's other optimisers find out themselves, and skip the update.
        self._engine.step()
        norm = float(self._engine.get_global_grad_norm())
        return norm, self._engine.was_step_applied() and math.isfinite(norm)

    def weights(
        self, bucket_bytes: int, parts: WeightParts = WeightParts.MERGED
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """The policy's weights for a rollout engine, gathered a bucket at a time under ZeRO-3.

        Every rank must take all of them or none.
        """
        # Below ZeRO-3 nothing is gathered.
        return stream(self._weights[parts], bucket_bytes, deepspeed.zero.GatheredParameters)

    def close(self) -> None:
        """Free gradients and the optimiser's states, for good; `loaded` stays."""
        self._engine.destroy()
        # ZeRO's optimiser is reached from each parameter, and holds all of them.
        if self._engine.optimizer is not self.optimizer:
            vars(self._engine.optimizer).clear()
        # Its other fields are what DeepSpeed's AdamW for CPUs frees itself by.
        self.optimizer.state.clear()
        self.optimizer.param_groups.clear()

    def checkpoint_bytes(self) -> int:
        """About what `save_state` writes on all ranks together."""
        own = tensor_bytes(list(self.optimizer.state.values()))
        if self.zero_stage > 0 or self._engine.bfloat16_enabled():
            # The shards of fp32 weights that the optimiser works on.
            own += tensor_bytes([group["params"] for group in self.optimizer.param_groups])
        elif not is_main():
            own = 0
        if is_main() or self.zero_stage == 3:
            own += tensor_bytes(list(self._policy.parameters()))
        return int(all_sum([float(own)], self.device)[0])

    def save_state(self, folder: str | Path) -> None:
        """DeepSpeed's own checkpoint: weights, optimiser and schedule of every rank.

        Raises:
            OSError: this rank could not write its part. Other ranks return.
        """
        with deferred_write_errors(self._engine):
            self._engine.save_checkpoint(str(folder), tag=_CHECKPOINT_TAG, save_latest=False)

    def load_state(self, folder: str | Path) -> None:
        """Restore what `save_state` wrote, under the optimiser's settings of this run.

        Raises:
            ValueError: DeepSpeed found nothing to load, or files that hold more than data.
        """
        with plain_data_alone(folder):
            path, _ = self._engine.load_checkpoint(str(folder), tag=_CHECKPOINT_TAG)
        if path is None:
            raise ValueError(f"checkpoint {folder}: DeepSpeed found no state there")
        # They come with the saved state, and would hide settings that a resume may change.
        settings, schedule = self._settings, self._engine.lr_scheduler
        factor = learning_rate_factor(settings)(schedule.last_epoch)
        schedule.base_lrs = [settings.learning_rate for _ in schedule.base_lrs]
        for group in self._engine.optimizer.param_groups:
            group |= {"initial_lr": settings.learning_rate, "betas": BETAS}
            group |= {"lr": settings.learning_rate * factor, "weight_decay": settings.weight_decay}
        if hasattr(self._engine.optimizer, "clip_grad"):
            self._engine.optimizer.clip_grad = self._engine.gradient_clipping()


def read_weights(folder: str | Path) -> dict[str, torch.Tensor]:
    """The policy's whole weights from what `PolicyEngine.save_state` wrote under any ZeRO stage.

    Raises:
        ValueError: the files hold more than data, or are none of DeepSpeed's.
    """
    states = Path(folder) / _CHECKPOINT_TAG / "mp_rank_00_model_states.pt"
    with plain_data_alone(folder), contextlib.redirect_stdout(io.StringIO()):
        if states.is_file():
            weights = torch.load(states, map_location="cpu", weights_only=True)["module"]
        else:  # ZeRO-3 writes shards alone.
            try:
                weights = get_fp32_state_dict_from_zero_checkpoint(str(folder), tag=_CHECKPOINT_TAG)
            except RuntimeError as error:  # torch's, of a file in another format
                raise ValueError(
                    f"checkpoint {folder}: a file is none that DeepSpeed wrote ({error})"
                ) from None
    assert weights is not None
    prefix = "model."
    return {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}


def _freeze_vision(model: Any) -> None:
    visual = getattr(model.base_model, "visual", None)
    if visual is None:
        raise ValueError("model.train_vision: got false, but the model has no vision tower")
    visual.requires_grad_(False)
