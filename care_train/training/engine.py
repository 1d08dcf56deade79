"""DeepSpeed around the policy: this module and `engine_state` alone import it."""

import copy
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer

from care_train.config import DeepSpeedSettings, LoraSettings
from care_train.distributed import all_max, all_sum, is_main, world_size
from care_train.models.batch import ModelBatch, TokenSequence, collate, pack, packed_positions
from care_train.models.load import LoadedModel
from care_train.models.lora import add_adapters, without_adapters
from care_train.models.policy import Policy
from care_train.rollout.engine import WeightParts
from care_train.training.engine_state import load_engine, save_engine, tensor_bytes
from care_train.training.finite import LeftOut, cause_of
from care_train.training.optimizer import OptimizerSettings, learning_rate_factor
from care_train.training.timer import timer
from care_train.training.weights import policy_weights, stream

logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
# On CPUs DeepSpeed would compile a shared-memory all-reduce at first use: half a minute, and a C++
# compiler, for what gloo does.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
# bfloat16 under ZeRO-0 would begin with an AdamW step on zero gradients: the first update then has
# the second one's bias correction, a quarter too small, and weight decay counts twice.
FP16_UnfusedOptimizer.initialize_optimizer_states = lambda self: None


@dataclass(frozen=True)
class MicroBatch:
    """Sequences of one forward and backward, with the loss's arguments per row."""

    batch: ModelBatch
    loss_arguments: dict[str, Any]
    labels: tuple[str, ...] = ()
    """What messages call each sequence."""


@dataclass(frozen=True)
class StepResult:
    """What one optimiser step says of itself; sums are over this rank's rows."""

    loss: float
    grad_norm: float
    outputs: list[Any]
    """The `PolicyLoss` of each micro-batch."""
    applied: bool = True
    """False: it was not finite, and left out."""


