"""A real `care-train serve` beside the trainer: tokens, log-probs, weights, errors."""

import os
import time

import psutil
import pytest

from care_train.config import VllmSettings
from care_train.rollout import remote_engine, server_client
from care_train.rollout.engine import SamplingSettings
from care_train.rollout.errors import RolloutServerError
from care_train.rollout.transformers_engine import TransformersEngine
from care_train.training.weights import policy_weights
from tests.rollout.conftest import Pair
from tests.rollout.servers import Server, limits
from tests.rollout.test_vllm_engine import (
    GREEDY,
    largest_gap,
    tokens,
)
from tests.train.builders import load


def test_a_corrupted_tensor_is_caught_and_named(served):
    """One bit on the way to the server: the run stops, and generates nothing until a whole sync."""
    model, seen = served(), []
    broadcast = model.engine._broadcast

    def corrupt(bucket):
        if not seen:
            bucket[bucket.numel() // 2] ^= 1
        seen.append(len(bucket))
        broadcast(bucket)

    model.engine._broadcast = corrupt
    wanted = rf"rollout.vllm.server {model.engine._client.url}: .*weight sync: '.*other numbers"
    with pytest.raises(RolloutServerError, match=wanted):
        model.sync()
    with pytest.raises(RolloutServerError, match="wanted a weight sync first"):
        model.engine.generate(model.requests(1), GREEDY)
    model.sync()
    assert model.engine.generate(model.requests(1), GREEDY)


def test_weights_go_in_buckets(served, monkeypatch):
    """No bucket is larger, unless one tensor alone is; together they are the model."""
    model, sizes = served(), []
    monkeypatch.setattr(remote_engine, "BUCKET_BYTES", 1 << 15)
    broadcast = model.engine._broadcast

    def record(bucket):
        sizes.append(len(bucket))
        broadcast(bucket)

    model.engine._broadcast = record
    total = model.sync()["sync_bytes"]
    model.engine._broadcast = broadcast
    parameters = [p.numel() * 4 for p in model.loaded.model.parameters()]
    assert sum(sizes) == sum(parameters) == total
    assert len(sizes) > 5 and max(sizes) <= max(1 << 15, *parameters)


def test_a_second_run_gets_the_server_when_the_first_is_done(
    served, server, tiny_folder, monkeypatch
):
    """Not before; then the first one's requests are refused: it never samples from foreign
    weights."""
    from care_train.rollout.remote_engine import VllmServerEngine

    monkeypatch.setattr(server_client, "WAIT_SECONDS", 0)
    model = served()
    weights = policy_weights(model.loaded.model)
    other = VllmServerEngine(load(tiny_folder()), VllmSettings(server=server().url))
    other._lease = server_client.Lease(other._client)
    with pytest.raises(RolloutServerError, match=rf"another run has .* process {os.getpid()} on"):
        other.sync((w.name, w.make()) for w in weights)
    assert model.engine.generate(model.requests(1), GREEDY)
    model.engine.close()
    other.sync((w.name, w.make()) for w in weights)
    with pytest.raises(RolloutServerError, match="another run uses it"):
        model.engine.generate(model.requests(1), GREEDY)
    with pytest.raises(RolloutServerError, match="one run at a time"):
        model.sync()
    other.close()
    model.sync()
    assert model.engine.generate(model.requests(1), GREEDY)


def test_a_run_has_several_engines(served, server, tiny_folder):
    """One after the other, before and after training: the last one has the server at once."""
    from care_train.rollout.remote_engine import VllmServerEngine

    model = served()
    after = VllmServerEngine(load(tiny_folder()), VllmSettings(server=server().url))
    after.sync((w.name, w.make()) for w in policy_weights(model.loaded.model))
    assert after.generate(model.requests(1), GREEDY)
    with pytest.raises(RolloutServerError, match="wanted a weight sync first"):
        model.engine.generate(model.requests(1), GREEDY)
    model.engine._broadcast = None
    model.sync()


def test_a_server_of_another_model_is_refused(server, tiny_folder):
    """The first setting that differs is named, with both values."""
    from care_train.rollout.remote_engine import VllmServerEngine

    loaded = load(tiny_folder())
    loaded.model.config.text_config.rms_norm_eps = 0.5
    wanted = r"it serves another model: config.text_config.rms_norm_eps: server .*, trainer 0.5"
    with pytest.raises(ValueError, match=wanted):
        VllmServerEngine(loaded, VllmSettings(server=server().url))


def test_no_server_and_a_late_server_are_named(served, tiny_folder, monkeypatch):
    """URL, what was asked, and for how long."""
    from care_train.rollout.remote_engine import VllmServerEngine

    monkeypatch.setattr(server_client, "CONNECT_RETRIES", 1)
    with pytest.raises(RolloutServerError, match=r"http://127.0.0.1:9: cannot connect"):
        VllmServerEngine(load(tiny_folder()), VllmSettings(server="http://127.0.0.1:9"))
    model = served()
    client = model.engine._client.with_timeout(0.01)
    kept, model.engine._client = model.engine._client, client
    with pytest.raises(RolloutServerError, match=r"/generate: no answer in 0.01 s"):
        model.engine.generate(model.requests(), SamplingSettings(48))
    model.engine._client = kept
    model.sync()
    assert model.engine.generate(model.requests(1), GREEDY)


def test_a_url_is_checked():
    """The key, the value, the form wanted."""
    with pytest.raises(ValueError, match=r"rollout.vllm.server: got 'gpu1:8000'.*http://host:port"):
        VllmSettings(server="gpu1:8000")


@pytest.mark.slow
def test_two_workers_hold_the_weights_together(tiny_folder):
    """Tensor parallel: fused and split tensors, a tower's qkv among them, are checked over both
    workers; a bit lost on the way is found there too."""
    from care_train.distributed import initialize_process_group
    from care_train.rollout.remote_engine import VllmServerEngine

    initialize_process_group()
    more = "rollout.vllm.tensor_parallel_size=2"
    server = Server(f"model.path={tiny_folder()}", *limits(), more)
    loaded = load(tiny_folder())
    model = Pair(loaded, VllmServerEngine(loaded, VllmSettings(server=server.url)))
    requests, transformers = model.requests(), TransformersEngine(loaded, 64)
    for seed in range(2):
        model.sync()
        completions = model.engine.generate(requests, GREEDY)
        assert tokens(completions) == tokens(transformers.generate(requests, GREEDY))
        assert largest_gap(model, requests, completions) < 1e-3
        model.change_weights(seed)
    broadcast = model.engine._broadcast

    def corrupt(bucket):
        bucket[-1] ^= 1
        broadcast(bucket)

    model.engine._broadcast = corrupt
    with pytest.raises(RolloutServerError, match="other numbers"):
        model.sync()
    model.sync()
    workers = psutil.Process(server.pid).children(recursive=True)
    next(process for process in reversed(workers) if "VLLM" in process.name().upper()).kill()
    start = time.monotonic()
    with pytest.raises(RolloutServerError, match=server.url):
        model.engine.generate(requests, SamplingSettings(48))
    assert time.monotonic() - start < 60
    assert server.wait(60) not in (0, None)
