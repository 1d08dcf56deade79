"""What only a GPU has: streams and threads, NCCL, its autocast, grids and real sizes."""

import threading

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from care_kernels import VocabShard, linear_log_probs, linear_policy_loss
from tests.kernels.cases import (
    DEVICE,
    assert_same,
    assert_same_bits,
    check_against_oracle,
    double_logits,
    error,
    head_case,
    on_its_device,
    policy_case,
    row_vector,
    run_ours,
    run_reference,
    with_kl,
)
from tests.kernels.oracle import reference_log_probs
from tests.kernels.tolerances import FLOOR

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU"),
]
CASE = policy_case(96, 128, 2003, torch.bfloat16) | {"backend": "triton"}


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32), ids=str)
@pytest.mark.parametrize("extra", ("none", "exact", "entropy"))
def test_at_size(extra: str, dtype: torch.dtype) -> None:
    """Several tiles in each direction, and several chunks."""
    case = policy_case(384, 1024, 32_000, dtype) | {"chunk_rows": 200, "backend": "triton"}
    if extra == "exact":
        case = with_kl(case, "exact")
    elif extra == "entropy":
        case["entropy_weights"] = row_vector(case, -0.1, 0.1)
    check_against_oracle(case)


def test_more_rows_than_a_grids_second_axis_holds() -> None:
    """With int32 targets."""
    case = head_case(70_001, 16, 50, torch.bfloat16) | {"chunk_rows": 70_001, "backend": "triton"}
    case["target_ids"] = case["target_ids"].int()
    want = reference_log_probs(double_logits(case), case["target_ids"])
    got = linear_log_probs(**on_its_device(case)).cpu()
    assert error(got, want, 1.0) <= 10 * FLOOR[torch.float32]


def test_a_target_outside_the_vocabulary() -> None:
    """An error, never another word's log-prob."""
    case = CASE | {"advantages": torch.ones(96), "target_ids": CASE["target_ids"].clone()}
    case["target_ids"][0] = 2003
    with pytest.raises(ValueError, match="target_ids"):
        linear_policy_loss(**on_its_device(case))


def test_other_streams_and_threads() -> None:
    """The same bits on a stream of its own and in another thread."""
    first = run_ours(CASE)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        assert_same_bits(run_ours(CASE), first)
    stream.synchronize()
    found: list[tuple] = []
    thread = threading.Thread(target=lambda: found.append(run_ours(CASE)))
    thread.start()
    thread.join()
    assert_same_bits(found[0], first)


def test_one_rank_shard() -> None:
    """A vocabulary shard that is the whole vocabulary, over NCCL."""
    whole, wanted = run_ours(CASE)
    device = torch.device("cuda", 0)
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1, device_id=device)
    try:
        assert dist.group.WORLD is not None
        got, grads = run_ours(CASE | {"vocab_shard": VocabShard(dist.group.WORLD, 0, 2003)})
    finally:
        dist.destroy_process_group()
    assert_same(got.loss, whole.loss)
    for name, grad in grads.items():
        assert_same(grad, wanted[name])


def test_autocast() -> None:
    """Float32 weights under bfloat16 autocast, TRL's default: near the exact gradients."""
    case = policy_case(96, 128, 2003) | {"backend": "triton"}
    _, wanted = run_reference(case)
    with torch.autocast("cuda", torch.bfloat16):
        loss, grads = run_ours(case)
    assert torch.isfinite(loss.loss)
    gradients: dict[str, Tensor] = grads
    for name, grad in gradients.items():
        assert error(grad, wanted[name]) <= 4e-2
