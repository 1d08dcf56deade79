"""Chat messages, as TRL, verl and LLaMA-Factory write them, to one prompt and one response."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from care_train.data.columns import RowError, describe

IMAGE_PLACEHOLDER = "<image>"
"""Where an image goes in a prompt's text."""

_ROLES = {
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "system": "system",
}
"""What the roles that data sets write stand for."""

_THINK = re.compile(r"<(think|thinking|reasoning)>(.*?)</\1>", re.DOTALL)
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_FINAL = re.compile(r"^\s*\**\s*(?:the\s+)?final\s+answer\s*\**\s*:\s*\**\s*", re.IGNORECASE)
_BOX = re.compile(r"\\boxed\s*\{")
# GSM8K: the reasoning with its calculator's notes, then the key.
_HASHES = re.compile(r"^(.*?)(?:^|\s)####\s*(\S[^\n]*?)\s*$", re.DOTALL)
_CALCULATION = re.compile(r"<<[^<>]*>>")


@dataclass(frozen=True)
class Conversation:
    """A question and, where there is one, its answer."""

    prompt: str
    """The user's text; `<image>` where a part held an image."""
    images: tuple[object, ...] = ()
    """What the parts' images held, in order; none where an images column has them."""
    system: str | None = None
    response: str | None = None
    """The assistant's text."""


def read_conversation(messages: Sequence[Any], *, column: str, at: str) -> Conversation:
    """One user turn, a system turn before it and an assistant turn after it, if any.

    Messages have `role` and `content`, or `from` and `value`; contents are text or lists of parts.

    Raises:
        RowError: another shape, an unknown role, or more than one question.
    """
    texts: dict[str, list[str]] = {"system": [], "user": [], "assistant": []}
    images: list[object] = []
    for number, message in enumerate(messages, 1):
        where = f"{at}: {column}: message {number}"
        if not isinstance(message, Mapping):
            raise RowError("message", f"{where}: got {describe(message)}, wanted role and content")
        written = message.get("role") or message.get("from")
        role = _ROLES.get(written) if isinstance(written, str) else None
        if role is None:
            wanted = f"wanted one of {', '.join(_ROLES)}"
            raise RowError("message", f"{where}: role: got {written!r}, {wanted}")
        texts[role].append(_content(message, images, where))
    if len(texts["user"]) != 1 or len(texts["assistant"]) > 1:
        raise RowError(
            "several_turns",
            f"{at}: {column}: got {len(texts['user'])} user and {len(texts['assistant'])} "
            "assistant turns, wanted one question with at most one response: split the "
            "conversation",
        )
    return Conversation(
        texts["user"][0],
        tuple(images),
        "\n".join(texts["system"]) or None,
        texts["assistant"][0] if texts["assistant"] else None,
    )


def split_response(text: str) -> tuple[str | None, str | None]:
    """(rationale, answer) of a response with tags; None for what it does not have.

    `<think>`, `<thinking>` or `<reasoning>` holds the rationale. The answer is the last `<answer>`
    span, without a leading "Final Answer:".
    """
    think, answers = _THINK.search(text), _ANSWER.findall(text)
    rationale = think[2].strip() if think else None
    answer = _FINAL.sub("", answers[-1]).strip() if answers else None
    return rationale or None, answer or None


def split_solution(text: str) -> tuple[str | None, str]:
    """(rationale, answer) of an answer column, which may hold more than the final answer.

    Read are a response with tags, GSM8K's `reasoning #### answer`, and a solution whose one
    `\\boxed{...}` is the answer; any other text is the answer itself.
    """
    rationale, answer = split_response(text)
    if answer is not None:
        return rationale, answer
    if match := _HASHES.fullmatch(text):
        return _CALCULATION.sub("", match[1]).strip() or None, match[2]
    boxes = list(_BOX.finditer(text))
    if len(boxes) == 1 and (boxed := _box_content(text[boxes[0].end() :])):
        return None, boxed
    return None, text


def _box_content(text: str) -> str:
    """What stands before the brace that closes a box; empty without one."""
    depth = 1
    for place, char in enumerate(text):
        depth += {"{": 1, "}": -1}.get(char, 0)
        if depth == 0:
            return text[:place].strip()
    return ""


def _content(message: Mapping[str, Any], images: list[object], where: str) -> str:
    content = message.get("content")
    content = message.get("value") if content is None else content
    if isinstance(content, str):
        return content
    if not isinstance(content, (list, tuple)):
        raise RowError(
            "message", f"{where}: content: got {describe(content)}, wanted text or a list of parts"
        )
    return "".join(_part(part, images, where) for part in content)


def _part(part: object, images: list[object], where: str) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if isinstance(part, Mapping) and kind == "text" and isinstance(part.get("text"), str):
        return part["text"]
    if isinstance(part, Mapping) and kind in ("image", "image_url"):
        held = {key: part.get(key) for key in ("image", "image_url", "bytes", "path", "url")}
        if any(held.values()):
            images.append(held)
        return IMAGE_PLACEHOLDER
    got = repr(kind) if isinstance(part, Mapping) else describe(part)
    raise RowError("message", f"{where}: content: got a part of type {got}, wanted text or image")
