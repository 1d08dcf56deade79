"""LoRA: adapters alone are trained, the model without them is the reference, merged they leave."""

import copy
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from care_train.cli import main
from care_train.config import LoraSettings
from care_train.models.lora import add_adapters, has_adapters
from care_train.models.policy import Policy
from care_train.rollout.transformers_engine import TransformersEngine
from care_train.training.checkpoint import save_model
from care_train.training.engine import MicroBatch, PolicyEngine
from care_train.training.log_probs import FrozenCopy, WithoutAdapters
from tests.train.builders import load, make_engine, micro_batch
from tests.train.runs import (
    COLD_START,
    errors_of,
    model_of,
    records,
    text_run_arguments,
    timeless,
)

LORA = LoraSettings(rank=4, alpha=8.0)


WHOLE = LoraSettings(rank=2, target_modules=["q_proj", "v_proj"], modules_to_save=["merger"])


def _engine(loaded, lora=LORA, **settings):
    return make_engine(loaded, lora=lora, learning_rate=2e-2, max_grad_norm=1.0, **settings)


def _trained(loaded, lora=LORA, **settings):
    """An engine after one step, the step's batch, and the log-probs that it has then."""
    engine = _engine(loaded, lora, **settings)
    micro = micro_batch(engine)
    engine.step([micro], 1.0)
    return engine, micro, engine.log_probs(micro.batch, 0.7)[0]


ONE_RANK_TRAINS = """
import os
from dataclasses import replace
from care_train.verifier import Verifier
real = Verifier.score_batch
def score_batch(self, responses):
    rewards = [i % 2 * (os.environ["RANK"] == "0") for i in range(len(responses))]
    scores = zip(real(self, responses), map(float, rewards), strict=True)
    return [replace(score, accuracy=reward, reward=reward) for score, reward in scores]
Verifier.score_batch = score_batch
"""


def test_a_rank_without_sequences_runs_the_reference_too(tmp_path):
    """Under ZeRO-3 the exact KL's forwards without adapters are all ranks'."""
    more = ("train.steps=1", "deepspeed.zero_stage=3", "model.lora.rank=4", "loss.kl_coef=0.1")
    arguments = (*text_run_arguments(tmp_path), *more, "loss.kl_estimator=exact")
    errors_of(*arguments, ranks=2, before=ONE_RANK_TRAINS, seconds=90)
    assert records(tmp_path / "run")[0]["trained_sequences"] > 0


@pytest.mark.parametrize("kind", ["tiny-qwen2.5-vl", "tiny-qwen2"])
def test_adapters_start_as_nothing_and_alone_are_trained(kind, tiny_folder):
    """Every linear layer of the language model, none of the vision tower or the head."""
    loaded = load(tiny_folder(kind))
    before = {name: p.clone() for name, p in loaded.model.named_parameters()}
    linears = {
        name
        for name, module in loaded.model.named_modules()
        if isinstance(module, torch.nn.Linear) and "visual" not in name and "lm_head" not in name
    }
    plain = Policy(copy.deepcopy(loaded.model)).eval()
    engine = _engine(loaded)
    micro = micro_batch(engine)
    with torch.no_grad():
        assert torch.equal(engine.log_probs(micro.batch, 1.0)[0], plain(micro.batch)[0])
    trained = {n for n, p in loaded.model.named_parameters() if p.requires_grad}
    assert trained == {f"{n}.lora_{part}.default.weight" for n in linears for part in "AB"}
    engine.step([micro], 1.0)
    after = {n.replace(".base_layer", ""): p for n, p in loaded.model.named_parameters()}
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    moved = [n for n in trained if "lora_B" in n and after[n].abs().max() > 1e-3]
    assert len(moved) == len(linears)


@pytest.mark.parametrize(("zero_stage", "lora"), [(0, WHOLE), (2, LORA), (3, LORA)])
def test_the_reference_is_the_model_without_adapters(zero_stage, lora, tiny_folder):
    """After training: bit for bit what a copy made before says; then adapters are on again."""
    loaded = load(tiny_folder())
    copied = FrozenCopy(loaded.model)
    engine, micro, trained = _trained(loaded, lora, zero_stage=zero_stage)
    reference = WithoutAdapters(engine)
    wanted = copied.log_probs(micro.batch, 0.7)[0]
    assert torch.equal(reference.log_probs(micro.batch, 0.7)[0], wanted)
    exact, own = copied.exact_kl_arguments(micro.batch), reference.exact_kl_arguments(micro.batch)
    assert torch.equal(own["ref_hidden"], exact["ref_hidden"])
    assert torch.equal(engine.log_probs(micro.batch, 0.7)[0], trained)
    assert not torch.allclose(trained, wanted, atol=1e-3)
    # Exact KL against its own head trains, and the adapters still get gradients.
    weights = torch.full((len(micro.batch.rows),), 0.01)
    arguments = micro.loss_arguments | own | {"kl_weights": weights, "kl_estimator": "exact"}
    assert engine.step([MicroBatch(micro.batch, arguments)], 1.0).grad_norm > 0


