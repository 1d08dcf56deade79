"""Symbolic equality by math-verify. Parses model output: imported in worker processes alone."""

import logging
import re
from functools import lru_cache
from typing import Any

from math_verify import LatexExtractionConfig, parse, verify

from care_train.verifier.expressions import to_latex

_CONFIG = [LatexExtractionConfig()]

# It warns at each call that it has no time limit of its own: the process has one.
logging.getLogger("math_verify").setLevel(logging.ERROR)


class MathVerify:
    """Symbolic algebra, bounded by nothing: a process that takes too long is killed."""

    def equal(self, predicted: str, expected: str) -> bool:
        """Whether two expressions are equal; False where either is none."""
        key, got = _parse_key(to_latex(expected)), _parse(to_latex(predicted))
        # Without a time limit of its own, which would take the worker's alarm away.
        return bool(key and got) and verify(key, got, timeout_seconds=0)

    def value(self, text: str) -> str:
        """The decimal value of a constant expression to 30 digits, or ""."""
        parsed = _parse(to_latex(text))
        if not parsed or isinstance(parsed[0], str) or getattr(parsed[0], "free_symbols", True):
            return ""
        value = str(parsed[0].evalf(30))
        return value if re.fullmatch(r"-?[0-9]+(\.[0-9]+)?", value) else ""


@lru_cache(maxsize=512)
def _parse_key(text: str) -> list[Any]:
    return _parse(text)


def _parse(text: str) -> list[Any]:
    # A dollar sign would end the environment.
    text = text.replace("$", "")
    parsed = parse(f"${text}$", _CONFIG, fallback_mode="no_fallback", parsing_timeout=0)
    return list(parsed)
