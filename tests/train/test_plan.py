"""care-train plan: sizes of the paper's backbones, formulas, verdicts, and a measured check."""

import json
from dataclasses import replace

import pytest
import torch

from bench.plan import CASES, compare
from care_train import cli
from care_train.planning.memory import PHASES, plan_memory, text_activation_bytes
from care_train.planning.plan import GPU_COUNTS, advise
from care_train.planning.workload import (
    BACKBONES,
    GIB,
    Device,
    Workload,
    backbone_of,
    describe,
    gpu,
    read_architecture,
)
from tests.train.builders import load, make_config

PUBLISHED = {
    "Qwen2.5-VL-3B-Instruct": 3_754_622_976,
    "Qwen2.5-VL-7B-Instruct": 8_292_166_656,
    "Qwen3-VL-8B-Instruct": 8_767_123_696,
}
"""Parameters in each repository's safetensors files, as the Hub shows them."""

PAPER = {
    "model": {"path": "Qwen2.5-VL-3B-Instruct", "dtype": "bfloat16", "image_pixels": 1048576},
    "prompt": {"max_prompt_tokens": 2048},
    "rollout": {"group_size": 8, "max_new_tokens": 1024, "batch_size": 64},
    "train": {"prompts_per_step": 128, "micro_batch_size": 4},
    "deepspeed": {"zero_stage": 3},
}
CHECKPOINTING = {"gradient_checkpointing": True}
CPU = Device("CPU", 2.0**40, is_cpu=True)


@pytest.fixture(scope="module")
def backbones():
    """The paper's backbones, built once on the meta device."""
    return {name: read_architecture(name) for name in BACKBONES}


def _work(architecture, gpus=8, device="h100", values=None, **scenario):
    config = make_config(PAPER | (values or {}))
    return Workload(config, architecture, gpu(device), gpus, **scenario)


def _memory(*arguments, **options):
    return plan_memory(_work(*arguments, **options))


def test_backbones_have_the_published_number_of_parameters(backbones):
    """The shipped configurations are the real architectures, by their parameter counts."""
    assert {name: model.num_parameters for name, model in backbones.items()} == PUBLISHED


def test_backbones_are_known_by_name():
    """Hub names and folders that are not there mean the backbone of that name; errors name what
    came and what is known."""
    assert backbone_of("Qwen/Qwen2.5-VL-7B-Instruct") == "Qwen2.5-VL-7B-Instruct"
    assert backbone_of("/models/qwen3-vl-8b-thinking") == "Qwen3-VL-8B-Instruct"
    assert backbone_of("Qwen2.5-VL-72B") is None
    with pytest.raises(ValueError, match=r"model\.path: nowhere.*Qwen2\.5-VL-3B"):
        read_architecture("nowhere")
    with pytest.raises(ValueError, match=r"--gpu: got 'k80', wanted one of.*h100"):
        gpu("k80")


@pytest.mark.parametrize("engine", ["transformers", "vllm"])
def test_more_gpus_never_need_more_memory_each_under_zero_3(engine, backbones):
    """ZeRO-3 shards everything that grows with the model."""
    values = {"rollout": PAPER["rollout"] | {"engine": engine}}
    for model in backbones.values():
        peaks = [_memory(model, gpus, values=values).peak for gpus in GPU_COUNTS]
        assert peaks == sorted(peaks, reverse=True)


def test_a_higher_stage_never_holds_more_states(backbones):
    """Parameters, master weights, moments and gradients shrink from stage to stage."""
    model = backbones["Qwen2.5-VL-7B-Instruct"]
    totals = []
    for stage in (0, 1, 2, 3):
        memory = _memory(model, values={"deepspeed": {"zero_stage": stage}})
        names = ("parameters", "fp32 master weights", "optimiser states", "gradients")
        totals.append(memory.item_bytes(*names))
    assert totals == sorted(totals, reverse=True) and len(set(totals)) == 4
    # ZeRO's own count: 16 bytes per parameter, all sharded (arXiv:1910.02054, Sec. 3.1).
    assert totals[3] == pytest.approx(16 * model.num_parameters / 8)


def test_what_saves_memory_saves_it(backbones):
    """Checkpointing, a frozen tower, LoRA, offload and fewer sequences each lower the peak."""
    model = backbones["Qwen2.5-VL-3B-Instruct"]
    base = _memory(model).phase_bytes("train")
    offload = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
    savers = [
        {"train": PAPER["train"] | CHECKPOINTING},
        {"model": PAPER["model"] | {"lora": {"rank": 16}}},
        {"model": PAPER["model"] | {"train_vision": False}},
        {"train": PAPER["train"] | {"micro_batch_size": 1}},
        {"deepspeed": {"zero_stage": 3, "config": offload}},
        {"loss": {"kl_coef": 0.0}},
    ]
    for values in savers:
        assert _memory(model, values=values).phase_bytes("train") < base
    assert _memory(model, image_pixels=256 * 256).phase_bytes("train") < base


def test_lora_counts_its_adapters(tiny_folder):
    """r (in + out) per linear layer is what peft trains on all of them."""
    from peft import LoraConfig, get_peft_model

    model = load(tiny_folder("tiny-qwen2")).model
    work = Workload(make_config({"model": {"lora": {"rank": 8}}}), describe(model, ""), CPU, 1)
    adapted = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear"))
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert work.num_trained == trained