@pytest.mark.parametrize(("zero_stage", "lora"), [(0, WHOLE), (2, LORA), (3, LORA)])
def test_merged_weights_leave_the_engine(zero_stage, lora, tiny_folder, tmp_path):
    """To rollouts under ZeRO-3 and to disk: a plain model that computes as the adapted one, with
    `modules_to_save` too, where the merger moves with the adapters."""
    loaded = load(tiny_folder())
    before = {name: p.clone() for name, p in loaded.model.named_parameters()}
    engine, micro, trained = _trained(loaded, lora, zero_stage=zero_stage)
    save_model(engine, tmp_path / "final")
    saved = load(tmp_path / "final").model
    models = [saved]
    if engine.rollout_copy is not None:
        TransformersEngine(engine.rollout_copy, 8, is_copy=True).sync(engine.weights(1 << 14))
        models.append(engine.rollout_copy.model)
    for model in models:
        assert not has_adapters(model)
        with torch.no_grad():
            scores = Policy(model).eval()(micro.batch, 0.7)[0]
        torch.testing.assert_close(scores, trained, rtol=1e-4, atol=1e-4)
    moved = {n for n, p in saved.named_parameters() if not torch.equal(p, before[n])}
    assert any("visual.merger" in name for name in moved) == (lora is WHOLE)
    if lora is WHOLE:
        targets = ("q_proj.weight", "v_proj.weight")
        assert all(name.endswith(targets) or "merger" in name for name in moved)


def test_bfloat16_adapters_keep_fp32_masters(tiny_folder):
    """Adapters are bfloat16 like their model; the optimiser's copies are not."""
    loaded = load(tiny_folder(), dtype="bfloat16")
    engine, *_ = _trained(loaded, zero_stage=2, bf16=True)
    assert {p.dtype for p in loaded.model.parameters()} == {torch.bfloat16}
    masters = [p for group in engine.optimizer.param_groups for p in group["params"]]
    assert masters and all(m.dtype == torch.float32 for m in masters)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_modules": ["q_proj", "nonsense"]}, "target_modules: 'nonsense' is no linear"),
        ({"target_modules": ["qkv"]}, r"target_modules: 'qkv' .*vision=false\); there are"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save: 'lm_head' is, or holds"),
        ({"modules_to_save": ["projector"]}, "modules_to_save: the model has no module"),
    ],
)
def test_layers_that_are_not_there_are_named(settings, message, tiny_folder):
    """An adapter on nothing, or on the head that the fused loss reads, is an error by its key."""
    with pytest.raises(ValueError, match=f"model.lora.{message}"):
        add_adapters(load(tiny_folder()).model, LoraSettings(**settings), 0)


def test_the_vision_tower_is_adapted_where_asked(tiny_folder):
    """`model.train_vision=true` adds its linear layers."""
    model = load(tiny_folder()).model
    add_adapters(model, LoraSettings(rank=2, vision=True), 0)
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    assert any("visual" in n for n in names) and any("language_model" in n for n in names)


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("lora")


@pytest.fixture(scope="module")
def start(from_cold_start, out) -> list[str]:
    return [*from_cold_start, f"output_dir={out}"]


@pytest.fixture(scope="module")
def trained(start, out) -> Path:
    """A run of three steps, and in its folder what `care-train export` makes of it."""
    more = ("model.lora.rank=4", "train.learning_rate=5e-3", "loss.kl_coef=0.1")
    assert main([*start, *more, "train.steps=3", "name=trained"]) == 0
    folder = out / "trained"
    assert main(["export", f"--run={folder}", f"--out={folder / 'merged'}"]) == 0
    assert main(["export", f"--run={folder}", f"--out={folder / 'adapter'}", "--adapter"]) == 0
    return folder


def test_merged_and_adapter_exports_are_one_model(start, trained):
    """transformers loads the merged folder, peft the adapter over its base: the same logits.

    `final/` and the newest checkpoint's export are the same file, bit for bit.
    """
    files = [trained / name / "model.safetensors" for name in ("final", "merged")]
    assert files[0].read_bytes() == files[1].read_bytes()
    weights = sum(p.stat().st_size for p in (trained / "adapter").iterdir())
    assert weights < files[0].stat().st_size / 5
    ids = torch.randint(10, 60, (2, 12), generator=torch.Generator().manual_seed(0))
    folders = (trained / "merged", model_of(start))
    merged, base = map(AutoModelForImageTextToText.from_pretrained, folders)
    with torch.no_grad():
        wanted, before = merged(input_ids=ids).logits, base(input_ids=ids).logits
        adapted = peft.PeftModel.from_pretrained(base, trained / "adapter")
        logits = adapted(input_ids=ids).logits
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)
    assert (before - wanted).abs().max() > 1e-2


def test_a_cold_start_trains_adapters(start, out, monkeypatch):
    """`care-train sft` with LoRA goes on learning from a model, and leaves it merged, and its
    optimiser's memory to what comes next."""
    close, closed = PolicyEngine.close, []
    monkeypatch.setattr(PolicyEngine, "close", lambda self: closed.append(close(self)))
    more = ["name=warm", *COLD_START, "sft.steps=30", "model.lora.rank=8"]
    assert main(["sft", *start[1:], *more]) == 0
    assert len(closed) == 1
    losses = [record["loss"] for record in timeless(out / "warm")]
    assert losses[-1] < 0.9 * losses[0]
    before, after = (
        load_file(folder / "model.safetensors") for folder in (model_of(start), out / "warm/final")
    )
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys() and moved
    assert all("language_model" in name or "layers" in name for name in moved)
