"""Drop-in policy losses that never hold full-vocabulary logits or log-probs.

Depends on torch alone, so any trainer can import it.
"""

from care_kernels.linear_log_probs import linear_log_probs
from care_kernels.linear_policy_loss import PolicyLoss, linear_policy_loss

__all__ = ["PolicyLoss", "linear_log_probs", "linear_policy_loss"]
