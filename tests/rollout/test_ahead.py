"""One step ahead: whose weights sampled what, what a checkpoint keeps, where it is refused."""

import pytest

from care_train.training.ahead import RolloutsAhead
from care_train.training.sampling import GroupSampler
from care_train.training.weights import policy_weights
from tests.rollout.test_vllm_engine import largest_gap
from tests.train.builders import image_sample, make_config, make_session

SERVER = {"engine": "vllm", "vllm": {"server": "http://127.0.0.1:1"}}


class Weights:
    """A policy, as the sampler sees it."""

    def __init__(self, model):
        self._model = model

    def weights(self, bucket_bytes, parts):
        return ((w.name, w.make()) for w in policy_weights(self._model, parts))


@pytest.fixture
def ahead(served, tiny_folder):
    """A sampler with the server's engine, its policy, and what hands out its rollouts."""
    model = served()
    session = make_session(tiny_folder(), {"rollout": SERVER})
    sampler = GroupSampler(model.engine, session.encoder, session.scorer, session.config)
    drawn = iter(range(100))
    rollouts = RolloutsAhead(sampler, lambda: [image_sample(index=next(drawn))], steps=3)
    return model, sampler, rollouts


def _gap(model, group):
    from care_train.rollout.engine import Completion, Request

    rollout = group.rollouts[0]
    completion = Completion(rollout.token_ids, rollout.finished, rollout.log_probs)
    return largest_gap(model, [Request(group.prompt, 0)], [completion])


def test_rollouts_are_one_update_old(ahead):
    """Step 0 samples its own and step 1's from the first weights, step 1 those of step 2 from the
    weights after one update; nothing is sampled for a step that will not be."""
    model, sampler, rollouts = ahead
    policy = Weights(model.loaded.model)
    sampler.sync(policy)
    first = rollouts.take(0)
    assert _gap(model, first[0]) < 1e-3 and rollouts.has_next
    model.change_weights(1, scale=0.05)
    sampler.sync(policy)
    second = rollouts.take(1)
    assert [g.sample.id for g in (*first, *second)] == ["sample/0", "sample/1"]
    assert _gap(model, second[0]) > 1e-2
    waiting = rollouts.state()
    model.change_weights(2, scale=0.05)
    assert rollouts.has_next and waiting["step"] == 2
    sampler.sync(policy)
    third = rollouts.take(2)
    assert [list(r.token_ids) for r in third[0].rollouts] == waiting["token_ids"]
    assert not rollouts.has_next and rollouts.state() == {}


def test_waiting_rollouts_are_restored(ahead):
    """Tokens, ends and log-probs to the bit, for the prompts drawn again; none are sampled."""
    model, sampler, rollouts = ahead
    sampler.sync(Weights(model.loaded.model))
    rollouts.take(0)
    saved, wanted = rollouts.state(), rollouts.take(1)
    resumed = RolloutsAhead(sampler, lambda: [image_sample(index=1)], steps=2)
    resumed.restore(saved)
    assert resumed.has_next
    assert [g.rollouts for g in resumed.take(1)] == [g.rollouts for g in wanted]


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ({}, "without rollout.engine=vllm and rollout.vllm.server"),
        ({"rollout": {"engine": "vllm"}}, "without rollout.engine=vllm and rollout.vllm.server"),
        ({"rollout": SERVER, "loss": {"importance_sampling": "none"}}, "one update old"),
        ({"rollout": SERVER, "train": {"dynamic_sampling": True}}, "dynamic_sampling"),
    ],
)
def test_where_it_cannot_be_it_is_an_error(values, wanted):
    """The key and why; never ignored."""
    train = values.get("train", {}) | {"rollouts_ahead": 1}
    with pytest.raises(ValueError, match=f"train.rollouts_ahead: got 1, wanted 0 .*{wanted}"):
        make_config(values | {"train": train})
