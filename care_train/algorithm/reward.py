"""Eq. 1 (Sec. 3.1; Algorithm 1, line 2)."""


def reward(accuracy: float, format_score: float, format_weight: float) -> float:
    """Eq. 1: r = (1 - lambda) acc + lambda fmt.

    Args:
        accuracy: acc in [0, 1].
        format_score: fmt in [0, 1].
        format_weight: lambda in [0, 1].
    """
    return (1.0 - format_weight) * accuracy + format_weight * format_score


def overlong_penalty(num_tokens: int, limit: int, buffer: float) -> float:
    """DAPO's soft overlong punishment (arXiv:2503.14476, Eq. 13), in [-1, 0].

    Args:
        num_tokens: |y|.
        limit: L_max, the length limit of a response.
        buffer: L_cache as a share of L_max; over it the punishment grows from 0 to -1.
    """
    cache = buffer * limit
    return -max(num_tokens - (limit - cache), 0.0) / cache
