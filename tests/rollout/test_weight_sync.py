"""Weight sync into vLLM, whole or adapters alone: what is sent, what is caught, what moves."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from care_train.config import VllmSettings
from care_train.rollout.engine import WeightParts
from care_train.rollout.errors import RolloutError, RolloutServerError
from care_train.rollout.weight_sync import buckets, checksum, described
from care_train.training.weights import policy_weights, stream
from tests.rollout.conftest import GREEDY, KINDS, largest_gap
from tests.rollout.test_vllm_engine import check_greedy_outputs, check_without_adapter
from tests.train.builders import load


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_changed_element_changes_the_checksum(dtype):
    """Any bit of any element, and the order of elements."""
    tensor = torch.randn(37, 19).to(dtype)
    whole = checksum(tensor)
    assert checksum(tensor.clone()) == whole == checksum(tensor.T.contiguous().T)
    for row, column in ((0, 0), (36, 18), (5, 7)):
        other = tensor.clone()
        other[row, column] = torch.nextafter(other[row, column], torch.tensor(9.0, dtype=dtype))
        assert checksum(other) != whole
    assert checksum(tensor.flip(0)) != whole


def test_checksums_add_over_pieces():
    """Rows, columns and chunks, also transposed: the sum over pieces is the whole's."""
    tensor = torch.randn(24, 6, 10)
    for whole in (tensor, tensor.transpose(1, 2)):
        for dim in range(3):
            pieces = whole.split(4, dim)
            sums = [checksum(p.contiguous(), p.storage_offset(), p.stride()) for p in pieces]
            assert (sum(sums) - checksum(tensor)) % 2**64 == 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_corrupted_tensor_is_caught_and_named(kind, pair, monkeypatch):
    """One bit, in a fused parameter, after loading: the run stops, and generates nothing more."""
    model = pair(kind)
    name = "model.language_model.layers.1.self_attn.k_proj.weight"
    from care_train.rollout.vllm_worker import WeightReceiver

    load = WeightReceiver.care_load

    def corrupt(worker, sent, tensor):
        problem = load(worker, sent, tensor)
        if sent.name == "lm_head.weight":
            held = dict(worker.model_runner.get_model().named_parameters())
            fused = held["language_model.model.layers.1.self_attn.qkv_proj.weight"]
            query = model.loaded.model.base_model.language_model.layers[1].self_attn.q_proj
            bits = fused.data[query.out_features].view(torch.int32)
            with torch.inference_mode():
                bits[0] ^= 1
        return problem

    monkeypatch.setattr(WeightReceiver, "care_load", corrupt)
    with pytest.raises(RolloutError, match=f"{name}.*other numbers than were sent"):
        model.sync()
    monkeypatch.undo()
    with pytest.raises(RuntimeError, match="wanted a sync"):
        model.engine.generate(model.requests(1), GREEDY)
    model.sync()
    assert model.engine.generate(model.requests(1), GREEDY)


def test_a_tensor_left_out_unknown_or_misshapen_is_caught(either):
    """Named, with vLLM's own words; the engine recovers with a whole sync. A neighbour that comes
    twice does not pass for what is left out."""
    model = either()
    weights = model.weights()
    [gate] = [weight for weight in weights if "layers.0.mlp.gate_proj" in weight[0]]
    name, tensor = weights[-1]
    cases = {
        r"no tensor was sent for .*lm_head": [w for w in weights if w[0] != "lm_head.weight"],
        r"gate_up_proj.*in part only: .*gate_proj": [
            gate if "layers.0.mlp.up_proj" in w[0] else w for w in weights
        ],
        r"weight sync: 'model.language_model.nonsense'": [
            *weights,
            ("model.language_model.nonsense", torch.zeros(2)),
        ],
        f"weight sync: '{name}'": [*weights[:-1], (name, tensor[:-1])],
    }
    for problem, wrong in cases.items():
        with pytest.raises(RolloutError, match=problem):
            model.sync(wrong)
    wanted = sum(p.numel() * p.element_size() for p in model.loaded.model.parameters())
    assert model.sync() == {"sync_bytes": float(wanted)}
    assert model.engine.generate(model.requests(1), GREEDY)


FILLED = {
    "index_put": lambda held, new: held.data.index_put_((torch.arange(len(new)),), new),
    "out": lambda held, new: torch.add(new, 0, out=held.data),
    "data": lambda held, new: setattr(held, "data", new),
    "set": lambda held, new: held.set_(new),
    "another tensor": lambda held, new: held.data.copy_(new + 0),
}


@pytest.mark.parametrize("way", FILLED)
def test_a_loader_that_cannot_be_followed_is_refused(way):
    """Nobody would know where to look for the numbers."""
    pytest.importorskip("vllm")
    from care_train.rollout.vllm_worker import WeightReceiver

    class Model(torch.nn.Linear):
        def load_weights(self, weights):
            FILLED[way](self.weight, weights[0][1])

    worker, model = WeightReceiver(), Model(3, 2, bias=False)
    worker.model_runner = SimpleNamespace(get_model=lambda: model)
    worker.care_begin()
    [(sent, tensor)] = described([("proj.weight", torch.ones(2, 3))], torch.float32)
    assert "'proj.weight': vLLM has no parameter" in (worker.care_load(sent, tensor) or "")
    assert torch.equal(model.weight, tensor)


