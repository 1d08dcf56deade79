"""Eq. 1: score a response against its row's answer, treating model output as untrusted."""

from care_train.verifier.answers import Verdict, compare
from care_train.verifier.format import format_score
from care_train.verifier.score import Score, Verifier

__all__ = ["Score", "Verdict", "Verifier", "compare", "format_score"]
