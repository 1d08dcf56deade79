"""Eq. 1 (Sec. 3.1; Algorithm 1, line 2)."""


def reward(accuracy: float, format_score: float, format_weight: float) -> float:
    """Eq. 1: r = (1 - lambda) acc + lambda fmt.

    Args:
        accuracy: acc in [0, 1].
        format_score: fmt in [0, 1].
        format_weight: lambda in [0, 1].
    """
    return (1.0 - format_weight) * accuracy + format_weight * format_score
