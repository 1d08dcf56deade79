"""A head spread over two ranks, by vocabulary, FSDP2 or ZeRO-3, gives what one process gives."""

import functools
import importlib.util
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from care_kernels import care_loss, linear_log_probs, linear_policy_loss
from care_kernels.heads import head_parameters
from care_kernels.vocab_parallel import VocabShard
from tests.kernels.cases import (
    PER_ROW,
    Case,
    V,
    assert_same,
    batch_case,
    error,
    gradients_of,
    head_case,
    leaves_of,
    only_rows,
    policy_case,
    row_vector,
    run_ours,
    with_kl,
)
from tests.kernels.ranks import NUM_RANKS, on_ranks
from tests.kernels.tolerances import SAME_MATHS

CUT, VOCAB_SIZE = 170, 211
"""Where the second rank's part of the vocabulary begins, and where it ends."""
OVER_VOCABULARY = ("head_weight", "ref_head_weight", "bias", "weight_grad")
DTYPES = (torch.float32, torch.bfloat16)
HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None


@functools.cache
def vocab_cases() -> dict[str, Case]:
    """Every problem by name; the same numbers on every rank."""
    cases: dict[str, Case] = {}
    for dtype in DTYPES:
        plain, biased = (policy_case(dtype=dtype, bias=bias) for bias in (False, True))
        entropy = {"entropy_weights": row_vector(plain, 0.0, 0.1)}
        transform = {"logit_softcap": 4.0, "logit_scale": 1.5, "temperature": 1.2}
        sequences = {"ratio_level": "sequence", "sequence_ids": torch.arange(63) // 9}
        variants = {
            "k3": with_kl(plain, "k3") | entropy,
            "exact": with_kl(biased, "exact") | entropy | {"chunk_rows": 20},
            "softcap": biased | transform | entropy,
            "sequence": with_kl(plain, "k3") | sequences | {"chunk_rows": 20},
            "report_all": plain | entropy | {"report_all_rows": True},
            "chunks": biased | {"chunk_rows": 7},
        }
        cases |= {f"{kind} {dtype}": case for kind, case in variants.items()}
    return cases


def rows_of(rank: int) -> slice:
    """Which rows of the head a rank holds."""
    return slice(CUT, VOCAB_SIZE) if rank else slice(CUT)


def part_of(case: Case, rows: slice | None = None, vocab_size: int = VOCAB_SIZE) -> Case:
    """This rank's share of a case."""
    assert dist.group.WORLD is not None
    rows = rows_of(dist.get_rank()) if rows is None else rows
    shard = VocabShard(dist.group.WORLD, rows.start or 0, vocab_size)
    parts = {name: case[name][rows].clone() for name in OVER_VOCABULARY if name in case}
    return case | parts | {"vocab_shard": shard}


def log_probs_case(dtype: torch.dtype) -> Case:
    return head_case(dtype=dtype, bias=True) | {"chunk_rows": 20}


def log_probs_and_gradients(case: Case) -> dict[str, Tensor]:
    """`linear_log_probs` with entropy, under weights of both signs on both."""
    leaves = leaves_of(case)
    log_probs, entropy = linear_log_probs(**(case | leaves), return_entropy=True)
    ramp = torch.linspace(-1, 1, log_probs.numel())
    (ramp * log_probs + ramp.flip(0).square() * entropy).sum().backward()
    values = {"log_probs": log_probs.detach(), "entropy": entropy.detach()}
    return values | gradients_of(leaves)


def vocab_rank() -> dict[str, Any]:
    """All vocabulary-sharded runs of one rank."""
    results: dict[str, Any] = {}
    for name, case in vocab_cases().items():
        loss, gradients = run_ours(part_of(case))
        values = {key: value for key, value in loss._asdict().items() if value is not None}
        results[name] = (values, gradients)
    for dtype in DTYPES:
        results[f"log_probs-{dtype}"] = log_probs_and_gradients(part_of(log_probs_case(dtype)))
    case = policy_case()
    part = part_of(case | {"weight_grad": torch.ones_like(case["head_weight"])})
    run_ours(part)
    results["weight_grad"] = part["weight_grad"]
    rows = slice(9, V) if dist.get_rank() else slice(9)
    part = part_of(batch_case(bias=True), rows, V)
    results["care_loss"] = care_loss(**part).loss
    return results


class TinyPolicy(nn.Module):
    """A layer, and a head that is a module of its own around the fused operations."""

    def __init__(self) -> None:
        super().__init__()
        width, vocab_size = data_parallel_case()["hidden"].shape[1], VOCAB_SIZE
        self.body = nn.Linear(width, width)
        self.head = TinyHead(width, vocab_size)
        generator = torch.Generator().manual_seed(3)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3, generator=generator)

    def forward(self, case: Case, fused: bool) -> Tensor:
        """The scalar loss of these rows."""
        return self.head(case | {"hidden": self.body(case["hidden"])}, fused)


