"""Wrong arguments: ValueError that names the argument, what came and what was wanted."""

from typing import Any

import pytest
import torch

from care_kernels import VocabShard, linear_log_probs, linear_policy_loss
from tests.kernels.cases import policy_case, with_kl

ROWS = torch.zeros(63)


def shard_of(start: int, vocab_size: int) -> VocabShard:
    """A part that is refused before its group is asked anything."""
    return VocabShard(None, start, vocab_size)  # pyright: ignore[reportArgumentType]


WRONG_HEAD: tuple[tuple[dict[str, Any], str], ...] = (
    ({"hidden": torch.zeros(63)}, r"hidden: got shape \(63,\); wanted \(any, any\)"),
    ({"hidden": torch.zeros(63, 16, dtype=torch.int64)}, "hidden: got dtype torch.int64"),
    ({"head_weight": torch.zeros(211, 15)}, r"head_weight: got .*; wanted \(any, 16\)"),
    ({"head_weight": torch.zeros(0, 16)}, "head_weight: got .*; wanted V >= 1"),
    ({"head_weight": torch.zeros(211, 16, dtype=torch.complex64)}, "head_weight: got dtype"),
    ({"head_weight": torch.zeros(211, 16, device="meta")}, "head_weight: got device meta"),
    ({"target_ids": torch.zeros(62, dtype=torch.int64)}, r"target_ids: got .*; wanted \(63,\)"),
    ({"target_ids": ROWS}, "target_ids: got dtype torch.float32; wanted one of uint8"),
    (
        {"target_ids": torch.full((63,), 211)},
        "target_ids: got ids from 211 to 211; wanted 0 to 210",
    ),
    ({"target_ids": torch.full((63,), -1)}, "target_ids: got ids from -1 to -1"),
    ({"bias": torch.zeros(3)}, r"bias: got shape \(3,\); wanted \(211,\)"),
    ({"bias": torch.full((211,), -torch.inf)}, "bias: got -inf at 0; wanted finite numbers"),
    ({"hidden": [[0.0] * 16] * 63}, "hidden: got a list; wanted a tensor"),
    ({"target_ids": [0] * 63}, "target_ids: got a list; wanted a tensor"),
    ({"temperature": 0.0}, "temperature: got 0.0; wanted more than 0"),
    ({"temperature": float("inf")}, "temperature: got inf; wanted more than 0"),
    (
        {"temperature": torch.ones((), requires_grad=True)},
        "temperature: got a Tensor; wanted more than 0",
    ),
    ({"logit_softcap": float("inf")}, "logit_softcap: got inf; wanted None or more than 0"),
    ({"logit_scale": float("nan")}, "logit_scale: got nan; wanted a finite number"),
    ({"chunk_rows": 2.5}, "chunk_rows: got 2.5; wanted None or an int of at least 1"),
    ({"logit_softcap": -1.0}, "logit_softcap: got -1.0; wanted None or more than 0"),
    ({"chunk_rows": 0}, "chunk_rows: got 0; wanted None or an int of at least 1"),
    ({"vocab_shard": shard_of(-1, 300)}, "vocab_shard: got rows -1 to 210; wanted them within"),
    ({"vocab_shard": shard_of(100, 300)}, "vocab_shard: got rows 100 to 311"),
    ({"vocab_shard": shard_of(0, 210)}, "vocab_shard: got rows 0 to 211"),
    ({"backend": "triton"}, "backend: got 'triton' for tensors on cpu"),
    ({"backend": "cuda"}, "backend: got 'cuda'; wanted None, 'triton' or 'torch'"),
)

META = {
    name: value.to("meta")
    for name, value in policy_case().items()
    if name in ("hidden", "head_weight", "target_ids")
}

