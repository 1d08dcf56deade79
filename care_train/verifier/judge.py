"""A language model as judge of open-ended answers, over an OpenAI-compatible endpoint."""

import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from care_train.settings import JudgeSettings
from care_train.verifier.answers import MAX_ANSWER_CHARS
from care_train.verifier.types import Item, Verdict

_FIELD = re.compile(r"\{(question|answer|response)\}")
_WORD = re.compile(r"\b(IN)?CORRECT\b")
_TAGS = re.compile(r"</?(?:question|reference|candidate)>", re.IGNORECASE)
_MAX_CACHED = 100_000


@dataclass(frozen=True)
class Case:
    """An answer to judge."""

    question: str
    expected: str
    predicted: str
    """Untrusted, of bounded length."""


def case_of(question: str, item: Item) -> Case | None:
    """An answer as the judge is asked about it; None where it is too long to be one."""
    if len(item.predicted) > max(MAX_ANSWER_CHARS, 2 * len(item.expected)):
        return None
    return Case(question, item.expected, item.predicted.strip())


class Judge:
    """Asks the model about each distinct case once."""

    def __init__(self, settings: JudgeSettings) -> None:
        # Imported here: without a judge the package is not needed.
        try:
            import openai
        except ImportError:
            raise ValueError(
                "reward.judge: got no package openai, wanted it: pip install openai"
            ) from None
        self._settings = settings
        self._openai = openai
        self._client = openai.OpenAI(
            base_url=settings.base_url,
            api_key=os.environ.get(settings.api_key_env) or "none",
            timeout=settings.timeout,
            max_retries=settings.retries,
        )
        self._known: dict[Case, Verdict] = {}

    def judge(self, cases: Sequence[Case]) -> list[Verdict]:
        """A verdict per case, in order; a reply without either word is a wrong answer.

        Raises:
            ValueError: the endpoint does not answer: an unreachable judge must not look like wrong
                answers.
        """
        asked = [case for case in dict.fromkeys(cases) if case not in self._known]
        if asked:
            if len(self._known) + len(asked) > _MAX_CACHED:
                self._known = {case: self._known[case] for case in cases if case in self._known}
            with ThreadPoolExecutor(min(self._settings.concurrency, len(asked))) as threads:
                self._known |= dict(zip(asked, threads.map(self._ask, asked), strict=True))
        return [self._known[case] for case in cases]

    def _ask(self, case: Case) -> Verdict:
        fields = {
            "question": case.question,
            "answer": case.expected,
            # What closes the candidate's part of the prompt must not come from the candidate.
            "response": _TAGS.sub("", case.predicted),
        }
        content = _FIELD.sub(lambda match: fields[match[1]], self._settings.prompt)
        try:
            reply: Any = self._client.chat.completions.create(
                model=self._settings.model,
                messages=[{"role": "user", "content": content}],
                temperature=0.0,
                max_tokens=self._settings.max_tokens,
            )
        except self._openai.OpenAIError as error:
            raise ValueError(
                f"reward.judge: {self._settings.base_url}: got {type(error).__name__}: {error} "
                f"after {self._settings.retries + 1} tries, wanted a reply: start the server, or "
                "correct reward.judge"
            ) from None
        return read_reply(reply.choices[0].message.content or "")


def read_reply(text: str) -> Verdict:
    """CORRECT or INCORRECT, whichever comes last."""
    words = _WORD.findall(text.upper())
    if not words:
        return Verdict(0.0, f"the judge said neither CORRECT nor INCORRECT: {text[:60]!r}")
    right = words[-1] == ""
    return Verdict(float(right), "the judge agrees" if right else "the judge disagrees")
