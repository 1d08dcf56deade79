"""`row_statistics` and `logit_gradients` against float64, beside the torch versions."""

import pytest
import torch
from torch import Tensor

from care_kernels import row_softmax
from care_kernels.row_softmax import LogitTransform, RowGradients, RowStatistics
from care_kernels.triton_backend.logit_gradients import logit_gradients
from care_kernels.triton_backend.row_statistics import row_statistics
from tests.kernels.cases import assert_close
from tests.kernels.triton_backend.interpreter import DEVICE, IS_INTERPRETED

SHAPES = [(0, 17), (1, 1), (5, 17), (5, 1000), (5, 4099), (64, 17)]
TRANSFORMS = {
    "plain": LogitTransform(),
    "temperature": LogitTransform(temperature=0.7, scale=0.5),
    "softcap": LogitTransform(temperature=0.7, softcap=10.0, scale=2.0),
}


def make_logits(num_rows: int, vocab_size: int, spread: float = 3.0, offset: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(num_rows + vocab_size)
    logits = torch.randn(num_rows, vocab_size, generator=generator)
    return (logits * spread + offset).to(DEVICE)


def make_targets(num_rows: int, vocab_size: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(vocab_size, (num_rows,), generator=generator).to(DEVICE)


def make_reference(logits: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return logits + 0.1 * torch.randn(logits.shape, generator=generator).to(DEVICE)


def make_gradients(num_rows: int, with_all: bool) -> RowGradients:
    generator = torch.Generator().manual_seed(7)
    g, d_entropy, d_kl = torch.randn(3, num_rows, generator=generator).to(DEVICE)
    return RowGradients(g, d_entropy, d_kl) if with_all else RowGradients(g)


def doubled(record: RowStatistics | RowGradients) -> list[Tensor | None]:
    return [None if field is None else field.double() for field in record]


def check_statistics(logits: Tensor, ref_logits: Tensor | None, *, with_entropy: bool) -> None:
    """Every field within twice torch's float32 error plus the floor."""
    target_ids = make_targets(*logits.shape)
    options = {"with_entropy": with_entropy, "ref_logits": ref_logits}
    ours = row_statistics(logits, target_ids, **options)
    eager = row_softmax.row_statistics(logits, target_ids, **options)
    double_ref = None if ref_logits is None else ref_logits.double()
    oracle = row_softmax.row_statistics(
        logits.double(), target_ids, with_entropy=with_entropy, ref_logits=double_ref
    )
    for got, want, torch_result in zip(ours, oracle, eager, strict=True):
        assert (got is None) == (want is None)
        if got is not None:
            assert_close(got, want, torch_result, is_gradient=False)


@pytest.mark.parametrize("with_ref", (False, True))
@pytest.mark.parametrize("with_entropy", (False, True))
@pytest.mark.parametrize("shape", SHAPES)
def test_statistics(shape: tuple[int, int], with_entropy: bool, with_ref: bool) -> None:
    """Log-probs, entropy and exact KL for vocabularies below, at and beyond a block."""
    logits = make_logits(*shape)
    ref_logits = make_reference(logits) if with_ref else None
    check_statistics(logits, ref_logits, with_entropy=with_entropy)


@pytest.mark.parametrize(("spread", "offset"), ((1.0, 1e4), (1.0, -1e4), (1e4, 0.0)))
def test_statistics_of_large_logits(spread: float, offset: float) -> None:
    """Logits of +-10,000 lose no digit of their differences."""
    logits = make_logits(5, 4099, spread, offset)
    check_statistics(logits, make_reference(logits), with_entropy=True)


def test_log_probs_of_large_logits_are_exact_to_1e_6() -> None:
    """The error does not grow with the logits: the maximum is taken off first."""
    logits, target_ids = make_logits(64, 1000, offset=1e4), make_targets(64, 1000)
    want = torch.log_softmax(logits.double(), 1).gather(1, target_ids[:, None])[:, 0]
    got = row_statistics(logits, target_ids, with_entropy=False).log_probs
    assert float((got - want).abs().max()) < 2e-6


def test_a_rising_row_rescales_its_sums() -> None:
    """The running maximum changes in every block, and the reference's in none."""
    logits = torch.linspace(-50, 50, 9000, device=DEVICE).repeat(2, 1)
    check_statistics(logits, logits.flip(1).contiguous(), with_entropy=True)


def test_an_id_outside_the_vocabulary_gives_nan() -> None:
    """Nothing is read outside the row, and the mistake shows."""
    target_ids = torch.tensor([-1, 17, 3], device=DEVICE)
    log_probs = row_statistics(make_logits(3, 17), target_ids, with_entropy=False).log_probs
    assert log_probs.isnan().tolist() == [True, True, False]


@pytest.mark.gpu
@pytest.mark.skipif(IS_INTERPRETED, reason="minutes long in the interpreter")
def test_more_rows_than_the_other_grid_axes_hold() -> None:
    """65,537 rows: only a grid's first axis is that long."""
    check_statistics(make_logits(65_537, 2), None, with_entropy=False)


@pytest.mark.gpu
@pytest.mark.skipif(IS_INTERPRETED, reason="needs 9 GB")
def test_rows_beyond_2_to_the_31_elements() -> None:
    """Offsets are 64 bits wide."""
    buffer = torch.zeros(3, 2**30 + 8, device=DEVICE)
    buffer[:, :1000] = make_logits(3, 1000)
    check_statistics(buffer[:, :1000], None, with_entropy=False)


def run_gradients(
    logits: Tensor, out: Tensor, transform: LogitTransform, with_all: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Ours, float64's and torch's, from z = `logits`; `out` may lie in the logits' memory."""
    target_ids, gradients = make_targets(*logits.shape), make_gradients(len(logits), with_all)
    ref_logits = make_reference(logits) if with_all else None
    options = {"with_entropy": with_all, "ref_logits": ref_logits}
    stats = row_softmax.row_statistics(logits, target_ids, **options)

    want = logits.double()
    double_ref = None if ref_logits is None else ref_logits.double()
    double_stats = row_softmax.row_statistics(
        want, target_ids, with_entropy=with_all, ref_logits=double_ref
    )
    double_gradients = RowGradients(*doubled(gradients))
    row_softmax.logit_gradients(
        want, target_ids, double_stats, double_gradients, transform, out=want, ref_logits=double_ref
    )
    eager = torch.empty_like(out)
    row_softmax.logit_gradients(
        logits, target_ids, stats, gradients, transform, out=eager, ref_logits=ref_logits
    )
    logit_gradients(logits, target_ids, stats, gradients, transform, out=out, ref_logits=ref_logits)
    return out, want, eager


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("with_all", (False, True))
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_gradients(transform: LogitTransform, with_all: bool, dtype: torch.dtype) -> None:
    """Surrogate, entropy and exact-KL terms through the transform, rounded once."""
    logits = make_logits(5, 4099)
    transform.apply_(logits)
    got, want, eager = run_gradients(
        logits, torch.empty_like(logits, dtype=dtype), transform, with_all
    )
    assert_close(got, want, eager, is_gradient=True)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_in_the_logits_memory(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """In place, also at half the width: the same bits as in memory of their own."""
    logits = make_logits(*shape)
    out = logits.clone().view(dtype)[:, : shape[1]]
    in_place = logits.view(dtype)[:, : shape[1]]
    apart, want, eager = run_gradients(
        logits.clone(), torch.empty_like(out), TRANSFORMS["plain"], True
    )
    got, _, _ = run_gradients(logits, in_place, TRANSFORMS["plain"], True)
    assert torch.equal(got, apart)
    assert_close(got, want, eager, is_gradient=True)


def test_strided_rows() -> None:
    """Rows of a wider buffer, and rows further apart than a row: the columns between stay."""
    buffer = make_logits(9, 1100)
    before, logits = buffer.clone(), buffer[::2, :1000]
    check_statistics(logits, None, with_entropy=True)
    run_gradients(logits, logits, TRANSFORMS["plain"], False)
    assert torch.equal(buffer[1::2], before[1::2])
    assert torch.equal(buffer[:, 1000:], before[:, 1000:])


def test_uneven_overlap_is_refused() -> None:
    """An output that lies across the logits' rows would overwrite what is still to be read."""
    buffer = make_logits(4, 64)
    logits, out = buffer[:, :32], buffer.view(torch.bfloat16)[:, 32:64]
    stats = row_statistics(logits, make_targets(4, 32), with_entropy=False)
    with pytest.raises(ValueError, match="out: got memory that overlaps"):
        logit_gradients(
            logits,
            make_targets(4, 32),
            stats,
            make_gradients(4, False),
            TRANSFORMS["plain"],
            out=out,
        )


def test_other_dtypes_are_refused() -> None:
    """The message names the argument, what came and what was wanted."""
    with pytest.raises(
        ValueError, match=r"logits: got torch.float64 .* wanted \[C, V\] in float32"
    ):
        row_statistics(make_logits(2, 3).double(), make_targets(2, 3), with_entropy=False)
