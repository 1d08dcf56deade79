"""verl's fused head in its convention."""

import subprocess
import sys
import textwrap
import types

import pytest
import torch

from care_kernels.integrations import verl as integration
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


@pytest.mark.parametrize(
    ("lead", "temperature"),
    [((12,), 1.0), ((3, 4), torch.tensor(0.6)), ((1, 12), torch.linspace(0.5, 1.5, 12))],
    ids=["packed", "batched", "a temperature per token"],
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
    halves = FusedLinearForPPO()(hidden.bfloat16(), weight.bfloat16(), input_ids)
    assert [result.dtype for result in halves] == [torch.float32, torch.float32]


def test_shapes_that_do_not_fit():
    """The error names the argument, what came and what was wanted."""
    hidden, weight, input_ids = _inputs(2, 3)
    with pytest.raises(ValueError, match=r"input_ids: got shape \(6,\); wanted \(2, 3\)"):
        FusedLinearForPPO()(hidden, weight, input_ids.flatten())
    with pytest.raises(ValueError, match=r"temperature: got shape \(2,\); wanted one number"):
        FusedLinearForPPO()(hidden, weight, input_ids, torch.ones(2))


def test_the_documented_module_puts_it_into_verl(monkeypatch):
    """The example in the module's docstring, where verl looks for its own class; it is called as
    verl's patched forwards do. No trainer is loaded on the way."""
    place = "verl.utils.experimental.torch_functional"
    for name in ("verl", "verl.utils", "verl.utils.experimental", place):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    lines = (integration.__doc__ or "").splitlines()
    exec(textwrap.dedent("\n".join(line for line in lines if line.startswith("    "))), {})
    hidden, weight, input_ids = _inputs(1, 5)
    log_probs, entropy = (
        sys.modules[place]
        .FusedLinearForPPO(impl_backend="torch")
        .forward(hidden_states=hidden, vocab_weights=weight, input_ids=input_ids, temperature=0.7)
    )
    assert log_probs.shape == entropy.shape == (1, 5)
    name = integration.__name__
    script = f"import sys, {name}; print({{'trl', 'transformers', 'verl'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr
