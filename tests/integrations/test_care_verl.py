"""CARE inside verl: on the same group its token advantages are Algorithm 1's, bit for bit.

Needs verl 0.9, which is no dependency of the project: docs/verl.md says how these are run.
"""

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer

pytest.importorskip("verl", reason="verl is not installed: docs/verl.md")

import hydra
from omegaconf import OmegaConf
from verl import DataProto
from verl.trainer.ppo import core_algos, ray_trainer
from verl.trainer.ppo.v1 import trainer_base

from care_kernels.objective import Clip
from care_train.algorithm.care import select_subgroup, subgroup_update
from care_train.algorithm.region_weights import spread_advantages
from care_train.algorithm.selection import pairwise_distances
from care_train.algorithm.types import RolloutGroup
from care_train.config import build_config
from care_train.integrations import verl as door
from tests.integrations.verl_run import documented
from tests.kernels.oracle import reference_surrogate

RIGHT = "<think>the sky is {}</think> <answer>blue</answer>"
WRONG = "<think>the sky is {}</think> <answer>red</answer>"
WORDS = ("wide", "a rose", "low and far", "clay", "sea", "no idea", "b c", "d e f")
GROUPS = (
    [RIGHT.format(w) for w in WORDS[:3]] + [WRONG.format(w) for w in WORDS[3:]] + ["a", "<think"],
    [WRONG.format(w) for w in WORDS],
    [RIGHT.format(w) for w in WORDS],
)
"""Anchored, with malformed failures; rescued; skipped."""


def reward_of(text: str) -> float:
    return 0.9 * ("<answer>blue" in text) + 0.1 * ("</answer>" in text)


class Batch:
    """verl's batch of `GROUPS`, their responses in an order of their own."""

    def __init__(self, model: Path) -> None:
        self.text = door.token_text(str(model))
        self.tokenizer: Any = AutoTokenizer.from_pretrained(model)
        tokenizer = self.tokenizer
        flat = [(f"uid-{g}", text) for g, group in enumerate(GROUPS) for text in group]
        order = torch.randperm(len(flat), generator=torch.Generator().manual_seed(0)).tolist()
        self.rows = [flat[i] for i in order]
        ids = [tokenizer(text)["input_ids"] for _, text in self.rows]
        # One was cut by the length limit; the others end.
        ends = [[] if i == 4 else [tokenizer.eos_token_id] for i in range(len(ids))]
        self.ids = [own + end for own, end in zip(ids, ends, strict=True)]
        self.mask = pad_sequence([torch.ones(len(own)) for own in self.ids], batch_first=True)
        rewards = torch.zeros_like(self.mask)
        for i, own in enumerate(self.ids):
            rewards[i, len(own) - 1] = reward_of(self.rows[i][1])
        generator = torch.Generator().manual_seed(1)
        self.log_probs = -torch.rand(self.mask.shape, generator=generator)
        self.prompts = torch.tensor([[0, *tokenizer("see")["input_ids"]]] * len(self.ids))
        self.data = DataProto.from_single_dict(
            {
                "prompts": self.prompts,
                "responses": pad_sequence([*map(torch.tensor, self.ids)], batch_first=True),
                "response_mask": self.mask,
                "token_level_rewards": rewards,
                "old_log_probs": self.log_probs,
                "uid": np.array([uid for uid, _ in self.rows], dtype=object),
            }
        )

    def group(self, uid: str, care: door.CareInVerl) -> tuple[list[int], RolloutGroup]:
        rows = [i for i, (own, _) in enumerate(self.rows) if own == uid]
        rollouts = [
            door.rollout_of([], self.ids[i], reward_of(self.rows[i][1]), self.text, care)
            for i in rows
        ]
        vectors = torch.stack([door.rationale_counts(rollout) for rollout in rollouts])
        sums = (self.log_probs * self.mask).sum(-1)[rows]
        return rows, RolloutGroup(tuple(rollouts), pairwise_distances(vectors), sums)


def algorithm_config(model: Path, **settings: Any) -> Any:
    """The `algorithm` section of a whole configuration, as hydra would give it."""
    care = {"model": "${actor_rollout_ref.model.path}", "settings": settings}
    values = {
        "actor_rollout_ref": {"model": {"path": str(model)}},
        "algorithm": {"adv_estimator": "care", "care": care},
    }
    return OmegaConf.create(values).algorithm


def computed(batch: Batch, config: Mapping) -> Tensor:
    """Through the call of verl's own trainers."""
    data = ray_trainer.compute_advantage(batch.data, "care", config=config)
    assert torch.equal(data.batch["advantages"], data.batch["returns"])
    return data.batch["advantages"]


@pytest.mark.parametrize("settings", [{}, {"max_negatives": 2, "think_weight": 0.5}], ids=str)
def test_token_advantages_are_algorithm_1s(tiny_folder, settings):
    """Selection, rescue and region weights on the same groups, without reflection."""
    folder = tiny_folder("tiny-qwen2")
    batch, config = Batch(folder), algorithm_config(folder, **settings)
    advantages = computed(batch, config)
    care = build_config({"care": {**settings, "reflection": {"negative": "none"}}}).care
    wanted, skipped = torch.zeros_like(advantages), []
    for g in range(len(GROUPS)):
        rows, group = batch.group(f"uid-{g}", door.settings_of(config))
        subgroup = select_subgroup(group, care)
        if isinstance(subgroup, str):
            skipped.append(subgroup)
            continue
        places = {rollout: i for i, rollout in zip(rows, group.rollouts, strict=True)}
        for sequence in subgroup_update(subgroup, care).sequences:
            row = spread_advantages([sequence])
            wanted[places[sequence.rollout], : len(row)] = row
    assert skipped == ["all_correct"]
    assert torch.equal(advantages, wanted) and (advantages > 0).any() and (advantages < 0).any()
    assert (advantages[batch.mask == 0] == 0).all()


def test_what_a_response_is(tiny_folder):
    """Right from the threshold on; its end token is told from a cut; rationales in the same words
    are at distance 0, those that share fewer are farther."""
    batch = Batch(tiny_folder("tiny-qwen2"))
    care = door.CareInVerl(model="x")
    groups = [batch.group(f"uid-{g}", care)[1].rollouts for g in range(3)]
    assert sorted(rollout.accuracy for rollout in groups[0]) == [0.0] * 7 + [1.0] * 3
    assert sum(not rollout.finished for group in groups for rollout in group) == 1
    tokenizer = batch.tokenizer

    def counts(words: str) -> Tensor:
        ids = tokenizer(f"<think>{words}</think><answer>1</answer>")["input_ids"]
        return door.rationale_counts(door.rollout_of([], ids, 0.0, batch.text, care))

    words = ("the image is red", "the image is blue", "what?")
    same, near, far = (float(counts(words[0]) @ counts(other)) for other in words)
    assert same == pytest.approx(1.0) and same > near > far
    # A tag that the prompt ends with is the response's.
    opened, said = (tokenizer(text)["input_ids"] for text in ("go<think>", "on</think><answer>1"))
    rollout = door.rollout_of(opened, said, 0.0, batch.text, care)
    assert rollout.text.startswith("<think>on<") and rollout.spans.think[0] == 0


def test_a_response_without_mask_takes_no_part(tiny_folder):
    """verl's rejection sampling: as if it had not been sampled. One with tokens behind a hole has
    several turns, and is refused."""
    folder = tiny_folder("tiny-qwen2")
    batch, config = Batch(folder), algorithm_config(folder)
    rows, group = batch.group("uid-0", door.settings_of(config))
    left_out = next(i for i, r in zip(rows, group.rollouts, strict=True) if r.accuracy)
    rest = [i for i in range(len(batch.rows)) if i != left_out]
    wanted = ray_trainer.compute_advantage(batch.data[rest], "care", config=config)
    batch.data.batch["response_mask"][left_out] = 0
    found = computed(batch, config)
    assert torch.equal(found[rest], wanted.batch["advantages"]) and not found[left_out].any()
    batch.data.batch["response_mask"][rest[0], 1] = 0
    with pytest.raises(ValueError, match="wanted responses of one turn"):
        computed(batch, config)


def test_the_loss_is_eq_12(tiny_folder):
    """The mean over responses of the clipped surrogate's sum, and its gradient."""
    batch = Batch(tiny_folder("tiny-qwen2"))
    advantages = computed(batch, algorithm_config(tiny_folder("tiny-qwen2")))
    generator = torch.Generator().manual_seed(2)
    log_probs = batch.log_probs + 0.5 * torch.randn(advantages.shape, generator=generator)
    ours, plain = (log_probs.clone().requires_grad_() for _ in range(2))
    config = SimpleNamespace(
        clip_ratio=0.2, clip_ratio_low=None, clip_ratio_high=0.28, global_batch_info={}
    )
    loss_of = core_algos.get_policy_loss_fn("care")
    loss, metrics = loss_of(
        batch.log_probs, ours, advantages, batch.mask, "token-mean", config, None
    )
    ratio = (plain - batch.log_probs).exp()
    value = reference_surrogate(Clip(0.2, 0.28), ratio, plain, advantages)
    wanted = -(value * batch.mask).sum() / len(batch.rows)
    torch.testing.assert_close(loss, wanted)
    loss.backward()
    wanted.backward()
    torch.testing.assert_close(ours.grad, plain.grad)
    assert 0 < metrics["actor/pg_clipfrac"] < 1


