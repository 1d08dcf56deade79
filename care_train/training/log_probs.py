"""Log-probs of a step's sequences, without gradient: by the old policy and by the reference."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import torch

from care_kernels import PolicyLoss
from care_train.algorithm.care import skip_before_forward
from care_train.algorithm.region_weights import importance_weights, split_advantages
from care_train.algorithm.selection import pairwise_distances
from care_train.algorithm.spans import rationale_span
from care_train.algorithm.types import Rollout, TrainSequence
from care_train.config import Config
from care_train.models.batch import ModelBatch, TokenSequence
from care_train.models.lora import without_adapters
from care_train.models.policy import Policy
from care_train.training.engine import PolicyEngine
from care_train.training.groups import Group
from care_train.training.micro_batches import agreed_micro_batches
from care_train.training.timer import timer

Pooled = tuple[torch.Tensor, torch.Tensor | None]
Forward = Callable[[ModelBatch, float, torch.Tensor | None], Pooled]
"""Takes a batch, the temperature and the spans to pool ([B, 2] or None); returns log-probs [N], or
[N, 2] with the log-normalisers beside them, and the embeddings [B, D] of the spans."""


class FrozenCopy:
    """pi_ref, which the KL of Eq. 13 pulls towards: a copy of the policy, made before training."""

    def __init__(self, model: Any) -> None:
        """Copy a model of transformers."""
        self._policy = Policy(copy.deepcopy(model).eval().requires_grad_(False))

    @torch.no_grad()
    def log_probs(
        self, batch: ModelBatch, temperature: float, pool_spans: torch.Tensor | None = None
    ) -> Pooled:
        """Log-probs [N] of the batch's rows. Every rank must run the same number of forwards."""
        return self._policy(batch, temperature, pool_spans=pool_spans)

    @torch.no_grad()
    def exact_kl_arguments(self, batch: ModelBatch) -> dict[str, Any]:
        """What the fused loss needs for a KL over the whole vocabulary."""
        hidden, _ = self._policy(batch, rows_only=True)
        return {"ref_hidden": hidden, "ref_head_weight": self._policy.head.weight}


class WithoutAdapters:
    """pi_ref under LoRA: the policy with its adapters switched off, which needs no second model."""

    def __init__(self, engine: PolicyEngine) -> None:
        self._engine = engine

    def log_probs(
        self, batch: ModelBatch, temperature: float, pool_spans: torch.Tensor | None = None
    ) -> Pooled:
        """As `FrozenCopy.log_probs`."""
        with without_adapters(self._engine.loaded.model):
            return self._engine.log_probs(batch, temperature, pool_spans)

    def exact_kl_arguments(self, batch: ModelBatch) -> dict[str, Any]:
        """As `FrozenCopy.exact_kl_arguments`; the loss takes the policy's own head, which adapters
        never change."""
        with without_adapters(self._engine.loaded.model):
            return {"ref_hidden": self._engine.rows(batch)}


Reference = FrozenCopy | WithoutAdapters


class SequenceRows(NamedTuple):
    """What a forward says of one sequence of T response tokens."""

    log_probs: torch.Tensor
    """[T]."""
    log_normalizer: torch.Tensor | None = None
    """[T] log sum exp of the logits: where the fused loss may anchor its exponentials."""
    embedding: torch.Tensor | None = None
    """[D] the pooled span."""


@dataclass
class TrainItem:
    """One sequence of S* and what the loss compares it with.

    Tensors have one fp32 number per response token, [T], and are on the CPU unless it says so.
    """

    group: Group
    """The one that trains it."""
    sequence: TrainSequence
    tokens: TokenSequence = field(repr=False)
    """The sequence in the context it is trained in: the one it was sampled in, but for a
    reflection under `preset=official`."""
    sampled_log_probs: torch.Tensor | None = field(default=None, repr=False)
    """log pi_old in the context it was sampled in; None where nothing reads it."""
    old_log_probs: torch.Tensor | None = field(default=None, repr=False)
    """log pi_old in the context it is trained in; None where the old policy is the current one, so
    that the ratio is 1."""
    old_log_normalizer: torch.Tensor | None = field(default=None, repr=False)
    """None where the old policy did not see the sequence in the context it is trained in."""
    ref_log_probs: torch.Tensor | None = field(default=None, repr=False)
    """log pi_ref, on the policy's device; None without a KL of sampled tokens."""
    importance_weights: torch.Tensor | None = field(default=None, repr=False)
    """None where all are 1."""
    outcome: PolicyLoss | None = field(default=None, repr=False)
    """What the last update said of its tokens, on the policy's device; `loss` is its whole
    micro-batch's."""
    token_advantages: torch.Tensor | None = field(default=None, repr=False)
    """None until the function of the same name is asked for it."""


