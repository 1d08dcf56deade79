"""Where the rationale and the answer lie, and the reward (Sec. 3.1; Algorithm 1, lines 1-2).

Tags are found in the decoded text, because BPE merges a tag's characters with their neighbours,
and mapped to tokens by character offsets: a token belongs to a span when it touches one of its
characters.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from care_train.algorithm.types import Rollout, Spans

CharRange = tuple[int, int]


@dataclass(frozen=True)
class TextSpans:
    """Half-open character ranges in a response's text; tags included unless named content."""

    think: CharRange | None
    think_content: CharRange | None
    answer: CharRange | None
    answer_content: CharRange | None
    wrong_step: CharRange | None = None


def parse_spans(text: str, think_tag: str = "think", answer_tag: str = "answer") -> TextSpans:
    """The think span and the last complete answer pair; an unclosed think runs to the end."""
    end = max(text.rfind(f"</{answer_tag}>"), 0)
    think, think_content = _pair(text, think_tag, text.find(f"<{think_tag}>"))
    answer, answer_content = _pair(text, answer_tag, text.rfind(f"<{answer_tag}>", 0, end))
    return TextSpans(think, think_content, answer, answer_content)


def _pair(text: str, tag: str, start: int) -> tuple[CharRange | None, CharRange | None]:
    """From the opening tag at `start` to the closing one; with the tags and without."""
    if start < 0:
        return None, None
    closing = f"</{tag}>"
    inner = start + len(f"<{tag}>")
    end = text.find(closing, inner)
    if end < 0:
        return (start, len(text)), (inner, len(text))
    return (start, end + len(closing)), (inner, end)


def token_spans(spans: TextSpans, token_ends: Sequence[int], num_prefix_tokens: int = 0) -> Spans:
    """Character ranges mapped to the response's tokens.

    Args:
        spans: ranges in the text of prefix and response together.
        token_ends: for each token of prefix and response, where its text ends: non-decreasing
            character offsets. EOS, which has no text, may be left out.
        num_prefix_tokens: how many of these were forced; ranges are relative to the first sampled
            token, and a range that ends with the prefix or before is None.
    """

    def to_tokens(span: CharRange | None) -> tuple[int, int] | None:
        if span is None:
            return None
        start, end = span
        # The first token ending after `start`, and one past the first token reaching `end`.
        first = bisect_right(token_ends, start)
        last = bisect_left(token_ends, end) + 1 if end > start else first
        first, last = (
            max(first - num_prefix_tokens, 0),
            min(last, len(token_ends)) - num_prefix_tokens,
        )
        return (first, last) if last > 0 or not num_prefix_tokens else None

    answer = to_tokens(spans.answer)
    return Spans(
        think=to_tokens(spans.think),
        think_content=to_tokens(spans.think_content),
        answer=answer,
        answer_content=None if answer is None else to_tokens(spans.answer_content),
        wrong_step=to_tokens(spans.wrong_step),
    )


def rationale_span(rollout: Rollout) -> tuple[int, int]:
    """The response tokens that Eq. 4 embeds: the content of the think span.

    A response that never thinks is embedded by what precedes its answer, or as a whole.
    """
    spans = rollout.spans
    if spans.think_content is not None:
        return spans.think_content
    return 0, len(rollout.token_ids) if spans.answer is None else spans.answer[0]


def reward(accuracy: float, format_score: float, format_weight: float) -> float:
    """Eq. 1: r = (1 - lambda) acc + lambda fmt; each is in [0, 1]."""
    return (1.0 - format_weight) * accuracy + format_weight * format_score


def overlong_penalty(num_tokens: int, limit: int, buffer: float) -> float:
    """DAPO's soft overlong punishment (arXiv:2503.14476, Eq. 13), in [-1, 0].

    Args:
        num_tokens: |y|.
        limit: L_max, the length limit of a response.
        buffer: L_cache as a share of L_max; over it the punishment grows from 0 to -1.
    """
    cache = buffer * limit
    return -max(num_tokens - (limit - cache), 0.0) / cache