class Fetched(dict):
    """What verl's queue returns."""

    def to_padded_tensor(self) -> "Fetched":
        return self


class Meta(SimpleNamespace):
    """verl's handle of a batch in the queue."""

    def __len__(self) -> int:
        return len(self.keys)


def test_the_v1_trainer_fetches_the_token_ids(tiny_folder, monkeypatch):
    """Its own batch has rewards and log-probs alone; the queue has the rest.

    The trainer's method is verl's; the queue, which needs its servers, is replaced.
    """
    folder = tiny_folder("tiny-qwen2")
    batch, asked = Batch(folder), []
    columns: dict[str, Any] = dict(batch.data.batch.items())
    columns["rm_scores"] = columns["token_level_rewards"]
    columns["uid"] = batch.data.non_tensor_batch["uid"]

    def kv_batch_get(keys, partition_id, select_fields):
        asked.append(select_fields)
        return Fetched({name: columns[name] for name in select_fields if name in columns})

    replaced = {
        "tq": SimpleNamespace(
            kv_batch_get=kv_batch_get, kv_batch_put=lambda keys, partition_id, fields: fields
        ),
        "DataProto": lambda batch: SimpleNamespace(batch=batch, non_tensor_batch={}),
        "response_to_nested": lambda values, mask: values,
        "TensorDict": lambda values, batch_size: values,
    }
    for name, value in replaced.items():
        monkeypatch.setattr(trainer_base, name, value)
    algorithm = OmegaConf.to_container(algorithm_config(folder), resolve=True)
    assert isinstance(algorithm, dict)
    algorithm |= {"gamma": 1.0, "lam": 1.0, "use_kl_in_reward": False}
    config = {"algorithm": algorithm, "actor_rollout_ref": {"rollout": {"n": 8}}}
    trainer = SimpleNamespace(config=OmegaConf.create(config))
    meta = Meta(keys=["key"] * len(batch.rows), partition_id="train")
    found = trainer_base.PPOTrainer._compute_advantage(trainer, meta, {})
    assert ["prompts", "responses"] in asked
    assert torch.equal(found["advantages"], computed(batch, algorithm_config(folder)))


@pytest.mark.parametrize(
    ("override", "message"),
    (
        ("actor_rollout_ref.actor.policy_loss.loss_mode=vanilla", "wanted loss_mode=care, or"),
        ("algorithm.adv_estimator=grpo", "policy loss care with algorithm.adv_estimator=grpo"),
        ("algorithm.use_kl_in_reward=True", "use_kl_in_reward=True; wanted False"),
        ("algorithm.norm_adv_by_std_in_grpo=False", "norm_adv_by_std_in_grpo=False; wanted True"),
        ("algorithm.rollout_correction.bypass_mode=True", "bypass_mode=True; wanted False"),
        ("algorithm.rollout_correction.rollout_rs=token_k1", "rollout_rs=token_k1; wanted seq_"),
        ("actor_rollout_ref.rollout.multi_turn.enable=True", "multi_turn.enable=True; wanted F"),
        ("algorithm.care=null", "algorithm.care: got nothing, wanted at least"),
        ("algorithm.care.settings={reflection: {cue: x}}", "an estimator cannot sample"),
        ("algorithm.care.settings={credit: steps}", "care.credit=steps"),
    ),
)
def test_refuses(override, message):
    """Before the first step: what would be without effect, or another algorithm."""
    with hydra.initialize_config_module("verl.trainer.config", version_base=None):
        config = hydra.compose("ppo_trainer", overrides=documented())
        door.check(config)
        config = hydra.compose("ppo_trainer", overrides=[*documented(), f"++{override}"])
    for trainer in (ray_trainer.RayPPOTrainer, trainer_base.PPOTrainer):
        with pytest.raises(ValueError, match=message):
            trainer.__init__(SimpleNamespace(), config)
