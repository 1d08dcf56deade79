"""Eq. 1: score a response against its row's answer, treating model output as untrusted."""

from care_train.verifier.answers import infer_type
from care_train.verifier.format import format_score
from care_train.verifier.functions import TrainerState
from care_train.verifier.notation import normalize, normalize_mmmu, normalize_words
from care_train.verifier.pool import WorkerPool
from care_train.verifier.responses import Response
from care_train.verifier.score import Score, Verifier
from care_train.verifier.types import AnswerType, Item, Verdict
from care_train.verifier.verify import verify, verify_batch

__all__ = [
    "AnswerType",
    "Item",
    "Response",
    "Score",
    "TrainerState",
    "Verdict",
    "Verifier",
    "WorkerPool",
    "format_score",
    "infer_type",
    "normalize",
    "normalize_mmmu",
    "normalize_words",
    "verify",
    "verify_batch",
]