class TinyHead(nn.Linear):
    def forward(self, case: Case, fused: bool) -> Tensor:
        return loss_of(case, self.weight, self.bias, fused)


def loss_of(case: Case, weight: Tensor, bias: Tensor | None, fused: bool) -> Tensor:
    """`linear_policy_loss`, or the same surrogate on top of `linear_log_probs`."""
    if fused:
        return linear_policy_loss(**(case | {"head_weight": weight, "bias": bias})).loss
    log_probs, entropy = linear_log_probs(
        case["hidden"], weight, case["target_ids"], bias=bias, return_entropy=True, chunk_rows=20
    )
    return -(case["advantages"] * log_probs + 0.1 * entropy).sum()


def data_parallel_case() -> Case:
    """64 rows; the old log-probs are the current ones, whatever the model is."""
    case = policy_case(num_rows=64) | {"chunk_rows": 20}
    del case["old_log_probs"]
    return case


def share_of(case: Case, rank: int) -> Case:
    """This rank's half of the rows."""
    half = case["hidden"].shape[0] // NUM_RANKS
    return only_rows(case, slice(rank * half, (rank + 1) * half))


def whole_gradients_of(model: nn.Module) -> dict[str, Tensor]:
    """Each parameter's gradient, put together from its shards."""
    gradients = {}
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        assert grad is not None, name
        gradients[name] = grad.full_tensor() if hasattr(grad, "full_tensor") else grad  # pyright: ignore[reportAttributeAccessIssue]
    return gradients


def fsdp_rank() -> dict[str, dict[str, Tensor]]:
    """Gradients under FSDP2 of every form; data parallel, so they are means over ranks."""
    from torch.distributed.fsdp import fully_shard

    share, results = share_of(data_parallel_case(), dist.get_rank()), {}
    for form in ("fused", "log_probs", "outside_fused", "outside_log_probs"):
        model = TinyPolicy()
        fully_shard(model.body)
        fully_shard(model.head)
        fused = form.endswith("fused")
        if form.startswith("outside"):
            weight, bias = head_parameters(model.head)
            loss = loss_of(share | {"hidden": model.body(share["hidden"])}, weight, bias, fused)
        else:
            fully_shard(model)
            loss = model(share, fused)
        loss.backward()
        results[f"fsdp-{form}"] = whole_gradients_of(model)
    return results


def zero3_rank() -> dict[str, dict[str, Tensor]]:
    """Gradients under ZeRO-3, whose weights are partitioned before and after."""
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    share, results = share_of(data_parallel_case(), dist.get_rank()), {}
    for form in ("fused", "log_probs"):
        model = TinyPolicy()
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.01),
            config={
                "train_micro_batch_size_per_gpu": 1,
                "zero_allow_untested_optimizer": True,
                # Nothing is too small to be partitioned.
                "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
            },
            dist_init_required=False,
        )
        assert model.head.weight.numel() == 0, "partitioned"
        engine.backward(engine(share, form == "fused"))
        gradients = {n: safe_get_full_grad(value) for n, value in model.named_parameters()}
        results[f"zero3-{form}"] = {name: value.clone() for name, value in gradients.items()}
        assert model.head.weight.numel() == 0, "partitioned again"
    return results