class PolicyEngine:
    """Forwards, backwards and optimiser steps of the policy, sharded as the configuration says."""

    def __init__(
        self,
        loaded: LoadedModel,
        optimizer: OptimizerSettings,
        settings: DeepSpeedSettings,
        device: torch.device,
        *,
        bf16: bool = False,
        freeze_vision: bool = False,
        lora: LoraSettings | None = None,
        seed: int = 0,
        packing: bool = False,
        gradient_checkpointing: bool = False,
        copy_for_rollouts: bool = True,
    ) -> None:
        """Shard `loaded` and make its optimiser.

        Args:
            loaded: the policy.
            optimizer: AdamW and its schedule.
            settings: what DeepSpeed gets.
            device: this rank's.
            bf16: train in bfloat16 with fp32 master weights.
            freeze_vision: train the language model alone.
            lora: put such adapters into the policy and train them alone.
            seed: of the adapters' first weights.
            packing: `collate` packs instead of padding.
            gradient_checkpointing: compute layers again in the backward instead of keeping them.
            copy_for_rollouts: under ZeRO-3 keep a whole copy for engines that generate with the
                policy's own model.
        """
        self.loaded = loaded
        self.device = device
        self.zero_stage = settings.zero_stage
        self._settings = optimizer
        loaded.model.to(device)
        # ZeRO-3 shards the trained parameters; generation needs whole ones.
        self.rollout_is_copy = settings.zero_stage == 3 and copy_for_rollouts
        self.rollout = loaded
        if self.rollout_is_copy:
            self.rollout = replace(loaded, model=copy.deepcopy(loaded.model))
        if lora is not None:  # after the copy, which gets merged weights
            add_adapters(loaded.model, lora, seed)
        self._weights = {parts: policy_weights(loaded.model, parts) for parts in WeightParts}
        self._positions = packed_positions(loaded.model) if packing else None
        if gradient_checkpointing:
            loaded.model.gradient_checkpointing_enable({"use_reentrant": False})
        # Alone, a rank waits for nobody.
        policy = Policy(loaded.model, always_sees=world_size() > 1)
        if freeze_vision:
            _freeze_vision(loaded.model)
        parameters = [p for p in policy.parameters() if p.requires_grad]
        adamw = _adamw(parameters, optimizer, settings)
        self.optimizer = adamw
        schedule: Any = torch.optim.lr_scheduler.LambdaLR(adamw, learning_rate_factor(optimizer))
        self._policy = policy
        engine, *_ = deepspeed.initialize(
            model=policy,
            optimizer=adamw,
            lr_scheduler=schedule,
            config=_deepspeed_config(optimizer, settings, bf16),
            dist_init_required=False,
        )
        self._engine: Any = engine
        self._left_out = LeftOut(optimizer.max_skipped_updates)

    @property
    def learning_rate(self) -> float:
        return self._engine.get_lr()[0]

    def collate(self, sequences: Sequence[TokenSequence]) -> ModelBatch:
        """One batch on this rank's device, padded or packed."""
        image_token_id = self.loaded.image_token_id
        if self._positions is not None:
            batch = pack(sequences, self._positions, image_token_id)
        else:
            batch = collate(sequences, self.loaded.pad_token_id, image_token_id)
        return batch.to(self.device)

    @torch.no_grad()
    def score(
        self,
        batch: ModelBatch,
        temperature: float,
        pool_spans: torch.Tensor | None = None,
        *,
        with_log_normalizer: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Log-probs [N] and, where spans are given, rationale embeddings [B, D]: one forward.

        With the rows' log-normalisers beside the log-probs, [N, 2].
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

    def without_adapters(self) -> AbstractContextManager[None]:
        """A block in which `score` and `rows` are those of the model without its adapters."""
        return without_adapters(self.loaded.model)

    def step(self, micro_batches: Sequence[MicroBatch], temperature: float) -> StepResult:
        """Accumulate over the micro-batches and update once.

        The loss is a sum over rows whose weights already hold the global denominator, so gradients
        are summed over ranks: DeepSpeed averages, hence the factor world_size. Ranks may have
        different numbers of micro-batches; the short ones repeat their last with zero weights.

        An update that is not finite is left out as often as `max_skipped_updates` allows.

        Raises:
            NotFiniteError: the loss or the gradient is not finite; nothing was updated.
        """
        assert micro_batches, "every rank needs a micro-batch"
        self._engine.train()
        count = all_max(len(micro_batches), self.device)
        outputs, total, cause = [], 0.0, None
        for place in range(count):
            self._engine.set_gradient_accumulation_boundary(place == count - 1)
            is_filler = place >= len(micro_batches)
            micro = micro_batches[-1] if is_filler else micro_batches[place]
            arguments = _without_weight(micro.loss_arguments) if is_filler else micro.loss_arguments
            output, _ = self._engine(micro.batch, temperature, arguments)
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

    def _apply(self) -> tuple[float, bool]:
        """Update, where the gradient is finite; its norm before clipping, and whether it was."""
        if self.zero_stage == 0 and not self._engine.bfloat16_enabled():
            gradients = [p.grad for p in self._policy.parameters() if p.grad is not None]
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
        return stream(self._weights[parts], bucket_bytes, self.gathered)

    @contextmanager
    def gathered(self, parameters: Sequence[torch.nn.Parameter] | None = None) -> Iterator[None]:
        """Whole parameters, by default all, on every rank (a no-op below ZeRO-3)."""
        if self.zero_stage < 3:
            yield
            return
        chosen = list(self._policy.parameters() if parameters is None else parameters)
        with deepspeed.zero.GatheredParameters(chosen):
            yield

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
        save_engine(self._engine, folder)

    def load_state(self, folder: str | Path) -> None:
        """Restore what `save_state` wrote, under the optimiser's settings of this run."""
        load_engine(self._engine, folder)
        # They come with the saved state, and would hide settings that a resume may change.
        settings, schedule = self._settings, self._engine.lr_scheduler
        factor = learning_rate_factor(settings)(schedule.last_epoch)
        schedule.base_lrs = [settings.learning_rate for _ in schedule.base_lrs]
        for group in self._engine.optimizer.param_groups:
            group |= {"initial_lr": settings.learning_rate, "betas": settings.betas}
            group |= {"lr": settings.learning_rate * factor, "weight_decay": settings.weight_decay}
        if hasattr(self._engine.optimizer, "clip_grad"):
            self._engine.optimizer.clip_grad = self._engine.gradient_clipping()


def _adamw(
    parameters: list[torch.nn.Parameter], optimizer: OptimizerSettings, settings: DeepSpeedSettings
) -> torch.optim.Optimizer:
    """torch's AdamW, or where its states are in main memory DeepSpeed's for CPUs.

    The latter is built by the C++ compiler at first use, which takes a minute or two;
    `zero_force_ds_cpu_optimizer: false` asks for torch's, several times slower.
    """
    shared: dict[str, Any] = {
        "lr": optimizer.learning_rate,
        "betas": optimizer.betas,
        "weight_decay": optimizer.weight_decay,
    }
    if settings.offloads_optimizer and settings.config.get("zero_force_ds_cpu_optimizer", True):
        return DeepSpeedCPUAdam(parameters, adamw_mode=True, **shared)
    return torch.optim.AdamW(parameters, **shared)


def _deepspeed_config(
    optimizer: OptimizerSettings, settings: DeepSpeedSettings, bf16: bool
) -> dict[str, Any]:
    base: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": optimizer.max_grad_norm,
        "zero_optimization": {"stage": settings.zero_stage},
        "zero_allow_untested_optimizer": True,
        # ZeRO-1 and 2 otherwise apply bfloat16 gradients that are not finite.
        "bf16": {"enabled": bf16, "check_grad_overflow": True},
        "steps_per_print": 2**31,
    }
    for key, value in settings.config.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        base[key] = base[key] | value if both else value
    return base


def _without_weight(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same rows with nothing to learn: keeps ranks in step."""
    weights = {"advantages", "kl_weights", "entropy_weights"}
    return {
        key: torch.zeros_like(value) if key in weights and value is not None else value
        for key, value in arguments.items()
    }


def _freeze_vision(model: Any) -> None:
    visual = getattr(model.base_model, "visual", None)
    if visual is None:
        raise ValueError("train.freeze_vision: got true, but the model has no vision tower")
    visual.requires_grad_(False)
