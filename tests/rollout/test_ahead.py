"""One step ahead: whose weights sampled what, what a checkpoint keeps, where it is refused."""

import pytest

from care_train.rollout.engine import Request
from care_train.training.sampler import AheadSampler
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
    """A model that a server holds, and two samplers of it with what deals their prompts."""
    model = served()
    session = make_session(tiny_folder(), {"rollout": SERVER, "train": {"steps": 3}})
    samplers = [AheadSampler(model.engine, session.encoder, session.config) for _ in range(2)]
    drawn = iter(range(100))
    return model, *samplers, lambda: [image_sample(index=next(drawn))]


def _gap(model, group):
    return largest_gap(model, [Request(group.prompt, 0)], [group.completions[0]])


def test_rollouts_are_one_update_old(ahead):
    """Step 0 samples its own and step 1's from the first weights, step 1 those of step 2 from the
    weights after one update; nothing is sampled for a step that will not be."""
    model, sampler, _, draw = ahead
    policy = Weights(model.loaded.model)
    sampler.sync(policy)
    first = sampler.sample(draw, 0)
    assert _gap(model, first[0]) < 1e-3 and sampler.has_next
    model.change_weights(1, scale=0.05)
    sampler.sync(policy)
    second = sampler.sample(draw, 1)
    assert [g.sample.id for g in (*first, *second)] == ["sample/0", "sample/1"]
    assert _gap(model, second[0]) > 1e-2
    waiting = sampler.state()
    model.change_weights(2, scale=0.05)
    assert sampler.has_next and waiting["step"] == 2
    sampler.sync(policy)
    third = sampler.sample(draw, 2)
    assert [list(c.token_ids) for c in third[0].completions] == waiting["token_ids"]
    assert not sampler.has_next and sampler.state() == {}


def test_waiting_rollouts_are_restored(ahead):
    """Tokens, ends and log-probs to the bit, for the prompts drawn again; none are sampled."""
    model, sampler, resumed, draw = ahead
    sampler.sync(Weights(model.loaded.model))
    sampler.sample(draw, 0)
    saved, wanted = sampler.state(), sampler.sample(draw, 1)
    resumed.restore(saved, lambda: [image_sample(index=1)])
    assert resumed.has_next
    assert [g.completions for g in resumed.sample(draw, 1)] == [g.completions for g in wanted]


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