@functools.cache
def unsharded(fused: bool) -> dict[str, Tensor]:
    """One process's mean gradients over the ranks' rows."""
    model = TinyPolicy()
    losses = [model(share_of(data_parallel_case(), rank), fused) for rank in range(NUM_RANKS)]
    (sum(losses) / NUM_RANKS).backward()
    return whole_gradients_of(model)


def every_run() -> dict[str, Any]:
    """One rank's results of all the runs below: starting ranks costs more than the runs."""
    return vocab_rank() | fsdp_rank() | (zero3_rank() if HAS_DEEPSPEED else {})


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return on_ranks(every_run, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", vocab_cases())
def test_vocabulary_shards(name: str, results: list[dict[str, Any]]) -> None:
    """Loss, every field, dX and each rank's rows of dW and db equal a single process; what all
    ranks hold is the same bits on each, so that replicas never drift apart."""
    case = vocab_cases()[name]
    assert (case["target_ids"] < CUT).any() and (case["target_ids"] >= CUT).any()
    whole, whole_gradients = run_ours(case)
    for rank, result in enumerate(results):
        rows, (values, gradients) = rows_of(rank), result[name]
        # Rows of some nats each, whose errors add up as their squares do.
        scale = len(case["hidden"]) ** 0.5
        assert error(values["loss"], whole.loss.detach(), scale) <= SAME_MATHS[torch.float32]
        for field in PER_ROW:
            want = getattr(whole, field)
            assert (want is None) == (field not in values)
            if want is not None:
                # In nats, like the values of `assert_close`.
                assert error(values[field], want, 1.0) <= SAME_MATHS[torch.float32]
        for field in ("clipped_low", "clipped_high"):
            assert torch.equal(values[field], getattr(whole, field))
        assert set(gradients) == set(whole_gradients)
        for leaf, gradient in gradients.items():
            want = whole_gradients[leaf]
            assert_same(gradient, want if leaf == "hidden" else want[rows])
    (first, first_gradients), (second, second_gradients) = (result[name] for result in results)
    assert all(torch.equal(first[field], second[field]) for field in first)
    assert torch.equal(first_gradients["hidden"], second_gradients["hidden"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_log_probs_over_vocabulary_shards(
    dtype: torch.dtype, results: list[dict[str, Any]]
) -> None:
    """`linear_log_probs`: values, entropies and their gradients equal a single process."""
    whole = log_probs_and_gradients(log_probs_case(dtype))
    for rank, result in enumerate(results):
        got = result[f"log_probs-{dtype}"]
        assert set(got) == set(whole)
        for name, value in got.items():
            rows = rows_of(rank) if name in OVER_VOCABULARY else slice(None)
            assert_same(value, whole[name][rows])


def test_other_calls_over_vocabulary_shards(results: list[dict[str, Any]]) -> None:
    """Each rank's `weight_grad` receives its own rows; `care_loss` takes a shard as well."""
    _, gradients = run_ours(policy_case())
    got = torch.cat([result["weight_grad"] for result in results])
    assert_same(got, 1 + gradients["head_weight"])
    want = care_loss(**batch_case(bias=True)).loss
    for result in results:
        assert_same(result["care_loss"], want)


FSDP2 = ("fsdp-fused", "fsdp-log_probs", "fsdp-outside_fused", "fsdp-outside_log_probs")
ZERO3 = ("zero3-fused", "zero3-log_probs") if HAS_DEEPSPEED else ()


@pytest.mark.parametrize("form", (*FSDP2, *ZERO3))
def test_partitioned_heads(form: str, results: list[dict[str, Any]]) -> None:
    """FSDP2 gathers a head module's weight around the fused operations; outside the module
    `head_parameters` does, and sends each shard the mean gradient. ZeRO-3 gathers it for the
    forward and for the recomputing backward."""
    want = unsharded(form.endswith("fused"))
    for result in results:
        for name, gradient in result[form].items():
            assert_same(gradient, want[name])
