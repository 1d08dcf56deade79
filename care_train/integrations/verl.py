# verl is installed where verl runs, not where this project is checked.
# pyright: reportMissingImports=false
"""CARE inside verl 0.9: its advantage estimator `care` and policy loss `care`.

verl imports the modules that `VERL_USE_EXTERNAL_MODULES` names in each of its processes:

    VERL_USE_EXTERNAL_MODULES=care_train.integrations.verl python -m verl.trainer.main_ppo \\
        algorithm.adv_estimator=care actor_rollout_ref.actor.policy_loss.loss_mode=care \\
        '+algorithm.care.model=${actor_rollout_ref.model.path}' ...

Anchor, hard negatives, rescue and region weights (Algorithm 1, lines 3-10 and 21-41) are those of
our own trainer. Reflection (lines 11-20) is left out: a registered estimator cannot sample.
Rationales are compared by the tokens they hold (`rationale_counts`), as an estimator sees no hidden
states. docs/verl.md.

verl gives an estimator rewards, masks and uids. Algorithm 1 also reads token ids and log-probs,
which come from the batch that verl holds when it calls: `compute_advantage` and, for the V1
trainer, `PPOTrainer._compute_advantage` are wrapped. So is the making of both trainers, which
refuses options that CARE cannot have (`check`).

Shape letters: B sequences, T response tokens.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import field, replace
from typing import Any

import numpy as np
import torch
import verl.trainer.ppo.ray_trainer as ray_trainer
from omegaconf import DictConfig, OmegaConf
from pydantic import TypeAdapter
from torch import Tensor
from transformers import AutoTokenizer
from verl.trainer.ppo.core_algos import agg_loss, register_adv_est, register_policy_loss

from care_kernels import Clip
from care_train.algorithm.care import select_subgroup, subgroup_update
from care_train.algorithm.region_weights import split_advantages
from care_train.algorithm.selection import pairwise_distances
from care_train.algorithm.spans import parse_spans, rationale_span, token_spans
from care_train.algorithm.types import Rollout, RolloutGroup
from care_train.config import CareSettings
from care_train.config.base import Share, section
from care_train.integrations import check_settings
from care_train.models.prompts import TokenText
from care_train.verifier import format_score

BINS = 4096
"""Dimensions of `rationale_counts`."""


@section
class CareInVerl:
    """`algorithm.care` of verl's configuration."""

    model: str
    """The policy's folder or Hub id: its tokenizer says where the tags are."""
    success_threshold: Share = 0.5
    """From this reward on a response is right: lambda of Eq. 1 is below one half."""
    think_tag: str = "think"
    answer_tag: str = "answer"
    settings: CareSettings = field(default_factory=CareSettings)
    """As under `care.` in our own configuration, without `reflection`."""


_batch: ContextVar[dict[str, Any] | None] = ContextVar("batch", default=None)
"""What the estimator's caller holds: `responses` and `old_log_probs`, [B, T] each, and `prompts`, B
rows of token ids that end with the prompt's last."""


def check(config: DictConfig) -> None:
    """ValueError: options of verl's that CARE cannot have, in its whole configuration."""
    algorithm, actor = config.algorithm, config.actor_rollout_ref.actor
    correction = algorithm.get("rollout_correction") or {}
    loss, mode = actor.policy_loss.loss_mode, actor.loss_agg_mode
    if algorithm.adv_estimator != "care":
        if loss == "care":
            raise ValueError(
                f"policy loss care with algorithm.adv_estimator={algorithm.adv_estimator}; wanted "
                "adv_estimator=care, whose token weights it sums"
            )
        return
    refused = {
        f"actor.policy_loss.loss_mode={loss} with loss_agg_mode={mode}; wanted loss_mode=care, or "
        "loss_agg_mode=seq-mean-token-sum: Eq. 12 sums over a response, whose weights sum to 1": (
            loss != "care" and mode != "seq-mean-token-sum"
        ),
        "algorithm.use_kl_in_reward=True; wanted False, as the reward says what is right: "
        "actor.use_kl_loss is Eq. 13": algorithm.use_kl_in_reward,
        "algorithm.norm_adv_by_std_in_grpo=False; wanted True, as Eqs. 5-6 do": (
            not algorithm.get("norm_adv_by_std_in_grpo", True)
        ),
        "algorithm.rollout_correction.bypass_mode=True; wanted False: its log-probs are not those "
        "of the old policy, and the older trainer puts a loss of its own in place of care's": (
            correction.get("bypass_mode", False)
        ),
        f"algorithm.rollout_correction.rollout_rs={correction.get('rollout_rs')}; wanted seq_*: "
        "spans are found in whole responses": "token_" in (correction.get("rollout_rs") or ""),
        "actor_rollout_ref.rollout.multi_turn.enable=True; wanted False: responses have one turn": (
            config.actor_rollout_ref.rollout.multi_turn.enable
        ),
    }
    for message, is_refused in refused.items():
        if is_refused:
            raise ValueError(f"care: got {message}")
    settings_of(algorithm)