def test_weights_go_in_buckets(tiny_folder):
    """No bucket is larger, unless one tensor alone is; together they are the model."""
    model = load(tiny_folder()).model
    weights = [(w.name, w.make()) for w in policy_weights(model)]
    packed = list(buckets(described(weights, torch.bfloat16), 1 << 15))
    assert [tensor.name for sent, _ in packed for tensor in sent] == [name for name, _ in weights]
    whole = torch.cat([tensor.detach().bfloat16().reshape(-1) for _, tensor in weights])
    assert torch.equal(torch.cat([content for _, content in packed]).view(torch.bfloat16), whole)
    assert len(packed) > 5
    assert all(len(content) <= 1 << 15 or len(sent) == 1 for sent, content in packed)


def test_buckets_are_gathered_one_at_a_time(tiny_folder):
    """No more than the bucket is whole at once; each tensor while its bucket is."""
    weights = policy_weights(load(tiny_folder()).model)
    whole: list[int] = []
    sizes = []

    @contextmanager
    def gathered(parameters):
        whole.extend(id(p) for p in parameters)
        sizes.append(sum(p.numel() * p.element_size() for p in parameters))
        yield
        whole.clear()

    names = []
    for name, tensor in stream(weights, 1 << 15, gathered):
        assert whole and tensor.numel()
        names.append(name)
    assert names == [w.name for w in weights]
    assert len(sizes) > 5 and max(sizes) <= max(1 << 15, max(w.num_bytes for w in weights))


def test_adapters_are_merged(tiny_folder):
    """A LoRA policy is sent as the model it is: names of the folder, deltas added."""
    peft = pytest.importorskip("peft")
    loaded = load(tiny_folder())
    plain = {n: p.detach().clone() for n, p in loaded.model.named_parameters()}
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    model = peft.get_peft_model(loaded.model, config)
    sent = {w.name: w.make().clone() for w in policy_weights(model)}
    merged = dict(model.merge_and_unload().named_parameters())
    assert sent.keys() == plain.keys() == merged.keys()
    for name, tensor in sent.items():
        torch.testing.assert_close(tensor, merged[name], msg=name)
        adapted = "q_proj.weight" in name or "up_proj.weight" in name
        assert torch.equal(tensor, plain[name]) != adapted, name


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_outputs_follow_the_adapter(kind, pair):
    """Tokens are transformers', log-probs the trainer's, after every change of the adapter."""
    check_greedy_outputs(pair(kind, lora=True), rounds=5, scale=0.05)


def test_base_weights_are_sent_once(pair):
    """After the first sync only the adapter goes: some percent of the bytes."""
    model = pair(lora=True)
    assert model.engine.wanted is WeightParts.ADAPTER
    model.change_weights(9, scale=0.05)
    alone = model.sync()["sync_bytes"]
    model.engine._process.owner = None
    assert model.engine.wanted is WeightParts.BASE_AND_ADAPTER
    whole = model.sync()["sync_bytes"]
    assert 0 < alone < whole / 5
    requests = model.requests()
    assert largest_gap(model, requests, model.engine.generate(requests, GREEDY)) < 1e-3
    check_without_adapter(pair(lora=True, adapted=False))


def test_an_adapter_that_vllm_holds_otherwise_stops_the_run(pair, monkeypatch):
    """A number changed on the way into vLLM's layers, a layer it does not have: each is named."""
    from vllm.lora.layers import MergedQKVParallelLinearWithLoRA as layer  # noqa: N813

    model = pair(lora=True)
    real = layer.set_lora

    def set_lora(self, index, lora_a, lora_b):
        real(self, index, lora_a, lora_b)
        self.lora_b_stacked[1][index, 0, 0, 0] += 1

    monkeypatch.setattr(layer, "set_lora", set_lora)
    with pytest.raises(RolloutError, match=r"k_proj.*holds other numbers than were sent"):
        model.sync()
    monkeypatch.undo()
    odd = [("model.elsewhere.q_proj.lora_A.weight", torch.zeros(4, 8))]
    odd.append(("model.elsewhere.q_proj.lora_B.weight", torch.zeros(8, 4)))
    with pytest.raises(RolloutError, match=r"elsewhere.*adapts no such layer"):
        model.sync(model.weights() + odd)
    model.sync()


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_server_takes_adapters_alone(workers, served, server, tiny_folder):
    """Outputs follow the adapter, of which two workers hold their shares. The server refuses one
    without base weights, and goes on; and, at its start, a run that sends none."""
    model = served(lora=True, workers=workers)
    # What the server has of the base weights is another run's.
    model.engine._version = None
    with pytest.raises(RolloutServerError, match="no tensor was sent for"):
        model.sync(model.weights(WeightParts.ADAPTER))
    whole = model.sync()["sync_bytes"]
    assert 0 < model.sync()["sync_bytes"] < whole / 5
    check_greedy_outputs(model, rounds=3, scale=0.05)
    check_without_adapter(served(lora=True, workers=workers, adapted=False))
    from care_train.rollout.remote_engine import VllmServerEngine

    settings = VllmSettings(server=server(lora=True, workers=workers).url)
    with pytest.raises(ValueError, match=r"model.lora.*: server 4, trainer None; start it with"):
        VllmServerEngine(load(tiny_folder()), settings)
    if workers > 1:
        # Its waiting workers take time from all others.
        assert server(lora=True, workers=workers).stop() == 0
