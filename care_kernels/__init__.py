"""Drop-in policy losses that never hold full-vocabulary logits or log-probs.

Depends on torch and triton alone, so any trainer can import it.
"""

from care_kernels.care_loss import CareLoss, CareLossOutput, care_loss
from care_kernels.head import head_parameters
from care_kernels.linear_log_probs import linear_log_probs
from care_kernels.linear_policy_loss import PolicyLoss, linear_policy_loss
from care_kernels.rationale_distance import rationale_distance
from care_kernels.region_weights import token_advantages
from care_kernels.vocab_parallel import VocabShard

__all__ = [
    "CareLoss",
    "CareLossOutput",
    "PolicyLoss",
    "VocabShard",
    "care_loss",
    "head_parameters",
    "linear_log_probs",
    "linear_policy_loss",
    "rationale_distance",
    "token_advantages",
]