WRONG_POLICY: tuple[tuple[dict[str, Any], str], ...] = (
    ({"advantages": torch.zeros(63, 1)}, r"advantages: got shape \(63, 1\); wanted \(63,\)"),
    ({"advantages": torch.zeros(63, dtype=torch.bool)}, "advantages: got dtype torch.bool"),
    ({"old_log_probs": torch.zeros(1)}, r"old_log_probs: got shape \(1,\)"),
    ({"importance_weights": ROWS - 1}, "importance_weights: got a minimum of -1.0; wanted 0"),
    ({"importance_weights": torch.zeros(2)}, r"importance_weights: got shape \(2,\)"),
    ({"entropy_weights": torch.zeros(2)}, r"entropy_weights: got shape \(2,\)"),
    ({"surrogate": 0.2}, "surrogate: got 0.2; wanted a Clip, a Cispo or a Sapo"),
    ({"ratio_level": "word"}, "ratio_level: got 'word'; wanted one of"),
    ({"ratio_level": "sequence"}, r"sequence_ids: got None; wanted \[N\] ids"),
    ({"sequence_ids": ROWS}, "sequence_ids: got dtype torch.float32"),
    ({"kl_estimator": "k4"}, "kl_estimator: got 'k4'; wanted one of"),
    ({"ref_log_probs": ROWS}, r"kl_weights: got None; wanted \[N\] weights"),
    ({"kl_weights": ROWS}, "ref_log_probs: got neither of ref_log_probs and ref_hidden"),
    ({"kl_weights": torch.zeros(2), "ref_log_probs": ROWS}, r"kl_weights: got shape \(2,\)"),
    ({"kl_weights": ROWS, "ref_log_probs": torch.zeros(2)}, r"ref_log_probs: got shape \(2,\)"),
    (
        {"kl_weights": ROWS, "ref_log_probs": ROWS, "ref_hidden": torch.zeros(63, 16)},
        "ref_log_probs: got both of ref_log_probs and ref_hidden",
    ),
    ({"kl_weights": ROWS, "kl_estimator": "exact"}, r"ref_hidden: got None; wanted \[N, D\], for"),
    (
        {"kl_weights": ROWS, "ref_head_weight": torch.zeros(211, 16), "ref_log_probs": ROWS},
        "ref_hidden: got None; wanted .* as ref_head_weight is given",
    ),
    (
        {"kl_weights": ROWS, "ref_hidden": torch.zeros(63, 12)},
        r"ref_hidden: got shape \(63, 12\); wanted \(63, 16\)",
    ),
    (
        {
            "kl_weights": ROWS,
            "ref_hidden": torch.zeros(63, 12),
            "ref_head_weight": torch.zeros(5, 12),
        },
        r"ref_head_weight: got shape \(5, 12\); wanted \(211, any\)",
    ),
    (
        {"weight_grad": torch.zeros(16, 211)},
        r"weight_grad: got shape \(16, 211\); wanted \(211, 16\)",
    ),
    ({"weight_grad": torch.zeros(211 * 16)}, r"weight_grad: got shape \(3376,\)"),
    (
        {"weight_grad": torch.zeros(211, 16, dtype=torch.int32)},
        r"weight_grad: got dtype torch\.int32",
    ),
    (
        {"weight_grad": torch.zeros(211, 16, device="meta")},
        r"weight_grad: got device meta; wanted cpu",
    ),
    (
        {"weight_grad": torch.zeros(211, 16, requires_grad=True)},
        "weight_grad: got a tensor that requires grad",
    ),
)


@pytest.mark.parametrize(("wrong", "message"), (*WRONG_HEAD, *WRONG_POLICY))
def test_policy_loss_refuses(wrong: dict[str, Any], message: str) -> None:
    """Every argument that does not fit is refused by name."""
    case = policy_case() | {"advantages": torch.ones(63)}
    with pytest.raises(ValueError, match=message):
        linear_policy_loss(**(case | wrong))


@pytest.mark.parametrize(("wrong", "message"), WRONG_HEAD)
def test_log_probs_refuse(wrong: dict[str, Any], message: str) -> None:
    """The same for log-probs."""
    case = policy_case()
    head = {name: case[name] for name in ("hidden", "head_weight", "target_ids")}
    with pytest.raises(ValueError, match=message):
        linear_log_probs(**(head | wrong))


def test_exact_kl_refuses_log_probs() -> None:
    """The exact KL needs the reference's whole distribution, so log-probs would go unused."""
    case = with_kl(policy_case(), "exact") | {"ref_log_probs": ROWS}
    with pytest.raises(ValueError, match="ref_log_probs: got a tensor; wanted None"):
        linear_policy_loss(**case)


def test_meta_tensors_are_refused() -> None:
    """A tensor without numbers has no loss: an error, not a tensor of nothing."""
    with pytest.raises(ValueError, match="hidden: got a meta tensor, which holds no numbers"):
        linear_log_probs(**META)
    with pytest.raises(ValueError, match="hidden: got a meta tensor"):
        linear_policy_loss(**META, advantages=ROWS.to("meta"))


def test_second_derivatives_are_refused() -> None:
    """The backward is not differentiable: asking for it is an error, not a zero."""
    case = policy_case()
    hidden = case["hidden"].clone().requires_grad_()
    for loss in (
        linear_policy_loss(**(case | {"hidden": hidden})).loss,
        linear_log_probs(hidden, case["head_weight"], case["target_ids"]).sum(),
    ):
        with pytest.raises(ValueError, match="got create_graph=True; wanted False"):
            torch.autograd.grad(loss, hidden, create_graph=True)
