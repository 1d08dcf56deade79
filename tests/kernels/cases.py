"""Random problems for the kernel tests, and how results are compared with the oracle."""

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from care_kernels import PolicyLoss, linear_policy_loss
from care_kernels.backends import compute_dtype
from tests.kernels.oracle import (
    reference_log_probs,
    reference_logits,
    reference_policy_loss,
)
from tests.kernels.tolerances import FACTOR, FLOOR, SAME_MATHS, VALUE_FLOOR

# Triton's kernels run where there is a GPU, else interpreted on CPU tensors.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LEAVES = ("hidden", "head_weight", "bias")
RUN_OPTIONS = ("chunk_rows", "backend", "old_log_normalizer")
PER_ROW = ("log_probs", "entropy", "kl", "ratio")

Case = dict[str, Any]
Run = tuple[PolicyLoss, dict[str, Tensor]]
"""A loss, and the gradients of its leaves."""


def head_case(
    num_rows: int = 63,
    width: int = 16,
    vocab_size: int = 211,
    dtype: torch.dtype = torch.float32,
    *,
    seed: int = 0,
    spread: float = 2.0,
    bias: bool = False,
) -> Case:
    """hidden, head_weight, target_ids and perhaps bias; logits have a deviation of `spread`."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    case: Case = {
        "hidden": normal(num_rows, width).to(dtype),
        "head_weight": (spread * width**-0.5 * normal(vocab_size, width)).to(dtype),
        "target_ids": torch.randint(vocab_size, (num_rows,), generator=generator),
    }
    if bias:
        case["bias"] = (0.5 * normal(vocab_size)).to(dtype)
    return case


def policy_case(*args: Any, seed: int = 0, drift: float = 0.3, **kwargs: Any) -> Case:
    """A `head_case` with advantages of both signs (some zero) and drifted old log-probs."""
    case = head_case(*args, seed=seed, **kwargs)
    generator = torch.Generator().manual_seed(seed + 1)
    num_rows = case["hidden"].shape[0]
    row_dtype = compute_dtype(case["hidden"])
    current = reference_log_probs(double_logits(case), case["target_ids"])
    noise = torch.randn(num_rows, generator=generator, dtype=torch.float64)
    advantages = torch.randn(num_rows, generator=generator, dtype=torch.float64)
    case["advantages"] = advantages.masked_fill(advantages.abs() < 0.2, 0.0).to(row_dtype)
    case["old_log_probs"] = (current + drift * noise).to(row_dtype)
    return case


def row_vector(case: Case, low: float, high: float, seed: int = 7) -> Tensor:
    """[N] uniform numbers in [low, high)."""
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(case["hidden"].shape[0], generator=generator, dtype=torch.float64)
    return (low + (high - low) * uniform).to(case["advantages"].dtype)


def with_kl(case: Case, estimator: str, *, from_hidden: bool = True) -> Case:
    """Add a reference: hidden states and a head of its own, or log-probs alone."""
    reference = head_case(
        *case["hidden"].shape, case["head_weight"].shape[0], case["hidden"].dtype, seed=11
    )
    added: Case = {"kl_estimator": estimator, "kl_weights": row_vector(case, 0.05, 0.2)}
    ref_hidden = (case["hidden"].double() + 0.1 * reference["hidden"].double()).to(
        case["hidden"].dtype
    )
    if from_hidden:
        weight = case["head_weight"].double() + 0.1 * reference["head_weight"].double()
        added |= {"ref_hidden": ref_hidden, "ref_head_weight": weight.to(case["hidden"].dtype)}
    else:
        logits = double_logits(case | {"hidden": ref_hidden})
        ref_log_probs = reference_log_probs(logits, case["target_ids"])
        added["ref_log_probs"] = ref_log_probs.to(case["advantages"].dtype)
    return case | added


B, T, D, V = 5, 14, 8, 23
PROMPT_LENS = (3, 1, 5, 2, 4)
RESPONSE_LENS = (11, 8, 7, 10, 6)


def batch_case(dtype: torch.dtype = torch.float32, *, seed: int = 0, bias: bool = False) -> Case:
    """[B, T] sequences for `care_loss`: prompt, rationale, answer, EOS and padding in each.

    Row 2 is outside S*, row 3 has no rationale, and row 4 is a negative without an answer, so that
    none of its tokens has an advantage. Whatever must not be read is NaN or no token id.
    """
    case = head_case(B * T, D, V, dtype, seed=seed, bias=bias)
    case["hidden"] = case["hidden"].view(B, T, D)
    starts, lengths = torch.tensor(PROMPT_LENS), torch.tensor(RESPONSE_LENS)
    positions = torch.arange(T)
    response = (positions >= starts[:, None]) & (positions < (starts + lengths)[:, None])
    b, t = response.nonzero(as_tuple=True)
    token_ids = case.pop("target_ids").view(B, T)
    current = reference_log_probs(
        double_logits(case | {"hidden": case["hidden"][b, t - 1]}), token_ids[b, t]
    )
    generator = torch.Generator().manual_seed(seed + 1)
    drift = torch.randn(len(b), generator=generator, dtype=torch.float64)
    old_log_probs = torch.full((B, T), torch.nan, dtype=torch.float64)
    old_log_probs[b, t] = current + 0.3 * drift
    think_spans = torch.stack((starts + 1, starts + 4), 1)
    think_spans[3] = 0
    return case | {
        "token_ids": token_ids.masked_fill(~response, -100),
        "advantages": torch.tensor([2.0, -0.5, 0.0, -0.25, -0.4]),
        "think_spans": think_spans,
        "answer_spans": torch.stack((starts + 5, starts + lengths - 1), 1),
        "is_positive": torch.tensor([True, False, True, True, False]),
        "response_mask": response,
        "old_log_probs": old_log_probs.to(compute_dtype(case["hidden"])),
    }


def only_rows(case: Case, rows: Tensor | slice) -> Case:
    """The same problem with the given rows alone."""
    shared = ("head_weight", "ref_head_weight", "bias")
    return {
        name: value[rows] if isinstance(value, Tensor) and name not in shared else value
        for name, value in case.items()
    }


def double_logits(case: Case) -> Tensor:
    """[N, V] float64 logits of a case."""
    names = ("temperature", "logit_softcap", "logit_scale", "bias")
    options = {name: cast(case[name], torch.float64) for name in names if name in case}
    return reference_logits(case["hidden"].double(), case["head_weight"].double(), **options)


def cast(value: Any, dtype: torch.dtype) -> Any:
    """A floating tensor in another dtype; anything else as it is."""
    is_floating = isinstance(value, Tensor) and value.is_floating_point()
    return value.to(dtype) if is_floating else value


def leaves_of(case: Case, frozen: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """Copies of what may be trained, which ask for gradients unless frozen."""
    return {
        name: case[name].detach().clone().requires_grad_(name not in frozen)
        for name in LEAVES
        if name in case
    }


def oracle_leaves(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """`leaves_of` for the oracle in `dtype`: they keep their own dtype unless that is float64, so
    that in float32 the gradients are rounded to it once, as ours are."""
    is_double = dtype == torch.float64
    return leaves_of({n: cast(value, dtype) for n, value in case.items()} if is_double else case)


def on_its_device(case: Case) -> Case:
    """Its tensors where its backend runs."""
    device = DEVICE if case.get("backend") == "triton" else "cpu"
    return {n: v.to(device) if isinstance(v, Tensor) else v for n, v in case.items()}


def run_ours(case: Case, *, upstream: float = 1.0, frozen: tuple[str, ...] = ()) -> Run:
    """`linear_policy_loss` on fresh leaves, and their gradients, both on the CPU."""
    case = on_its_device(case)
    leaves = leaves_of(case, frozen)
    loss = linear_policy_loss(**(case | leaves))
    (upstream * loss.loss).backward()
    found = PolicyLoss(*(None if field is None else field.cpu() for field in loss))
    return found, gradients_of(leaves)


def run_reference(case: Case, dtype: torch.dtype = torch.float64, *, upstream: float = 1.0) -> Run:
    """The oracle on the same numbers, computed in `dtype`.

    In bfloat16 the logits' gradient is rounded too, as every bfloat16 GEMM takes it.
    """
    leaves = oracle_leaves(case, dtype)
    options = {name: cast(value, dtype) for name, value in case.items() if name not in RUN_OPTIONS}
    operands = {n: leaf.to(dtype) for n, leaf in leaves.items()}
    with RoundLogitGradient(leaves["hidden"].dtype):
        loss = reference_policy_loss(**(options | operands))
    (upstream * loss.loss).backward()
    return loss, gradients_of(leaves)


class RoundLogitGradient(TorchFunctionMode):
    """Round the gradient of every `linear` to bfloat16, where the leaves are bfloat16."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.rounds = dtype == torch.bfloat16

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.rounds and func is torch.nn.functional.linear and result.requires_grad:
            result.register_hook(lambda grad: grad.bfloat16().to(grad.dtype))
        return result


