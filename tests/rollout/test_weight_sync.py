"""Weight sync into vLLM: what is caught, and what moves."""

import pytest
import torch

from care_train.rollout.engine import SamplingSettings
from care_train.rollout.errors import RolloutError
from care_train.rollout.weight_sync import add_checksums, checksum
from care_train.training.weights import policy_weights, stream

GREEDY = SamplingSettings(4, greedy=True)


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
    """Rows, columns and chunks: the sum over pieces is the whole's."""
    tensor = torch.randn(24, 10)
    rows = [checksum(tensor[i : i + 8], first_row=i) for i in (0, 8, 16)]
    columns = [checksum(tensor[:, i : i + 5], first_column=i, columns=10) for i in (0, 5)]
    assert add_checksums(rows) == add_checksums(columns) == checksum(tensor)


@pytest.mark.parametrize("kind", ["tiny-qwen2.5-vl", "tiny-qwen3-vl"])
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
    """Named, with vLLM's own words; the engine recovers with a whole sync."""
    model = either()
    weights = [(w.name, w.make()) for w in policy_weights(model.loaded.model)]
    name, tensor = weights[-1]
    cases = {
        r"no tensor was sent for .*lm_head": [w for w in weights if w[0] != "lm_head.weight"],
        r"gate_up_proj.*in part only: .*gate_proj": [
            w for w in weights if "layers.0.mlp.up_proj" not in w[0]
        ],
        r"weight sync: 'model.language_model.nonsense'": [
            *weights,
            ("model.language_model.nonsense", torch.zeros(2)),
        ],
        f"weight sync: '{name}'": [*weights[:-1], (name, tensor[:-1])],
    }
    for problem, wrong in cases.items():
        with pytest.raises(RolloutError, match=problem):
            model.engine.sync(wrong)
    model.sync()
    assert model.engine.generate(model.requests(1), GREEDY)


def test_the_report_counts_bytes(pair):
    """All parameters, once."""
    model = pair()
    wanted = sum(p.numel() * p.element_size() for p in model.loaded.model.parameters())
    assert model.sync() == {"sync_bytes": float(wanted)}


def test_buckets_are_gathered_one_at_a_time(tiny_folder):
    """No more than the bucket is whole at once; each tensor while its bucket is."""
    from contextlib import contextmanager

    from tests.train.builders import load

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
    from tests.train.builders import load

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
