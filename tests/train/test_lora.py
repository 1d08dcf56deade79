"""LoRA: adapters alone are trained, the model without them is the reference, merged they leave."""

import copy

import pytest
import torch

from care_train.config import DeepSpeedSettings, LoraSettings, ModelSettings
from care_train.distributed import initialize_process_group
from care_train.models.load import load_model
from care_train.models.lora import add_adapters, has_adapters
from care_train.models.policy import Policy
from care_train.rollout.transformers_engine import TransformersEngine
from care_train.training.checkpoint import save_model
from care_train.training.engine import MicroBatch, PolicyEngine
from care_train.training.log_probs import FrozenCopy, WithoutAdapters
from care_train.training.optimizer import OptimizerSettings
from tests.train.builders import load, random_sequences

LORA = LoraSettings(rank=4, alpha=8.0)
ADVANTAGES = (1.0, -0.5, 2.0, -1.0, 0.25, 1.5)


def _engine(loaded, lora=LORA, *, zero_stage=0, seed=0):
    optimizer = OptimizerSettings(learning_rate=2e-2, total_steps=10)
    return PolicyEngine(
        loaded,
        optimizer,
        DeepSpeedSettings(zero_stage=zero_stage),
        initialize_process_group(),
        lora=lora,
        seed=seed,
    )


def _micro(engine):
    sequences = random_sequences(engine.loaded)
    lengths = torch.tensor([len(s.response_ids) for s in sequences])
    rows = torch.repeat_interleave(torch.tensor(ADVANTAGES), lengths) / lengths.sum()
    return MicroBatch(engine.collate(sequences), {"advantages": rows})


@pytest.mark.parametrize("kind", ["tiny-qwen2.5-vl", "tiny-qwen3-vl", "tiny-qwen2"])
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
    micro = _micro(engine)
    with torch.no_grad():
        assert torch.equal(engine.log_probs(micro.batch, 1.0)[0], plain(micro.batch)[0])
    trained = {n for n, p in loaded.model.named_parameters() if p.requires_grad}
    assert trained == {f"{n}.lora_{part}.default.weight" for n in linears for part in "AB"}
    engine.step([micro], 1.0)
    after = {n.replace(".base_layer", ""): p for n, p in loaded.model.named_parameters()}
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    moved = [n for n in trained if "lora_B" in n and after[n].abs().max() > 1e-3]
    assert len(moved) == len(linears)


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_the_reference_is_the_model_without_adapters(zero_stage, tiny_folder):
    """After training: bit for bit what a copy made before says; then adapters are on again."""
    loaded = load(tiny_folder())
    copied = FrozenCopy(loaded.model)
    engine = _engine(loaded, zero_stage=zero_stage)
    micro = _micro(engine)
    engine.step([micro], 1.0)
    trained = engine.log_probs(micro.batch, 0.7)[0]
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


@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_merged_weights_leave_the_engine(zero_stage, tiny_folder, tmp_path):
    """To rollouts under ZeRO-3 and to disk: a plain model that computes as the adapted one."""
    loaded = load(tiny_folder())
    engine = _engine(loaded, zero_stage=zero_stage)
    micro = _micro(engine)
    engine.step([micro], 1.0)
    trained = engine.log_probs(micro.batch, 1.0)[0]
    save_model(engine, tmp_path / "final")
    models = [load_model(ModelSettings(path=str(tmp_path / "final"))).model]
    if engine.rollout_is_copy:
        TransformersEngine(engine.rollout, 8, is_copy=True).sync(engine.weights(1 << 14))
        models.append(engine.rollout.model)
    for model in models:
        assert not has_adapters(model)
        with torch.no_grad():
            scores = Policy(model).eval()(micro.batch)[0]
        torch.testing.assert_close(scores, trained, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_a_checkpoint_holds_adapters_and_their_optimizer(zero_stage, tiny_folder, tmp_path):
    """Saved, loaded into an engine with other first adapters, stepped: the same bits."""
    engines = []
    for seed in (0, 1):
        engines.append(_engine(load(tiny_folder()), zero_stage=zero_stage, seed=seed))
        engines[-1].step([_micro(engines[-1])], 1.0)
    first, second = engines
    first.save_state(tmp_path / "saved")
    second.load_state(tmp_path / "saved")
    for engine in engines:
        engine.step([_micro(engine)], 1.0)
    ours, theirs = ({n: t.clone() for n, t in e.weights(1 << 20)} for e in engines)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert first.learning_rate == second.learning_rate


def test_bfloat16_adapters_keep_fp32_masters(tiny_folder):
    """Adapters are bfloat16 like their model; the optimiser's copies are not."""
    loaded = load_model(ModelSettings(path=str(tiny_folder()), dtype="bfloat16"))
    engine = PolicyEngine(
        loaded,
        OptimizerSettings(learning_rate=1e-3, total_steps=10),
        DeepSpeedSettings(zero_stage=2),
        initialize_process_group(),
        bf16=True,
        lora=LORA,
    )
    engine.step([_micro(engine)], 1.0)
    assert {p.dtype for p in loaded.model.parameters()} == {torch.bfloat16}
    groups = engine.optimizer.param_groups
    masters = [parameter for group in groups for parameter in group["params"]]
    assert masters and all(m.dtype == torch.float32 for m in masters)


def test_modules_may_be_trained_whole(tiny_folder, tmp_path):
    """`modules_to_save`: the merger moves with the adapters, and both reach the folder."""
    lora = LoraSettings(rank=2, target_modules=["q_proj", "v_proj"], modules_to_save=["merger"])
    loaded = load(tiny_folder())
    before = {name: p.clone() for name, p in loaded.model.named_parameters()}
    engine = _engine(loaded, lora)
    micro = _micro(engine)
    engine.step([micro], 1.0)
    trained = engine.log_probs(micro.batch, 1.0)[0]
    with engine.without_adapters():
        untouched = engine.log_probs(micro.batch, 1.0)[0]
    save_model(engine, tmp_path / "final")
    saved = load_model(ModelSettings(path=str(tmp_path / "final"))).model
    moved = {n for n, p in saved.named_parameters() if not torch.equal(p, before[n])}
    assert any("visual.merger" in name for name in moved)
    assert all(name.split(".")[-2] in ("q_proj", "v_proj") or "merger" in name for name in moved)
    with torch.no_grad():
        scores = Policy(saved).eval()(micro.batch)[0]
        plain = Policy(load(tiny_folder()).model).eval()(micro.batch)[0]
    torch.testing.assert_close(scores, trained, rtol=1e-4, atol=1e-4)
    assert torch.equal(untouched, plain)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_modules": ["q_proj", "nonsense"]}, "target_modules: 'nonsense' is no linear"),
        ({"target_modules": ["lm_head"]}, "target_modules: 'lm_head' is no linear"),
        ({"target_modules": ["qkv"]}, r"vision=false\); there are down_proj"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save: 'lm_head' is, or holds"),
        ({"modules_to_save": ["projector"]}, "modules_to_save: the model has no module"),
    ],
)
def test_layers_that_are_not_there_are_named(settings, message, tiny_folder):
    """An adapter on nothing, or on the head that the fused loss reads, is an error by its key."""
    with pytest.raises(ValueError, match=f"model.lora.{message}"):
        add_adapters(load(tiny_folder()).model, LoraSettings(**settings), 0)


def test_the_vision_tower_is_adapted_where_asked(tiny_folder):
    """`vision: true` adds its linear layers."""
    model = load(tiny_folder()).model
    add_adapters(model, LoraSettings(rank=2, vision=True), 0)
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    assert any("visual" in n for n in names) and any("language_model" in n for n in names)
