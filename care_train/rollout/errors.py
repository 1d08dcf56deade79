"""How rollout engines fail. Without torch, so that the command line can name them."""


class RolloutError(RuntimeError):
    """A rollout engine failed; the message says in what and how."""

    advice = ""
    """What to do before the run can go on, after the message."""


class NotFiniteLogitsError(RolloutError):
    """The policy's logits are NaN or infinite: no token can be sampled from them."""
