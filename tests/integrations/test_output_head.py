"""What reads the output head, apart from any trainer."""

import pytest
import torch

from care_kernels import linear_log_probs
from care_kernels.integrations.transformers import GatheringLogProbs


@pytest.mark.parametrize("with_entropy", [True, False])
@pytest.mark.parametrize("frozen", [(), (1,), (0, 2)], ids=str)
def test_gathering_log_probs_are_linear_log_probs(with_entropy, frozen):
    """What runs under ZeRO-3 gives the values and gradients of `linear_log_probs`."""
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(shape, generator=generator) for shape in ((7, 6), (19, 6), (19,))]
    hidden, weight, bias = (x.requires_grad_(i not in frozen) for i, x in enumerate(inputs))
    target_ids = torch.randint(0, 19, (7,), generator=generator)
    upstream = torch.randn(2, 7, generator=generator)
    upstream[:, 3] = 0
    options = {"temperature": 0.8, "logit_softcap": 2.0, "logit_scale": 1.5}

    def gradients(log_probs, entropy):
        loss = (upstream[0] * log_probs).sum()
        if with_entropy:
            loss = loss + (upstream[1] * entropy).sum()
        return torch.autograd.grad(loss, [x for x in (hidden, weight, bias) if x.requires_grad])

    plain = linear_log_probs(
        hidden, weight, target_ids, bias=bias, return_entropy=with_entropy, **options
    )
    plain = plain if with_entropy else (plain, None)
    ours = GatheringLogProbs.apply(hidden, weight, bias, target_ids, with_entropy, options)
    torch.testing.assert_close(ours[0], plain[0], rtol=0, atol=0)
    torch.testing.assert_close(gradients(*ours), gradients(*plain), rtol=1e-5, atol=1e-6)