def token_advantages(items: Sequence[TrainItem]) -> list[torch.Tensor]:
    """Eq. 11's a_{i,t} of each sequence, [T]; computed once, for the first who asks."""
    missing = [item for item in items if item.token_advantages is None]
    credited = split_advantages([item.sequence for item in missing])
    for item, own in zip(missing, credited, strict=True):
        item.token_advantages = own
    return [item.token_advantages for item in items if item.token_advantages is not None]


def known_old_log_probs(items: Sequence[TrainItem]) -> list[torch.Tensor | None]:
    """log pi_old of each sequence's tokens, [T] on the CPU, once the policy is updated.

    Of a sequence that the old policy was not run on, they are those of its one update; None where
    that left tokens out: without a KL, those without an advantage, which read 0.
    """
    found = []
    for item, advantages in zip(items, token_advantages(items), strict=True):
        log_probs, outcome = item.sampled_log_probs, item.outcome
        if log_probs is None and outcome is not None:
            is_whole = outcome.kl is not None or bool((advantages != 0).all())
            log_probs = outcome.log_probs if is_whole else None
        found.append(log_probs)
    return on_cpu(found)


def on_cpu(rows: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
    """Rows of one dtype, on the CPU; those of a GPU are joined first, to wait for it once."""
    away = [row for row in rows if row is not None and not row.is_cpu]
    fetched = iter(torch.cat(away).cpu().split([len(row) for row in away]) if away else ())
    return [row if row is None or row.is_cpu else next(fetched) for row in rows]


class LogProbs:
    """Runs sequences through a policy in micro-batches."""

    def __init__(self, engine: PolicyEngine, config: Config, reference: Reference | None) -> None:
        """Score with `engine` as pi_old, and with pi_ref where the loss has a KL."""
        self._engine, self._config, self._reference = engine, config, reference
        self._several_updates = config.train.num_iterations * config.train.mini_batches > 1
        self._moves_repairs = (
            config.algorithm == "care" and config.care.decisions.repair == "answer"
        )

    def forward_all(
        self,
        forward: Forward,
        sequences: Sequence[TokenSequence],
        pool_spans: Sequence[tuple[int, int]] | None = None,
    ) -> list[SequenceRows]:
        """Each sequence's rows, in order.

        Every rank runs the same number of forwards, as sharded parameters require; one with fewer
        sequences runs the engine's filler.
        """
        engine, temperature = self._engine, self._config.rollout.temperature
        batches, count = agreed_micro_batches(sequences, self._config.train, engine.device)
        found: dict[int, SequenceRows] = {}
        for places in batches:
            batch, spans = engine.collate([sequences[i] for i in places]), None
            if pool_spans is not None:
                spans = torch.tensor([pool_spans[i] for i in places], device=engine.device)
            log_probs, pooled = forward(batch, temperature, spans)
            rows = log_probs.split([len(sequences[i].response_ids) for i in places])
            for place, (i, row) in enumerate(zip(places, rows, strict=True)):
                values, normalizer = row.unbind(1) if row.ndim == 2 else (row, None)
                found[i] = SequenceRows(
                    values, normalizer, None if pooled is None else pooled[place]
                )
        for _ in range(count - len(batches)):
            forward(engine.collate([engine.filler]), temperature, None)
        return [found[i] for i in range(len(sequences))]

    def old_policy(
        self,
        sequences: Sequence[TokenSequence],
        pool_spans: Sequence[tuple[int, int]] | None = None,
    ) -> list[SequenceRows]:
        """`forward_all` by the policy as it is, with the log-normalisers; both on the CPU."""
        forward = partial(self._engine.log_probs, with_log_normalizer=True)
        rows = self.forward_all(forward, sequences, pool_spans)
        log_probs = on_cpu([row.log_probs for row in rows])
        normalizers = on_cpu([row.log_normalizer for row in rows])
        return [
            row._replace(log_probs=own, log_normalizer=normalizer)
            for row, own, normalizer in zip(rows, log_probs, normalizers, strict=True)
        ]

    def of_groups(self, groups: Sequence[Group]) -> list[Group]:
        """The old policy's one forward (Secs. 3.3, 3.7): the groups that are not skipped get the
        log-probs of their rollouts and the distances of their rationales."""
        care = self._config.care
        wanted = [skip_before_forward(group.rollouts, care) is None for group in groups]
        sequences, spans = [], []
        for group in (g for g, is_wanted in zip(groups, wanted, strict=True) if is_wanted):
            for rollout in group.rollouts:
                sequences.append(group.sequence(rollout))
                start, end = rationale_span(rollout)
                first = sequences[-1].response_start
                spans.append((first + start, first + end))
        rows = iter(self.old_policy(sequences, spans))
        return [
            _with_old_policy(group, [next(rows) for _ in group.rollouts]) if is_wanted else group
            for group, is_wanted in zip(groups, wanted, strict=True)
        ]

    def items(self, groups: Sequence[Group]) -> list[TrainItem]:
        """The sequences that the groups train, with all that the loss compares them with."""
        items = [
            TrainItem(
                group,
                sequence,
                group.sequence(sequence.rollout, () if self._is_moved(sequence.rollout) else None),
                sequence.rollout.old_log_probs,
                old_log_normalizer=sequence.rollout.old_log_normalizer,
            )
            for group in groups
            for sequence in group.update.sequences
        ]
        with timer("old_forward" if self._several_updates else "gap"):
            self._add_old_policy(items)
        if self._reference is not None and self._config.loss.kl_estimator != "exact":
            with timer("reference"):
                tokens = [item.tokens for item in items]
                rows = self.forward_all(self._reference.log_probs, tokens)
            for item, row in zip(items, rows, strict=True):
                item.ref_log_probs = row.log_probs
        return items

    def _add_old_policy(self, items: Sequence[TrainItem]) -> None:
        """One forward of the old policy over what it has not seen yet.

        The log-probs in the sampled context are read where an old policy or an engine's log-probs
        are compared with them; those in the trained context where it is another.
        """
        moved: list[TrainItem] = []
        if self._several_updates:
            moved = [item for item in items if self._is_moved(item.sequence.rollout)]
        # By the configuration: so all ranks agree.
        if self._several_updates or self._config.rollout.engine != "transformers":
            missing = [item for item in items if self._lacks_sampled(item)]
            sequences = [item.group.sequence(item.sequence.rollout) for item in missing]
            rows = self.old_policy(sequences + [item.tokens for item in moved])
            for item, row in zip(missing, rows, strict=False):
                item.sampled_log_probs = row.log_probs
                item.old_log_normalizer = row.log_normalizer
            for item, row in zip(moved, rows[len(missing) :], strict=True):
                item.old_log_probs = row.log_probs
                item.old_log_normalizer = None
        for item in items:
            self._weigh(item)

    def _weigh(self, item: TrainItem) -> None:
        """Importance weights, and which log-probs are the old policy's."""
        sampled, loss = item.sampled_log_probs, self._config.loss
        engine = item.sequence.rollout.log_probs
        if sampled is not None and engine is not None and loss.importance_sampling != "none":
            item.importance_weights = importance_weights(sampled, engine, loss)
        if self._several_updates and item.old_log_probs is None:
            item.old_log_probs = sampled

    def _lacks_sampled(self, item: TrainItem) -> bool:
        """Whether log pi_old in the sampled context is to be computed: something reads it."""
        rollout = item.sequence.rollout
        is_read = rollout.log_probs is not None or not self._is_moved(rollout)
        return item.sampled_log_probs is None and is_read

    def _is_moved(self, rollout: Rollout) -> bool:
        """Whether a rollout is trained in another context than it was sampled in."""
        return rollout.reflected and self._moves_repairs


def _with_old_policy(group: Group, rows: Sequence[SequenceRows]) -> Group:
    embeddings = torch.stack([row.embedding for row in rows if row.embedding is not None])
    rollouts = [
        replace(
            rollout,
            old_log_probs=row.log_probs,
            old_log_normalizer=row.log_normalizer,
        )
        for rollout, row in zip(group.rollouts, rows, strict=True)
    ]
    return replace(
        group,
        rollouts=tuple(rollouts),
        distances=pairwise_distances(embeddings.cpu()),
        log_prob_sums=torch.stack([row.log_probs.sum() for row in rows]),
    )