def gradients_of(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: leaf.grad.cpu() for name, leaf in leaves.items() if leaf.grad is not None}


def error(got: Tensor, want: Tensor, least_scale: float = 0.0) -> float:
    """Largest difference relative to the largest wanted entry, or to `least_scale` if larger."""
    assert got.shape == want.shape
    if want.numel() == 0:
        return 0.0
    got, want = got.detach().double(), want.detach().double()
    difference = float((got - want).abs().max())
    scale = max(float(want.abs().max()), least_scale)
    return difference / scale if scale > 0 else difference


def assert_close(got: Tensor, want: Tensor, torch_result: Tensor, *, is_gradient: bool) -> None:
    """The rule of `tolerances`, for one tensor."""
    assert torch.isfinite(got).all()
    # Values are in nats: what matters is their absolute error, however small they are.
    least_scale = 0.0 if is_gradient else 1.0
    floor = (FLOOR if is_gradient else VALUE_FLOOR)[got.dtype]
    allowed = FACTOR * error(torch_result, want, least_scale) + floor
    assert error(got, want, least_scale) <= allowed


def assert_same(got: Tensor, want: Tensor) -> None:
    """The same maths in a different order."""
    assert got.dtype == want.dtype
    assert error(got, want) <= SAME_MATHS[got.dtype]


