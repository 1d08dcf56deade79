"""The optimiser step: gradients, schedule, ZeRO stages, updates that are not finite."""

import copy
import gc
import math
import weakref

import pytest
import torch
import yaml
from deepspeed.ops.adam import DeepSpeedCPUAdam

from care_train.config import ModelSettings
from care_train.models.load import LoadedModel, load_model
from care_train.models.policy import Policy
from care_train.training.engine import MicroBatch
from care_train.training.failures import NotFiniteError
from tests.kernels import oracle
from tests.train.builders import (
    assert_same_weights,
    load,
    make_config,
    make_engine,
    micro_batch,
    random_sequences,
    whole_weights,
)
from tests.train.runs import ROOT

LEARNING_RATE = 1e-2


def test_one_step_is_adamw_on_the_reference_gradient(tiny_folder):
    """Eq. 12's gradient through DeepSpeed and the fused loss equals autograd's on full logits."""
    loaded = load(tiny_folder())
    plain = copy.deepcopy(loaded.model)
    engine = make_engine(loaded)
    micro = micro_batch(engine)

    policy = Policy(plain)
    rows = policy.hidden_states(micro.batch).flatten(0, 1)[micro.batch.rows]
    loss = oracle.reference_policy_loss(
        rows, policy.head.weight, micro.batch.target_ids, micro.loss_arguments["advantages"]
    ).loss
    loss.backward()
    optimizer = torch.optim.AdamW(plain.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    gradients = {n: p.grad.clone() for n, p in plain.named_parameters() if p.grad is not None}
    optimizer.step()

    result = engine.step([micro], temperature=1.0)
    norm = torch.nn.utils.get_total_norm(gradients.values())
    assert result.grad_norm == pytest.approx(float(norm), rel=1e-4)
    for name, parameter in plain.named_parameters():
        if name in gradients:
            # AdamW's first step is the gradient's sign: compare where it is not rounding noise.
            clear = gradients[name].abs() > 1e-6
            trained = loaded.model.get_parameter(name)
            torch.testing.assert_close(trained[clear], parameter[clear], rtol=1e-4, atol=1e-5)


def test_gradients_are_clipped_to_the_norm(tiny_folder):
    """Read off AdamW's first moment, which after one step is a tenth of the clipped gradient."""
    engine = make_engine(load(tiny_folder()), max_grad_norm=0.01)
    assert engine.step([micro_batch(engine)], 1.0).grad_norm > 0.01
    moments = [state["exp_avg"] for state in engine.optimizer.state.values()]
    clipped = torch.nn.utils.get_total_norm(moments) / 0.1
    assert float(clipped) == pytest.approx(0.01, rel=1e-2)


def test_the_schedule_warms_up_and_decays(tiny_folder):
    """Linear warm-up over 2 steps, then a cosine to 0 at total_steps."""
    loaded = load(tiny_folder("tiny-qwen2"))
    engine = make_engine(loaded, warmup_steps=2, schedule="cosine")
    micro, rates = micro_batch(engine, random_sequences(loaded, 1), [1.0]), []
    for _ in range(10):
        rates.append(engine.learning_rate / LEARNING_RATE)
        engine.step([micro], 1.0)
    assert rates[:3] == pytest.approx([0.5, 1.0, 1.0])
    assert rates[6] == pytest.approx(0.5)
    assert engine.learning_rate == pytest.approx(0.0, abs=1e-12)


def test_the_log_normaliser_comes_with_the_log_probs(tiny_folder):
    """One forward gives both: log sum exp of the rows' logits at the temperature."""
    loaded = load(tiny_folder())
    engine = make_engine(loaded)
    batch = micro_batch(engine).batch
    alone, _ = engine.log_probs(batch, 0.7)
    both, _ = engine.log_probs(batch, 0.7, with_log_normalizer=True)
    logits = loaded.model.get_output_embeddings()(engine.rows(batch)).float() / 0.7
    assert torch.equal(both[:, 0], alone)
    torch.testing.assert_close(both[:, 1], logits.logsumexp(1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("zero_stage", [0, 1, 3])
def test_the_first_bfloat16_update_is_the_learning_rate(zero_stage, tiny_folder):
    """AdamW's first step moves each fp32 master weight by the learning rate, its decay once.

    DeepSpeed's optimiser for bfloat16 under ZeRO-0 would begin with a step on zero gradients.
    """
    loaded = load(tiny_folder(), dtype="bfloat16")
    head = loaded.model.lm_head.weight.detach().float().clone()
    engine = make_engine(
        loaded, zero_stage=zero_stage, bf16=True, weight_decay=0.1, max_grad_norm=1.0
    )
    engine.step([micro_batch(engine)], 1.0)
    moved = dict(engine.weights(1 << 20))["lm_head.weight"].float() - head * (1 - 1e-3)
    # Half of bfloat16's step at these weights.
    assert float(moved.abs().median()) == pytest.approx(1e-2, abs=5e-4)


@pytest.mark.parametrize(("zero_stage", "bf16"), [(0, False), (0, True), (1, False), (3, True)])
def test_a_closed_engine_holds_no_optimiser(zero_stage, bf16, tiny_folder):
    """Its states and master weights are gone although the model, whose parameters DeepSpeed ties to
    its engine, is not: the last evaluation needs the memory."""
    loaded = load(tiny_folder(), dtype="bfloat16" if bf16 else "float32")
    engine = make_engine(loaded, zero_stage=zero_stage, bf16=bf16)
    engine.step([micro_batch(engine)], 1.0)
    held = [tensor for state in engine.optimizer.state.values() for tensor in state.values()]
    if zero_stage or bf16:
        held += [p for group in engine.optimizer.param_groups for p in group["params"]]
    kept = [weakref.ref(tensor) for tensor in held if isinstance(tensor, torch.Tensor)]
    del held
    engine.close()
    gc.collect()
    assert kept and not any(one() is not None for one in kept)
    assert all(p.isfinite().all() for p in loaded.model.to("cpu").parameters())


OFFLOAD = "configs/deepspeed/zero3_offload.yaml"


@pytest.mark.parametrize(
    "own_adam",
    # DeepSpeed's is built by the C++ compiler at first use: a minute or two.
    [False, pytest.param(True, marks=[pytest.mark.slow, pytest.mark.timeout(900)])],
    ids=["torch", "deepspeed"],
)
def test_offload_takes_the_same_steps(own_adam, tiny_folder, tmp_path):
    """The shipped zero3_offload, with either AdamW, beside ZeRO-0; and its checkpoint resumes."""
    section = yaml.safe_load((ROOT / OFFLOAD).read_text())
    more = {} if own_adam else {"zero_force_ds_cpu_optimizer": False}
    offload = {"deepspeed": {"zero_stage": 3, "config": section["config"] | more}}
    assert make_config(offload).deepspeed.offloads("optimizer")
    engines = [
        make_engine(load(tiny_folder()), values, learning_rate=1e-3, max_grad_norm=1.0)
        for values in ({}, offload, offload)
    ]
    assert isinstance(engines[1].optimizer, DeepSpeedCPUAdam) == own_adam
    before = {n: p.detach() for n, p in load(tiny_folder()).model.named_parameters()}
    for engine in engines[:2]:
        for _ in range(2):
            engine.step([micro_batch(engine)], 1.0)
    engines[1].save_state(tmp_path)
    engines[2].load_state(tmp_path)
    plain, offloaded, loaded = ({n: t.clone() for n, t in e.weights(1 << 20)} for e in engines)
    apart = sum(float((plain[n] - offloaded[n]).square().sum()) for n in plain)
    moved = sum(float((plain[n] - before[n]).square().sum()) for n in plain)
    # As far apart as orders of summation make them: see test_trajectory.
    assert (apart / moved) ** 0.5 < 1e-4
    assert_same_weights(offloaded, loaded)
    engines[1].close()
    assert hasattr(engines[1].optimizer, "ds_opt_adam") == own_adam  # which its `__del__` frees


@pytest.mark.parametrize(
    ("zero_stage", "bf16", "spoil"),
    [(0, False, "loss"), (1, True, "gradient"), (2, True, "loss"), (3, False, "gradient")],
)
def test_what_is_not_finite_updates_nothing(zero_stage, bf16, spoil, tiny_folder, caplog):
    """NaN in the loss or in a gradient alone: left out as often as allowed, then an error that
    names the first bad number; and the next good update is as if there had been none."""
    settings = {"max_skipped_updates": 2, "zero_stage": zero_stage, "bf16": bf16}
    settings |= {"max_grad_norm": 1.0}

    def fresh() -> LoadedModel:
        dtype = "bfloat16" if bf16 else "float32"
        return load_model(ModelSettings(path="x", dtype=dtype), tiny_folder("tiny-qwen2"))

    engine = make_engine(fresh(), **settings)
    before = whole_weights(engine)
    sequences = random_sequences(engine.loaded, 1)
    good = micro_batch(engine, sequences, [1.0])
    if spoil == "gradient":
        bad, where = good, "in the gradient"
        weight = next(engine.loaded.model.parameters())
        hook = weight.register_hook(lambda gradient: gradient * math.nan)
    else:
        bad = micro_batch(engine, sequences, [math.nan])
        bad = MicroBatch(bad.batch, bad.loss_arguments, ("rows.jsonl: row 7",))
        where = "advantages is nan at response token 0 of rows.jsonl: row 7, on rank 0"
        hook = None
    for _ in range(2):
        assert not engine.step([good, bad], 1.0).applied
    assert "2 of 2 allowed" in caplog.text and where in caplog.text
    with pytest.raises(NotFiniteError, match="no update was made") as error:
        engine.step([good, bad], 1.0)
    assert where in str(error.value)
    assert_same_weights(whole_weights(engine), before)
    if hook is not None:
        hook.remove()
    other = make_engine(fresh(), **settings)
    assert all(one.step([good, good], 1.0).applied for one in (engine, other))
    assert_same_weights(whole_weights(engine), whole_weights(other))
