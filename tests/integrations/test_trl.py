"""A GRPOTrainer on these kernels computes what TRL alone does."""

import copy
import logging
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("trl", reason="trl is not installed: pip install 'trl>=1.16,<1.17'")

from trl import GRPOTrainer

from care_kernels.integrations import trl as integration
from care_kernels.integrations.trl import choose_path, use_care_kernels
from tests.integrations.trl_runs import (
    build_trainer,
    loss_and_gradients,
    micro_batch,
    tie_often,
    train,
)

# Two float32 computations of the same sums in another order.
CLOSE = {"rtol": 2e-5, "atol": 2e-6}

K3 = {"beta": 0.1, "use_bias_correction_kl": False}
SEQUENCE = {"importance_sampling_level": "sequence", "loss_type": "grpo"}
# Each loss type, and each option with one of them.
FUSED: list[dict[str, Any]] = [
    {},
    *({"loss_type": name} for name in ("grpo", "dr_grpo")),
    {"loss_type": "bnpo", "temperature": 0.7},
    K3 | {"loss_type": "grpo", "entropy_coef": 0.05},
    SEQUENCE | {"loss_type": "luspo"},
    SEQUENCE | K3 | {"use_bias_correction_kl": True},
    {"loss_type": "cispo", "epsilon_high": 1.02},
    SEQUENCE | {"loss_type": "sapo", "beta": 0.1},
    {"delta": 1.2},
    {"delta": 1.02, "epsilon_high": 0.3},
]
LOG_PROBS: list[dict[str, Any]] = [
    {"loss_type": "vespo"},
    {"delta": 0.9},
    {"top_entropy_quantile": 0.4},
    {"off_policy_mask_threshold": 0.05},
    {"use_adaptive_entropy": True, "entropy_target": 10.0, "entropy_coef": 0.05},
]


def _name(settings: dict[str, Any]) -> str:
    return ",".join(f"{key}={value}" for key, value in settings.items()) or "defaults"


@pytest.fixture
def pair(tiny_folder, tmp_path):
    """TRL's trainer and one on these kernels, from the same settings."""

    def build(kind: str = "tiny-qwen2", path: str | None = None, **settings: Any):
        plain = build_trainer(tiny_folder(kind), tmp_path, **settings)
        ours = build_trainer(tiny_folder(kind), tmp_path, **settings)
        return plain, ours, use_care_kernels(ours, path)

    return build


def _assert_same(plain: GRPOTrainer, ours: GRPOTrainer, batch: dict[str, torch.Tensor]) -> None:
    loss, gradients, metrics = loss_and_gradients(plain, batch)
    our_loss, our_gradients, our_metrics = loss_and_gradients(ours, batch)
    torch.testing.assert_close(our_loss, loss, **CLOSE)
    torch.testing.assert_close(our_gradients, gradients, **CLOSE)
    assert our_metrics.keys() == metrics.keys()
    assert our_metrics == pytest.approx(metrics, rel=CLOSE["rtol"], abs=CLOSE["atol"])


@pytest.mark.parametrize("settings", FUSED, ids=_name)
def test_fused_loss_gradients_and_metrics(settings, pair):
    """Each option the fused loss expresses: TRL's loss, gradients and metrics to round-off."""
    plain, ours, choice = pair(**settings)
    assert choice.path == "fused"
    _assert_same(plain, ours, micro_batch(plain))


@pytest.mark.parametrize("settings", [SEQUENCE, *LOG_PROBS], ids=_name)
def test_log_prob_loss_gradients_and_metrics(settings, pair):
    """The options that need TRL's own formula, and one that does not, on the other path."""
    plain, ours, choice = pair(path="log_probs" if settings is SEQUENCE else None, **settings)
    assert choice.path == "log_probs"
    _assert_same(plain, ours, micro_batch(plain))


