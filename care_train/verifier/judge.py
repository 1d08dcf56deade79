"""A language model as judge of open-ended answers, over an OpenAI-compatible endpoint."""

import os
import re
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any
from urllib.parse import urlsplit

from care_train.config import JudgeSettings
from care_train.data.answers import accepted_answers
from care_train.verifier.answers import MAX_ANSWER_CHARS
from care_train.verifier.responses import Item, Verdict

_FIELD = re.compile(r"\{(question|answer|response)\}")
_VERDICT = re.compile(r"\W*(?:VERDICT\W+)?(IN)?CORRECT\W*", re.IGNORECASE)
_TAG = re.compile(r"[<\uff1c\u2039\ufe64](?=\s*/?\s*[a-zA-Z])")
"""The start of what a reader may take for a tag."""
_OPENAI = "https://api.openai.com"
_CONFIRMED = "CARE_TRAIN_KEYS"
"""The variable that says which key goes where: it is set by whoever starts the run, while the
settings may come from others."""
_RETRIES = 3
_TIMEOUT = 60.0
"""Seconds per request."""
_MAX_TOKENS = 2048
"""Of a reply: room to think first, and an end, within its seconds, for one that repeats itself."""
_CONCURRENCY = 16
_MAX_CACHED = 100_000


Case = tuple[str, str, str]
"""Question, key and answer; the last is untrusted and of bounded length."""


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
        self._key, self._hint = _key_of(settings.base_url or "")
        self._client = openai.OpenAI(
            base_url=settings.base_url,
            api_key=self._key or "none",
            timeout=_TIMEOUT,
            max_retries=_RETRIES,
        )
        self._options: dict[str, Any] = {"temperature": 0.0, "max_tokens": _MAX_TOKENS}
        self._verdict = lru_cache(maxsize=_MAX_CACHED)(self._ask)

    def is_asked(self, item: Item, verdict: Verdict) -> bool:
        """Whether a wrong answer is of a type that is judged, and short enough to be one."""
        is_judged = verdict.accuracy == 0 and verdict.answer_type in self._settings.types
        return is_judged and len(item.predicted) <= max(MAX_ANSWER_CHARS, 2 * len(item.expected))

    def judge(self, answers: Sequence[tuple[str, Item]]) -> list[Verdict]:
        """A verdict per answer to a question, in order; a reply without one is a wrong answer.

        Raises:
            ValueError: the endpoint does not answer, or answers with something that is no chat
                completion: a broken judge must not look like wrong answers.
        """
        cases = [(question, i.expected, i.predicted.strip()) for question, i in answers]
        distinct = list(dict.fromkeys(cases))
        with ThreadPoolExecutor(_CONCURRENCY) as threads:
            found = dict(zip(distinct, threads.map(self._verdict, distinct), strict=True))
        return [found[case] for case in cases]

    def _ask(self, case: Case) -> Verdict:
        question, expected, predicted = case
        keys = " or ".join(accepted_answers(expected))
        # What closes the candidate's part of the prompt must not come from the candidate.
        predicted = _TAG.sub("&lt;", predicted)
        fields = {"question": question, "answer": keys, "response": predicted}
        content = _FIELD.sub(lambda match: fields[match[1]], self._settings.prompt)
        fault = ""
        for attempt in range(_RETRIES + 1):
            if attempt:
                time.sleep(min(0.5 * 2 ** (attempt - 1), 8.0))
            try:
                reply = self._reply(content)
            except self._openai.OpenAIError as error:
                raise self._failed(f"{type(error).__name__}: {error}") from None
            except ValueError as error:
                fault = f"a body that is no JSON ({error})"
                continue
            choices = getattr(reply, "choices", None)
            if message := getattr(choices[0], "message", None) if choices else None:
                return read_reply(message.content or "")
            got = reply.model_dump_json() if hasattr(reply, "model_dump_json") else repr(reply)
            fault = f"no choices with a message in {got[:200]}"
        raise self._failed(fault)

    def _reply(self, content: str) -> Any:
        """What the endpoint sends, asked again without an option that its model refuses."""
        options = self._options
        try:
            return self._client.chat.completions.create(
                model=self._settings.model,
                messages=[{"role": "user", "content": content}],
                **options,
            )
        except self._openai.BadRequestError as error:
            taken = _without_refused(options, str(error))
            if taken == options:
                raise
            self._options = taken
            return self._reply(content)

    def _failed(self, got: str) -> ValueError:
        # A server may repeat what it was sent.
        got = got.replace(self._key, "***") if self._key else got
        return ValueError(
            f"reward.judge: {self._settings.base_url}: {self._settings.model}: got {got} after "
            f"{_RETRIES + 1} tries, wanted a reply: start the server, or correct "
            f"reward.judge{self._hint}"
        )


def _without_refused(options: dict[str, Any], error: str) -> dict[str, Any]:
    """The request's options without those that an error says are not supported.

    OpenAI's reasoning models (gpt-5) take no temperature, and a limit under another name:
    https://github.com/griptape-ai/ComfyUI-Griptape/issues/312. Older servers know the old one only.
    """
    if "not support" not in error:
        return options
    taken = {name: value for name, value in options.items() if name not in error}
    if taken.keys() != options.keys() and "max_tokens" not in taken:
        taken["max_completion_tokens"] = _MAX_TOKENS
    return taken


def _key_of(base_url: str) -> tuple[str, str]:
    """The key that the environment gives to the endpoint, and for errors how to give it one."""
    url = urlsplit(base_url)
    end = f"@{url.scheme}://{url.netloc}"
    for pair in (*os.environ.get(_CONFIRMED, "").split(), f"OPENAI_API_KEY@{_OPENAI}"):
        if pair.endswith(end) and (key := os.environ.get(pair.removesuffix(end))):
            return key, ""
    return "", f"; to send it the key in a variable MY_KEY, set {_CONFIRMED}=MY_KEY{end}"


def read_reply(text: str) -> Verdict:
    """CORRECT or INCORRECT, which the last line must be: elsewhere they are no verdict.

    Case, emphasis, punctuation and a leading `Verdict:` change nothing.
    """
    lines = text.strip().splitlines()
    verdict = _VERDICT.fullmatch(lines[-1]) if lines else None
    if verdict is None:
        said = f"{lines[-1][-60:]!r}" if lines else "nothing"
        return Verdict(0.0, f"the judge's last line is neither CORRECT nor INCORRECT: {said}")
    right = verdict[1] is None
    return Verdict(float(right), "the judge agrees" if right else "the judge disagrees")
