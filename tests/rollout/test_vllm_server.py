"""A real `care-train serve` beside the trainer: weights, errors, whose weights sampled what when
the rollouts are one step ahead."""

import os
import time

import httpx
import psutil
import pytest

from care_train.config import VllmSettings
from care_train.rollout import remote_engine
from care_train.rollout.engine import Request, SamplingSettings
from care_train.rollout.errors import RolloutServerError
from care_train.rollout.remote_engine import ServerClient, VllmServerEngine
from care_train.training.sampler import Sampler
from care_train.training.weights import policy_weights
from tests.rollout.conftest import GREEDY, Pair, Server, largest_gap
from tests.rollout.test_vllm_engine import check_greedy_outputs
from tests.train.builders import image_sample, load, make_config, make_session


def flipping(buckets):
    """In place of `buckets`: flips a bit in each."""
    for sent, content in buckets:
        content[-1] ^= 1
        yield sent, content


def check_that_a_flipped_bit_is_found(model, monkeypatch):
    """On the way to the server."""
    wanted = rf"rollout.vllm.server {model.engine.client.url}: .*weight sync: '.*other numbers"
    real = remote_engine.buckets
    with monkeypatch.context() as patch, pytest.raises(RolloutServerError, match=wanted):
        patch.setattr(remote_engine, "buckets", lambda *given: flipping(real(*given)))
        model.sync()


def test_a_corrupted_tensor_is_caught_and_named(served, monkeypatch):
    """One bit on the way to the server: the run stops, and generates nothing until a whole sync."""
    model = served()
    check_that_a_flipped_bit_is_found(model, monkeypatch)
    with pytest.raises(RolloutServerError, match="wanted a weight sync first"):
        model.engine.generate(model.requests(1), GREEDY)
    model.sync()
    assert model.engine.generate(model.requests(1), GREEDY)


def test_a_second_run_gets_the_server_when_the_first_is_done(
    served, server, tiny_folder, monkeypatch
):
    """Not before; then the first one's requests are refused: it never samples from foreign
    weights."""
    monkeypatch.setattr(remote_engine, "WAIT_SECONDS", 0)
    model = served()
    loaded = load(tiny_folder())
    other = Pair(loaded, VllmServerEngine(loaded, VllmSettings(server=server().url)))
    other.engine.client = ServerClient(server().url, other.engine.client.token)
    with pytest.raises(RolloutServerError, match=rf"another run has .* process {os.getpid()} on"):
        other.sync()
    assert model.engine.generate(model.requests(1), GREEDY)
    model.engine.client.release()
    other.sync()
    with pytest.raises(RolloutServerError, match="another run uses it"):
        model.engine.generate(model.requests(1), GREEDY)
    with pytest.raises(RolloutServerError, match=r"another run has .*; one run at a time"):
        model.sync()
    other.engine.client.release()
    model.sync()
    assert model.engine.generate(model.requests(1), GREEDY)


def test_a_run_has_several_engines(served, server, tiny_folder):
    """One after the other, before and after training: the last one has the server at once."""
    model = served()
    loaded = load(tiny_folder())
    after = Pair(loaded, VllmServerEngine(loaded, VllmSettings(server=server().url)))
    after.sync()
    assert after.engine.generate(model.requests(1), GREEDY)
    with pytest.raises(RolloutServerError, match="wanted a weight sync first"):
        model.engine.generate(model.requests(1), GREEDY)
    model.sync()


def test_a_server_of_another_model_is_refused(server, tiny_folder):
    """The first setting that differs is named, with both values."""
    loaded = load(tiny_folder())
    loaded.model.config.text_config.rms_norm_eps = 0.5
    wanted = r"does not fit this run: config.text_config.rms_norm_eps: server .*, trainer 0.5"
    with pytest.raises(ValueError, match=wanted):
        VllmServerEngine(loaded, VllmSettings(server=server().url))


def test_no_server_and_a_late_server_are_named(served, tiny_folder, monkeypatch):
    """URL, what was asked, and for how long. What is no URL is refused by the settings."""
    with pytest.raises(ValueError, match=r"rollout.vllm.server: got 'gpu1:8000'.*http://host:port"):
        VllmSettings(server="gpu1:8000")
    monkeypatch.setattr(remote_engine, "CONNECT_RETRIES", 1)
    with pytest.raises(RolloutServerError, match=r"http://127.0.0.1:9: cannot connect"):
        VllmServerEngine(load(tiny_folder()), VllmSettings(server="http://127.0.0.1:9"))
    model = served()
    http = model.engine.client._patient
    kept, http.timeout = http.timeout, httpx.Timeout(0.01, connect=5)
    with pytest.raises(RolloutServerError, match=r"/generate: no answer in 0.01 s"):
        model.engine.generate(model.requests(), SamplingSettings(48))
    http.timeout = kept
    model.sync()
    assert model.engine.generate(model.requests(1), GREEDY)


@pytest.mark.slow
def test_two_workers_hold_the_weights_together(tiny_folder, monkeypatch):
    """Tensor parallel: fused and split tensors, a tower's qkv among them, are checked over both
    workers; a bit lost on the way is found there too, and a worker that dies is an error."""
    server = Server(f"model.path={tiny_folder()}", "rollout.vllm.tensor_parallel_size=2")
    loaded = load(tiny_folder())
    model = Pair(loaded, VllmServerEngine(loaded, VllmSettings(server=server.url)))
    model.sync()
    check_greedy_outputs(model, rounds=2)
    check_that_a_flipped_bit_is_found(model, monkeypatch)
    model.sync()
    workers = psutil.Process(server.pid).children(recursive=True)
    next(process for process in reversed(workers) if "VLLM" in process.name().upper()).kill()
    start = time.monotonic()
    with pytest.raises(RolloutServerError, match=server.url):
        model.engine.generate(model.requests(), SamplingSettings(48))
    assert time.monotonic() - start < 60
    assert server.wait(60) not in (0, None)


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
    session = make_session(
        tiny_folder(), {"rollout": SERVER, "train": {"steps": 3, "rollouts_ahead": 1}}
    )
    samplers = [Sampler(model.engine, session.encoder, session.config) for _ in range(2)]
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