@register_adv_est("care")
def care_advantages(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: np.ndarray,
    config: Mapping[str, Any],
    **others: Any,
) -> tuple[Tensor, Tensor]:
    """Algorithm 1 without lines 11-20: a_it of Eq. 11 twice, [B, T], 0 outside S*.

    A response without mask takes no part: verl's rejection sampling has left it out.

    Args:
        token_level_rewards: [B, T]; a response's sum is its reward.
        response_mask: [B, T], 1 on a response's tokens, which stand first.
        index: [B] the prompt that each response answers.
        config: verl's `algorithm` section, whose `care` is a `CareInVerl`.
        others: what verl gives other estimators.

    Raises:
        ValueError: verl gave no token ids, a response has several turns, or `algorithm.care` is
            missing or wrong.
    """
    care, held = settings_of(config), _batch.get()
    if held is None or not {"responses", "prompts"} <= held.keys():
        raise ValueError("care: got no token ids in verl's batch; wanted verl 0.9's trainers")
    mask = response_mask.bool()
    if bool((mask[:, 1:] & ~mask[:, :-1]).any()):
        raise ValueError(
            "care: got a response_mask with tokens behind others that it leaves out; wanted "
            "responses of one turn, without tools"
        )
    text, lengths = token_text(care.model), mask.sum(-1).tolist()
    rewards = token_level_rewards.sum(-1).tolist()
    rollouts = [
        rollout_of(
            held["prompts"][i].tolist(),
            held["responses"][i, :length].tolist(),
            rewards[i],
            text,
            care,
        )
        for i, length in enumerate(lengths)
    ]
    sums = (held["old_log_probs"] * response_mask).sum(-1).float().cpu()
    advantages = torch.zeros_like(token_level_rewards, dtype=torch.float32)
    no_reflection = replace(care.settings.reflection, negative="none")
    settings = replace(care.settings, reflection=no_reflection)
    for number, prompt in enumerate(dict.fromkeys(index.tolist())):
        rows = [i for i, own in enumerate(index.tolist()) if own == prompt and lengths[i]]
        if not rows:
            continue
        group = RolloutGroup(
            tuple(rollouts[i] for i in rows),
            pairwise_distances(torch.stack([rationale_counts(rollouts[i]) for i in rows])),
            sums[rows],
        )
        # The generator is for random selectors.
        subgroup = select_subgroup(group, settings, torch.Generator().manual_seed(number))
        if isinstance(subgroup, str):
            continue
        row_of = {rollout: i for i, rollout in zip(rows, group.rollouts, strict=True)}
        sequences = subgroup_update(subgroup, settings).sequences
        for sequence, spread in zip(sequences, split_advantages(sequences), strict=True):
            advantages[row_of[sequence.rollout], : len(spread)] = spread.to(advantages.device)
    return advantages, advantages


def rollout_of(
    prompt_ids: Sequence[int],
    token_ids: Sequence[int],
    reward: float,
    text: TokenText,
    care: CareInVerl,
) -> Rollout:
    """One response, right from `success_threshold` on; a think tag that the prompt opened is its
    own."""
    tags = (care.think_tag, care.answer_tag)
    decoded, ends = text.decode_response(prompt_ids, token_ids, care.think_tag)
    # Special tokens have no text, and the end token is one.
    finished = len(token_ids) > 0 and not text.decode(token_ids[-1:])[0]
    return Rollout(
        token_ids=tuple(token_ids),
        text=decoded,
        spans=token_spans(parse_spans(decoded, *tags), ends[:-1] if finished else ends),
        accuracy=float(reward >= care.success_threshold),
        format_score=format_score(decoded, *tags),
        reward=reward,
        finished=finished,
    )


def rationale_counts(rollout: Rollout) -> Tensor:
    """[BINS] unit vector in place of Eq. 4's: how often a rationale has each token and each pair.

    Hashed into bins. Rationales that say the same in the same words are near, whatever a model's
    hidden states would say of others.
    """
    start, end = rationale_span(rollout)
    ids = torch.tensor(rollout.token_ids[start:end], dtype=torch.int64)
    pairs = ids[:-1] * 1_000_003 + ids[1:] + 1
    counts = torch.bincount(torch.cat([ids, pairs]) * 2_654_435_761 % BINS, minlength=BINS)
    return torch.nn.functional.normalize(counts.float(), dim=0)