@pytest.mark.parametrize("path", ["fused", "log_probs"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_sampler_correction_tool_mask_and_token_advantages(path, level, pair):
    """What only some set-ups put into a micro-batch: vLLM's ratios, tools, [B, T] advantages."""
    plain, ours, _ = pair(path=path, importance_sampling_level=level, loss_type="grpo")
    generator = torch.Generator().manual_seed(1)
    batch = micro_batch(
        plain,
        importance_sampling_ratio=2 * torch.rand(4, 6, generator=generator),
        tool_mask=torch.tensor([[1, 1, 0, 0, 1, 1]] * 4),
        advantages=torch.randn(4, 6, generator=generator),
    )
    plain.use_vllm = ours.use_vllm = True
    assert plain.vllm_importance_sampling_correction
    _assert_same(plain, ours, batch)


@pytest.mark.parametrize("path", ["fused", "log_probs"])
def test_on_policy_and_empty_micro_batches(path, pair):
    """Without old log-probs every ratio is 1; with nothing to train on the gradient is zero."""
    plain, ours, _ = pair(path=path)
    batch = micro_batch(plain)
    del batch["old_per_token_logps"]
    _assert_same(plain, ours, batch)
    _assert_same(plain, ours, batch | {"advantages": torch.zeros(4)})
    empty = batch | {"completion_mask": torch.zeros(4, 6, dtype=torch.long)}
    loss, gradients, _ = loss_and_gradients(ours, empty)
    assert loss == 0 and not any(gradient.any() for gradient in gradients.values())


VESPO = {"beta": 0.05, "loss_type": "vespo"}


@pytest.mark.parametrize(
    ("path", "kind", "settings"),
    [
        ("fused", "tiny-qwen2", {"beta": 0.05}),
        ("fused", "tiny-qwen2", {"reward": tie_often}),
        ("fused", "tiny-qwen3-vl", {}),
        ("log_probs", "tiny-qwen2.5-vl", VESPO),
    ],
    ids=["TRL's default KL", "zero advantages", "images", "images by log-probs"],
)
def test_training_run(path, kind, settings, tiny_folder, tmp_path):
    """Two updates on each batch: losses, gradient norms, metrics and weights as without us."""
    settings = {"num_iterations": 2, "steps_per_generation": 2, "max_steps": 4} | settings
    metrics, weights = train(tiny_folder(kind), tmp_path, None, **settings)
    our_metrics, our_weights = train(tiny_folder(kind), tmp_path, path, **settings)
    assert len(metrics) == 4
    if "loss_type" not in settings:
        assert any(entry["clip_ratio/region_mean"] > 0 for entry in metrics)
    for ours, theirs in zip(our_metrics, metrics, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)
    torch.testing.assert_close(our_weights, weights, rtol=1e-4, atol=1e-6)


def test_everything_else_is_trls(pair):
    """Without gradients the fused trainer evaluates TRL's loss; a plain forward has logits; a deep
    copy of the model (a reference, an average of weights) answers by its own weights."""
    plain, ours, _ = pair()
    batch = micro_batch(plain)
    losses = []
    for trainer in (plain, ours):
        trainer.model.eval()
        with torch.no_grad():
            losses.append(trainer.compute_loss(trainer.model, dict(batch)))
    torch.testing.assert_close(losses[1], losses[0], **CLOSE)
    labelled = {"input_ids": batch["prompt_ids"], "labels": batch["prompt_ids"]}
    outputs = [trainer.model(**labelled) for trainer in (plain, ours)]
    assert torch.equal(outputs[0].logits, outputs[1].logits)
    assert torch.equal(outputs[0].loss, outputs[1].loss)
    copied = copy.deepcopy(ours.model)
    with torch.no_grad():
        for model in (copied, plain.model):
            for parameter in model.parameters():
                parameter.mul_(0.5)
        torch.testing.assert_close(copied(**labelled).logits, plain.model(**labelled).logits)


def test_router_loss(tiny_folder, tmp_path):
    """A mixture of experts keeps its load-balancing loss."""
    from transformers import AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM

    folder = tiny_folder("tiny-qwen2")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "head_dim": 16, "num_experts": 4}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "moe_intermediate_size": 16}
    sizes |= {"vocab_size": len(AutoTokenizer.from_pretrained(folder)), "num_experts_per_tok": 2}
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes))
    # Models of their own: what is put before the forward of one must not serve the other.
    plain, ours = (
        build_trainer(folder, tmp_path, model=copy.deepcopy(model), router_aux_loss_coef=0.1)
        for _ in range(2)
    )
    choice = use_care_kernels(ours)
    assert choice.path == "log_probs" and "router" in choice.reason
    _assert_same(plain, ours, micro_batch(plain))


