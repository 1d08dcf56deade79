"""95 % intervals: of a mean over seeds, and of a share of questions."""

import math
from collections.abc import Sequence
from statistics import fmean, stdev

_Z = 1.96


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean over seeds and the half width of its 95 % interval, as the paper reports them.

    Args:
        values: one number per seed.

    Returns:
        The mean, and 1.96 s / sqrt(n) with s the sample standard deviation; NaN for one seed,
        which says nothing about the spread.

    Raises:
        ValueError: there are no values.
    """
    if not values:
        raise ValueError("values: got none, wanted at least one seed")
    if len(values) == 1:
        return float(values[0]), math.nan
    return fmean(values), _Z * stdev(values) / math.sqrt(len(values))


def proportion_interval(successes: float, total: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a binomial share: unlike 1.96 sigma, it stays inside [0, 1].

    Args:
        successes: how many of `total` succeeded; fractions (partial credit) are fine.
        total: how many there were.

    Returns:
        The lower and the upper end.

    Raises:
        ValueError: `total` is not positive, or `successes` outside [0, total].
    """
    if total < 1:
        raise ValueError(f"total: got {total}, wanted at least 1")
    if not 0 <= successes <= total:
        raise ValueError(f"successes: got {successes}, wanted 0 to {total}")
    share = successes / total
    scale = 1 + _Z**2 / total
    centre = (share + _Z**2 / (2 * total)) / scale
    half = _Z * math.sqrt(share * (1 - share) / total + _Z**2 / (4 * total**2)) / scale
    return max(0.0, centre - half), min(1.0, centre + half)