@register_policy_loss("care")
def care_policy_loss(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "seq-mean-token-sum",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """Eq. 12: a response's sum over its tokens, whose weights sum to 1; the mean over responses.

    `loss_agg_mode` is not read: a token mean would undo Eq. 11. The mean is over the mini-batch's
    responses, S* or not, since verl counts no others.
    """
    ratio, bounds = (log_prob - old_log_prob).exp(), (config.clip_ratio_low, config.clip_ratio_high)
    clip = Clip(*[config.clip_ratio if bound is None else bound for bound in bounds])
    rows = clip(ratio, log_prob, advantages)
    losses = -rows.value if rollout_is_weights is None else -rows.value * rollout_is_weights
    loss = agg_loss(losses, response_mask, "seq-mean-token-sum", **config.global_batch_info)
    tokens = response_mask.sum().clamp(min=1)
    clipped = ((rows.clipped_low | rows.clipped_high) * response_mask).sum() / tokens
    kl = ((old_log_prob - log_prob) * response_mask).sum() / tokens
    return loss, {"actor/pg_clipfrac": clipped.item(), "actor/ppo_kl": kl.detach().item()}


def settings_of(config: Mapping[str, Any]) -> CareInVerl:
    """`algorithm.care`, checked."""
    values: Any = config.get("care")
    if isinstance(values, DictConfig):
        values = OmegaConf.to_container(values, resolve=True)
    if not isinstance(values, Mapping):
        raise ValueError(
            "algorithm.care: got nothing, wanted at least "
            "'+algorithm.care.model=${actor_rollout_ref.model.path}'"
        )
    if "reflection" in (values.get("settings") or {}):
        raise ValueError(
            "algorithm.care.settings.reflection: got one, wanted none: an estimator cannot sample"
        )
    care = TypeAdapter(CareInVerl).validate_python(values)
    check_settings(care.settings)
    return care


@functools.cache
def token_text(model: str) -> TokenText:
    """The decoder of a model's tokenizer."""
    return TokenText(AutoTokenizer.from_pretrained(model))


@contextmanager
def holding(tensors: Mapping[str, Any]) -> Iterator[None]:
    """Let the estimator see token ids and log-probs beside what a caller before gave."""
    names = ("prompts", "responses", "old_log_probs")
    known = {name: tensors[name] for name in names if name in tensors}
    token = _batch.set((_batch.get() or {}) | known)
    try:
        yield
    finally:
        _batch.reset(token)


def _wrapped(compute_advantage: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(compute_advantage)
    def wrapper(data: Any, *args: Any, **kwargs: Any) -> Any:
        with holding({key: data.batch[key] for key in data.batch.keys()}):
            return compute_advantage(data, *args, **kwargs)

    return wrapper


def _wrap_v1(trainer_base: Any, utils: Any) -> None:
    """The V1 trainer takes no token ids to its estimator: fetch them from its queue before."""
    utils.compute_advantage = ray_trainer.compute_advantage
    original = trainer_base.PPOTrainer._compute_advantage

    @functools.wraps(original)
    def wrapper(self: Any, batch: Any, metrics: dict) -> Any:
        if self.config.algorithm.adv_estimator != "care":
            return original(self, batch, metrics)
        found = trainer_base.tq.kv_batch_get(
            keys=batch.keys, partition_id=batch.partition_id, select_fields=["prompts", "responses"]
        )
        responses = found.to_padded_tensor()["responses"]
        with holding({"prompts": found["prompts"].unbind(), "responses": responses}):
            return original(self, batch, metrics)

    trainer_base.PPOTrainer._compute_advantage = wrapper
    _check_first(trainer_base.PPOTrainer)


def _check_first(trainer: Any) -> None:
    original = trainer.__init__

    @functools.wraps(original)
    def wrapper(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        check(config)
        original(self, config, *args, **kwargs)

    trainer.__init__ = wrapper


_check_first(ray_trainer.RayPPOTrainer)
ray_trainer.compute_advantage = _wrapped(ray_trainer.compute_advantage)
try:
    from verl.trainer.ppo.v1 import trainer_base, utils
except ImportError:
    pass  # The V1 trainer needs TransferQueue; without it only the older one runs.
else:
    _wrap_v1(trainer_base, utils)
