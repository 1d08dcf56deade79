"""Drop-in policy losses that never hold full-vocabulary logits or log-probs.

Depends on torch and triton alone, so any trainer can import it.
"""

from care_kernels.care_loss import CareLoss, care_loss
from care_kernels.heads import head_parameters
from care_kernels.log_probs import linear_log_probs
from care_kernels.loss import linear_policy_loss
from care_kernels.objective import Cispo, Clip, PolicyLoss, Sapo
from care_kernels.rationale_distance import cosine_distance, pool_rationale, rationale_distance
from care_kernels.region_weights import Regions, token_advantages
from care_kernels.vocab_parallel import VocabShard

__all__ = [
    "CareLoss",
    "Cispo",
    "Clip",
    "PolicyLoss",
    "Regions",
    "Sapo",
    "VocabShard",
    "care_loss",
    "cosine_distance",
    "head_parameters",
    "linear_log_probs",
    "linear_policy_loss",
    "pool_rationale",
    "rationale_distance",
    "token_advantages",
]
