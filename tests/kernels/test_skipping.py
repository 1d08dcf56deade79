"""Rows without a say are skipped, and skipping them changes no bit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from care_kernels import linear_log_probs
from tests.kernels.cases import (
    PER_ROW,
    Case,
    assert_close,
    assert_same,
    error,
    head_case,
    only_rows,
    policy_case,
    row_vector,
    rows_that_count,
    run_ours,
    run_reference,
    with_kl,
)
from tests.kernels.tolerances import SAME_MATHS

DTYPES = (torch.float32, torch.bfloat16)
LEVELS = ("token", "sequence")
EXTRAS = ("none", "k3", "exact", "entropy", "everything")


def sparse_case(dtype: torch.dtype, level: str, extra: str, num_rows: int = 90) -> Case:
    """Rows 20 to 59 count for nothing, other rows for some terms only; sequences of 10 rows."""
    case = policy_case(num_rows, dtype=dtype, bias=True) | {"chunk_rows": 16}
    case |= {"ratio_level": level, "sequence_ids": torch.arange(num_rows) // 10}
    index = torch.arange(num_rows)
    idle = (index >= 20) & (index < 60)
    case["advantages"] = case["advantages"].masked_fill(idle | (index < 7), 0.0)
    if extra in ("k3", "exact", "everything"):
        case = with_kl(case, "k3" if extra == "everything" else extra)
        case["kl_weights"] = case["kl_weights"].masked_fill(idle | (index >= 70), 0.0)
    if extra in ("entropy", "everything"):
        weights = row_vector(case, 0.05, 0.1)
        case["entropy_weights"] = weights.masked_fill(idle | (index % 3 > 0), 0.0)
    counts = rows_that_count(case)
    assert 0 < int(counts.sum()) < num_rows and not counts[20:60].any()
    return case


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("extra", EXTRAS)
def test_skipping_changes_no_bit(extra: str, level: str, dtype: torch.dtype) -> None:
    """With report_all_rows, and where the active rows alone are passed, loss, gradients and the
    active rows' fields keep their bits. What is reported of skipped rows is the oracle's."""
    case = sparse_case(dtype, level, extra)
    counts = rows_that_count(case)
    default, default_grads = run_ours(case)
    reported, reported_grads = run_ours(case | {"report_all_rows": True})
    compact, compact_grads = run_ours(only_rows(case, counts))
    assert torch.equal(default.loss, reported.loss) and torch.equal(default.loss, compact.loss)
    assert default_grads.keys() == reported_grads.keys() == compact_grads.keys()
    assert not default_grads["hidden"][~counts].any()
    for name, grad in default_grads.items():
        assert torch.equal(grad, reported_grads[name])
        rows = counts if name == "hidden" else slice(None)
        assert torch.equal(grad[rows], compact_grads[name])
    for got, want, alone in zip(reported[1:], default[1:], compact[1:], strict=True):
        assert (got is None) == (want is None) == (alone is None)
        if got is not None and want is not None and alone is not None:
            assert torch.equal(got[counts], want[counts]) and torch.equal(alone, want[counts])

    oracle, _ = run_reference(case)
    eager, _ = run_reference(case, torch.float32)
    for name in PER_ROW:
        got, want, torch_result = (getattr(run, name) for run in (reported, oracle, eager))
        if got is not None:
            assert_close(got, want, torch_result, is_gradient=False)
    assert torch.equal(reported.clipped_low, oracle.clipped_low)
    assert torch.equal(reported.clipped_high, oracle.clipped_high)


def test_reporting_all_rows_checks_their_targets() -> None:
    """A skipped row may hold any target id, but not when its statistics are asked for."""
    case = sparse_case(torch.float32, "token", "none")
    case["target_ids"] = case["target_ids"].index_fill(0, torch.tensor([30]), -100)
    run_ours(case)
    with pytest.raises(ValueError, match="target_ids: got ids from -100"):
        run_ours(case | {"report_all_rows": True})


@pytest.mark.parametrize("num_rows", (0, 5))
def test_reporting_all_rows_where_none_counts(num_rows: int) -> None:
    """Statistics of rows that all count for nothing, and of no rows."""
    case = policy_case(num_rows)
    case["advantages"] = torch.zeros(num_rows)
    ours, grads = run_ours(case | {"report_all_rows": True})
    oracle, _ = run_reference(case)
    assert ours.loss.item() == 0 and all((grad == 0).all() for grad in grads.values())
    assert_same(ours.log_probs, oracle.log_probs.detach().float())
    assert_same(ours.ratio, oracle.ratio.detach().float())


ROWS = st.lists(st.integers(0, 89), min_size=1, max_size=12)


@settings(max_examples=25, deadline=None)
@given(rows=ROWS, dtype=st.sampled_from(DTYPES), chunk_rows=st.integers(1, 12))
def test_rows_do_not_see_each_other(rows: list[int], dtype: torch.dtype, chunk_rows: int) -> None:
    """Any choice of rows, in any order and repeated, in any chunks, gives each its own results."""
    case = with_kl(policy_case(90, dtype=dtype), "exact")
    case |= {"entropy_weights": row_vector(case, 0.05, 0.1), "advantages": case["advantages"] + 2}
    whole, whole_grads = run_ours(case)
    chosen = torch.tensor(rows)
    some, some_grads = run_ours(only_rows(case, chosen) | {"chunk_rows": chunk_rows})
    for name in PER_ROW:
        got, want = getattr(some, name), getattr(whole, name)
        assert error(got, want[chosen], 1.0) <= SAME_MATHS[torch.float32]
    got, want = some_grads["hidden"], whole_grads["hidden"]
    assert error(got, want[chosen], float(want.abs().max())) <= SAME_MATHS[dtype]


@settings(max_examples=25, deadline=None)
@given(
    row=st.integers(0, 62),
    dtype=st.sampled_from(DTYPES),
    num_columns=st.sampled_from((1, 15, 64, 211)),
)
def test_log_prob_of_a_row_alone(row: int, dtype: torch.dtype, num_columns: int) -> None:
    """`linear_log_probs` of a row alone is that of the row in a batch."""
    case = head_case(vocab_size=num_columns, dtype=dtype)
    alone = only_rows(case, torch.tensor([row]))
    together = linear_log_probs(**case, return_entropy=True)
    for got, want in zip(linear_log_probs(**alone, return_entropy=True), together, strict=True):
        assert error(got, want[row : row + 1], 1.0) <= SAME_MATHS[torch.float32]