def assert_same_bits(one: Run, other: Run) -> None:
    """Loss, log-probs and every gradient."""
    assert torch.equal(one[0].loss, other[0].loss)
    assert torch.equal(one[0].log_probs, other[0].log_probs)
    assert one[1].keys() == other[1].keys()
    assert all(torch.equal(grad, other[1][name]) for name, grad in one[1].items())


def check_against_oracle(
    case: Case, *, upstream: float = 1.0, frozen: tuple[str, ...] = ()
) -> None:
    """Loss, row statistics, flags and gradients of `case` follow the float64 oracle."""
    ours, our_grads = run_ours(case, upstream=upstream, frozen=frozen)
    oracle, oracle_grads = run_reference(case, upstream=upstream)
    eager_dtype = ours.loss.dtype
    eager, eager_grads = run_reference(case, eager_dtype, upstream=upstream)

    assert ours.loss.dtype == eager_dtype
    assert_close(ours.loss, oracle.loss, eager.loss, is_gradient=False)
    # Reported where something weighs them, if only with zeros.
    assert (ours.entropy is None) == ("entropy_weights" not in case)
    assert (ours.kl is None) == ("kl_weights" not in case)
    rows = rows_that_count(case)
    for name in PER_ROW:
        got, want = getattr(ours, name), getattr(oracle, name)
        if got is not None:
            assert_close(got[rows], want[rows], getattr(eager, name)[rows], is_gradient=False)
    for name in ("clipped_low", "clipped_high"):
        assert torch.equal(getattr(ours, name), getattr(oracle, name))

    assert set(our_grads) == {name for name in oracle_grads if name not in frozen}
    for name, grad in our_grads.items():
        assert grad.dtype == case[name].dtype
        assert_close(grad, oracle_grads[name], eager_grads[name], is_gradient=True)


def rows_that_count(case: Case) -> Tensor:
    """[N] bool: the rows `linear_policy_loss` may not skip, worked out row by row."""
    weights = [case.get("importance_weights", 1.0) * case["advantages"]]
    weights += [case[name] for name in ("kl_weights", "entropy_weights") if name in case]
    counts = torch.stack([weight != 0 for weight in weights]).any(0)
    if case.get("ratio_level") == "sequence":
        ids = case["sequence_ids"]
        counts = torch.tensor([bool(counts[ids == own].any()) for own in ids], dtype=torch.bool)
    return counts
