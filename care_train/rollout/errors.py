"""How rollout engines fail. Without torch, so that the command line can name them."""

_SIGNS = (
    *("out of memory", "can't allocate memory", "not enough memory", "bad_alloc"),
    "status_alloc_failed",  # cuBLAS and cuDNN
)


class RolloutError(RuntimeError):
    """A rollout engine failed; the message says in what and how."""

    advice = ""
    """What to do before the run can go on, after the message."""


class NotFiniteLogitsError(RolloutError):
    """The policy's logits are NaN or infinite: no token can be sampled from them."""


class RolloutServerError(RolloutError):
    """The server cannot be reached, is late, or could not do what it was asked."""

    advice = "; start the server again (care-train serve)"

    def __init__(self, message: str, status: int | None = None) -> None:
        """
        Args:
            message: for people.
            status: HTTP's, where the server answered.
        """
        super().__init__(message)
        self.status = status


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says so: Python's own, torch's on a GPU, or its allocator's on the CPU."""
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in _SIGNS)