def test_saved_activations_are_those_autograd_keeps(tiny_folder):
    """The decoder layers' formula against the tensors autograd saves, within a tenth."""
    model = load(tiny_folder()).model.train()
    architecture, length, rows = describe(model, "tiny"), 128, 4
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.full((rows, length), 20)
    mask = torch.ones_like(ids)
    mask[0, -3:] = 0
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = model.base_model(input_ids=ids, attention_mask=mask).last_hidden_state
    values = {"train": {"micro_batch_size": rows}, "care": {"reflection": {"negative": "none"}}}
    values |= {"prompt": {"max_prompt_tokens": length - 8}, "rollout": {"max_new_tokens": 8}}
    predicted = text_activation_bytes(Workload(make_config(values), architecture, CPU, 1, 0))
    assert hidden.requires_grad
    assert predicted == pytest.approx(sum(kept.values()), rel=0.1)


def test_measured_states_are_the_planned_ones():
    """One case of `bench.plan`: states within 2 %, the peak within 15 %, of what was measured."""
    found = compare(replace(CASES["text"], hidden_size=768))
    assert found.state_ratio == pytest.approx(1, abs=0.02)
    assert found.ratio == pytest.approx(1, abs=0.15)


def test_advice_leads_to_a_plan_that_fits(backbones):
    """What does not fit gets changes, of which the last one fits."""
    work = _work(backbones["Qwen2.5-VL-7B-Instruct"], values={"deepspeed": {"zero_stage": 0}})
    advice = advise(work)
    assert not plan_memory(work).fits
    assert "checkpointing" in advice[0] and any("zero_stage" in line for line in advice)
    assert "still too much" not in advice[-1]
    values = {"train": PAPER["train"] | CHECKPOINTING}
    assert advise(_work(backbones["Qwen2.5-VL-3B-Instruct"], device="h200", values=values)) == []


@pytest.mark.parametrize("algorithm", ["care", "grpo"])
def test_vllm_takes_its_share_only_while_it_is_awake(algorithm, backbones):
    """With sleep, vLLM's memory is free again for training. CARE's reflections are sampled behind
    the old policy's forward, so vLLM is awake in it. A server has GPUs of its own."""
    values = {"rollout": PAPER["rollout"] | {"engine": "vllm"}, "algorithm": algorithm}
    memory = _memory(backbones["Qwen2.5-VL-3B-Instruct"], values=values)
    share = memory.item_bytes("vLLM")
    assert share == pytest.approx(0.4 * gpu("h100").memory)
    assert memory.phase_bytes("generate") >= share and memory.item_bytes("vLLM asleep") == GIB
    of = {item.name: item.phases for item in memory.items}
    assert ("log_probs" in of["vLLM"]) == (algorithm == "care")
    assert {*of["vLLM"], *of["vLLM asleep"]} == set(PHASES)
    values["rollout"] |= {"vllm": {"server": "http://gpu1:8000"}}
    served = _memory(backbones["Qwen2.5-VL-3B-Instruct"], values=values)
    assert served.item_bytes("vLLM") == 0 < served.item_bytes("weight sync bucket")


def test_the_plan_of_a_config_prints_and_is_json(capsys, tmp_path):
    """`care-train plan` prints tables; `--json` one object with the same peak."""
    path = tmp_path / "c.yaml"
    path.write_text(json.dumps(PAPER))
    assert cli.main(["plan", "--config", str(path), "--gpus", "8", "--gpu", "a100"]) == 0
    shown = capsys.readouterr().out
    assert "reference model" in shown and "GiB per rank" in shown
    assert cli.main(["plan", "--config", str(path), "--json", "model.path=tiny-qwen2"]) == 0
    values = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert values["fits"] and values["peak_bytes"] == max(values["phases"].values())
    assert cli.main(["plan", "--config", str(path), "--table"]) == 0
    assert "ZeRO-3" in capsys.readouterr().out
    assert cli.main(["plan", "--config", str(path), "--image-size", "big"]) == 2


def test_a_token_budget_bounds_a_micro_batch(backbones):
    """Activations go with `train.micro_batch_tokens`, and the advice is to lower it; packed, the
    attention mask is as wide as the pack, which FlashAttention does without."""
    model = backbones["Qwen2.5-VL-3B-Instruct"]
    context = 2048 + 2 * 1024

    def work(**train):
        attention = train.pop("attention", "sdpa")
        values = {"train": PAPER["train"] | train}
        values["model"] = PAPER["model"] | {"attention": attention}
        return _work(model, values=values)

    def language(**train):
        return plan_memory(work(**train)).item_bytes("activations of the language model")

    four = language(micro_batch_size=4)
    assert language(micro_batch_size=64, micro_batch_tokens=4 * context) == four
    packed = {"micro_batch_tokens": 4 * context, "packing": True}
    without_mask = language(attention="flash_attention_2", **packed)
    assert without_mask < four
    assert language(**packed) - without_mask == pytest.approx(4**2 * context**2 * 3)
    advice = advise(work(micro_batch_tokens=64 * context))
    assert any(f"set train.micro_batch_tokens={16 * context}" in line for line in advice)


def test_a_prompts_images_are_counted_once(backbones):
    """A rank with one prompt encodes one image, however many rollouts it trains at a time."""
    sizes = []
    for count in (8, 16, 64, 128):
        values = {"train": {"prompts_per_step": count, "micro_batch_size": 8}}
        memory = _memory(backbones["Qwen2.5-VL-3B-Instruct"], values=values)
        sizes.append(memory.item_bytes("activations of the vision tower"))
    assert sizes[1] == 2 * sizes[0] and sizes[2] == sizes[3] == 8 * sizes[0]
