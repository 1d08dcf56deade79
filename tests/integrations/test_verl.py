"""verl's fused head in its convention, and a head that is gathered for its backward."""

import subprocess
import sys
import textwrap
import types
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from care_kernels import linear_log_probs
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


@pytest.mark.parametrize("with_entropy", [True, False])
@pytest.mark.parametrize("frozen", [(), (1,), (0, 2)], ids=str)
def test_a_weight_that_is_gathered_for_the_backward(with_entropy, frozen):
    """As under ZeRO-3: the head is empty between forward and backward; the gradients are those of
    one that stays."""
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(shape, generator=generator) for shape in ((7, 6), (19, 6), (19,))]
    hidden, weight, bias = (x.requires_grad_(i not in frozen) for i, x in enumerate(inputs))
    whole = weight.detach().clone()
    target_ids = torch.randint(0, 19, (7,), generator=generator)
    upstream = torch.randn(2, 7, generator=generator)
    upstream[:, 3] = 0

    @contextmanager
    def gathered(weight: Tensor, bias: Tensor) -> Iterator[None]:
        weight.data = whole
        yield
        weight.data = torch.empty(0)

    def gradients(is_parted):
        weight.data = whole
        found = linear_log_probs(
            hidden,
            weight,
            target_ids,
            bias=bias,
            return_entropy=with_entropy,
            temperature=0.8,
            logit_softcap=2.0,
            logit_scale=1.5,
            gathered=gathered if is_parted else None,
        )
        log_probs, *entropy = found if with_entropy else (found,)
        loss = (upstream[0] * log_probs).sum() + sum((upstream[1] * x).sum() for x in entropy)
        if is_parted:
            weight.data = torch.empty(0)
        return torch.autograd.grad(loss, [x for x in (hidden, weight, bias) if x.requires_grad])

    torch.testing.assert_close(gradients(True), gradients(False), rtol=0, atol=0)
