"""Eq. 1: score a response against its row's answer, treating model output as untrusted."""

from care_train.verifier.answers import AnswerType, infer_type
from care_train.verifier.functions import TrainerState
from care_train.verifier.notation import normalize, normalize_words
from care_train.verifier.responses import Item, Response, Verdict, format_score
from care_train.verifier.score import Score, Verifier
from care_train.verifier.verify import WorkerPool, verify, verify_batch

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
    "normalize_words",
    "verify",
    "verify_batch",
]
