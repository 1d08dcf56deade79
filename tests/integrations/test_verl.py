"""verl's fused head: log-probs and entropies of torch's full softmax, in verl's convention."""

import subprocess
import sys

import pytest
import torch

from care_kernels.integrations.verl import FusedLinearForPPO


def _inputs(*lead: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(*lead, 8, generator=generator, requires_grad=True)
    weight = torch.randn(50, 8, generator=generator, requires_grad=True)
    return hidden, weight, torch.randint(0, 50, lead, generator=generator)


def _by_softmax(hidden, weight, input_ids, temperature):
    if torch.is_tensor(temperature) and temperature.numel() > 1:
        temperature = temperature.view(*input_ids.shape, 1)
    every = torch.log_softmax(hidden @ weight.T / temperature, -1)
    log_probs = every.gather(-1, input_ids.unsqueeze(-1)).squeeze(-1)
    return log_probs, -(every.exp() * every).sum(-1)


@pytest.mark.parametrize("lead", [(12,), (3, 4), (1, 12)], ids=str)
@pytest.mark.parametrize(
    "temperature",
    [1.0, 0.6, torch.tensor(0.6), torch.linspace(0.5, 1.5, 12)],
    ids=["1", "0.6", "tensor", "per token"],
)
def test_values_and_gradients_are_torchs(lead, temperature):
    """Both results and their gradients, for packed and batched tokens."""
    hidden, weight, input_ids = _inputs(*lead)
    results = []
    for compute in (_by_softmax, FusedLinearForPPO(chunk_size=512)):
        log_probs, entropy = compute(hidden, weight, input_ids, temperature)
        assert log_probs.shape == entropy.shape == lead
        mixed = (log_probs * torch.linspace(-1, 1, 12).view(lead)).sum() + 0.3 * entropy.sum()
        results.append((log_probs, entropy, *torch.autograd.grad(mixed, (hidden, weight))))
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-5)


def test_bfloat16_comes_back_in_float32():
    """Half-precision hidden states give float32 log-probs and entropies."""
    hidden, weight, input_ids = _inputs(6)
    results = FusedLinearForPPO()(hidden.bfloat16(), weight.bfloat16(), input_ids)
    assert [result.dtype for result in results] == [torch.float32, torch.float32]


def test_shapes_that_do_not_fit():
    """The error names the argument, what came and what was wanted."""
    hidden, weight, input_ids = _inputs(2, 3)
    with pytest.raises(ValueError, match=r"input_ids: got shape \(6,\); wanted \(2, 3\)"):
        FusedLinearForPPO()(hidden, weight, input_ids.flatten())
    with pytest.raises(ValueError, match=r"temperature: got shape \(2,\); wanted one number"):
        FusedLinearForPPO()(hidden, weight, input_ids, torch.ones(2))


@pytest.mark.parametrize("module", ["care_kernels", "care_kernels.integrations.verl"])
def test_trainers_stay_unimported(module):
    """The package and verl's module need torch alone: no trainer is loaded on the way."""
    script = f"import sys, {module}; print({{'trl', 'transformers', 'verl'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr
