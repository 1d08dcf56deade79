"""What reads the output head, apart from any trainer."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from care_kernels import linear_log_probs


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