def test_subclass_with_its_own_loss_keeps_it(tiny_folder, tmp_path, caplog):
    """An overridden `_compute_loss` runs on our log-probs; one line of the log says why."""

    class Doubled(GRPOTrainer):
        def _compute_loss(self, model, inputs):
            return 2 * super()._compute_loss(model, inputs)

    plain, ours = (
        build_trainer(tiny_folder("tiny-qwen2"), tmp_path, trainer_class=Doubled) for _ in range(2)
    )
    with caplog.at_level(logging.INFO, logger=integration.__name__):
        use_care_kernels(ours)
    (message,) = (r.getMessage() for r in caplog.records if r.name == integration.__name__)
    assert "log_probs" in message and "Doubled" in message
    _assert_same(plain, ours, micro_batch(plain))


@pytest.mark.parametrize("settings", [{"beta": 0.1}, {"loss_type": "vespo"}], ids=_name)
def test_bfloat16_autocast(settings, pair):
    """TRL's default, float32 weights under bf16 autocast: TRL's loss and gradients to bfloat16."""
    plain, ours, _ = pair(bf16=True, **settings)
    batch = micro_batch(plain)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, gradients, _ = loss_and_gradients(plain, batch)
        our_loss, our_gradients, _ = loss_and_gradients(ours, batch)
    torch.testing.assert_close(our_loss, loss, rtol=2e-2, atol=2e-3)
    for name, gradient in gradients.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(our_gradients[name], gradient, rtol=0, atol=0.05 * scale + 1e-6)


def test_disagreement_with_trl_stops_the_run(pair, monkeypatch):
    """A term read differently from TRL is an error, not a silently different run."""
    plain, ours, _ = pair()
    terms = integration.policy_terms

    def misread(trainer, inputs):
        result = terms(trainer, inputs)
        result.per_token["advantages"] = 1.5 * result.per_token["advantages"]
        return result

    monkeypatch.setattr(integration, "policy_terms", misread)
    with pytest.raises(RuntimeError, match=r"fused loss .* path='log_probs'"):
        loss_and_gradients(ours, micro_batch(plain))


def test_errors_name_what_came(tiny_folder, tmp_path, monkeypatch):
    """Versions, paths, options and heads that cannot be."""
    trainer = build_trainer(tiny_folder("tiny-qwen2"), tmp_path, loss_type="vespo")
    with pytest.raises(ValueError, match=r"'fused' with loss_type='vespo' .*grpo, bnpo"):
        use_care_kernels(trainer, "fused")
    with pytest.raises(ValueError, match="path: got 'fast'"):
        choose_path(trainer, "fast")
    with pytest.raises(ValueError, match="got object; wanted a GRPOTrainer"):
        use_care_kernels(object())  # pyright: ignore[reportArgumentType]
    quantised = nn.Linear(2, 2)
    quantised.weight = nn.Parameter(torch.zeros(2, 2, dtype=torch.uint8), requires_grad=False)
    trainer.model.lm_head = quantised
    with pytest.raises(ValueError, match=r"Parameter of torch\.uint8; .*dequantise the head"):
        use_care_kernels(trainer)
    monkeypatch.setattr(integration.trl, "__version__", "1.9.2")
    with pytest.raises(ValueError, match=r"trl: got version 1\.9\.2; wanted 1\.16\.x"):
        use_care_kernels(trainer)
