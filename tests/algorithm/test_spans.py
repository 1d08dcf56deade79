"""Where rationale and answer lie, in text and in tokens (Sec. 3.1; Algorithm 1, line 1)."""

import time
from itertools import accumulate

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from care_train.algorithm.spans import TextSpans, parse_spans, token_spans
from care_train.algorithm.types import Spans


def parts(text: str, **tags: str) -> tuple[str | None, ...]:
    """The texts of think, think content, answer and answer content."""
    spans = parse_spans(text, **tags)
    ranges = (spans.think, spans.think_content, spans.answer, spans.answer_content)
    return tuple(None if span is None else text[slice(*span)] for span in ranges)


def locate(pieces: list[str], num_prefix_tokens: int = 0) -> Spans:
    """Spans of a response whose tokens have these texts."""
    ends = list(accumulate(len(piece) for piece in pieces))
    return token_spans(parse_spans("".join(pieces)), ends, num_prefix_tokens)


class TestText:
    """`parse_spans`."""

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            (
                "<think>a</think> <answer>b</answer>",
                ("<think>a</think>", "a", "<answer>b</answer>", "b"),
            ),
            ("<think></think><answer></answer>", ("<think></think>", "", "<answer></answer>", "")),
            *[
                (text, (None, None, None, None))
                for text in ("a b", "", "a</think> b</answer>", "</answer><answer>")
            ],
            # Tags are exact.
            *[
                (text, (None, None, None, None))
                for text in ("<Think>a</Think>", "< think>a</think>")
            ],
            ("<answer>b</answer>", (None, None, "<answer>b</answer>", "b")),
            # An unclosed think runs to the end; an unclosed answer is none.
            ("<think>a", ("<think>a", "a", None, None)),
            (
                "<think>a <answer>b</answer> c",
                (
                    *("<think>a <answer>b</answer> c", "a <answer>b</answer> c"),
                    "<answer>b</answer>",
                    "b",
                ),
            ),
            ("<think>a</think> <answer>b", ("<think>a</think>", "a", None, None)),
            # A second rationale is text like any other.
            ("</think>a<think>b", ("<think>b", "b", None, None)),
            ("<think>a</think><think>b</think>", ("<think>a</think>", "a", None, None)),
        ],
    )
    def test_where_the_spans_lie(self, text, expected):
        """Think, its content, answer, its content."""
        assert parts(text) == expected

    @pytest.mark.parametrize(
        ("text", "answer"),
        [
            ("<answer>a</answer> <answer>b</answer>", "b"),
            ("<answer>a</answer> <answer>b", "a"),
            ("<answer>a <answer>b</answer>", "b"),
            ("<think><answer>a</answer></think> <answer>b</answer>", "b"),
            ("<think>x <answer>a</answer> y</think> z", "a"),
            ("<answer>a</answer></answer>", "a"),
            ("<answer>a</answer> so </answer>", "a"),
            ("</answer><answer>a</answer>", "a"),
        ],
    )
    def test_the_last_complete_answer_pair_counts(self, text, answer):
        """One answer is scored and credited: the last that has both tags."""
        assert parts(text)[3] == answer

    def test_configured_tags(self):
        """Sec. 8.2: `prompt.think_tag: reasoning`; the default tags then mean nothing."""
        text = "<think>a</think><reasoning>b</reasoning><answer>c</answer><final>d</final>"
        expected = ("<reasoning>b</reasoning>", "b", "<final>d</final>", "d")
        assert parts(text, think_tag="reasoning", answer_tag="final") == expected

    @pytest.mark.parametrize(
        "piece",
        ["<", "<think>", "</think>", "<answer>", "</answer>", "<answer", "</answer", "</", "a<a"],
    )
    @pytest.mark.parametrize("head", ["", "<think>", "<answer>"])
    def test_hostile_text_takes_linear_time(self, piece, head):
        """Two megabytes of tags or half tags: far below a second, where quadratic takes hours."""
        text = head + piece * (2_000_000 // len(piece))
        start = time.perf_counter()
        spans = parse_spans(text)
        assert time.perf_counter() - start < 1.0
        assert (spans.think is None) == (head != "<think>" and piece != "<think>")


class TestTokens:
    """`token_spans`."""

    @pytest.mark.parametrize(
        ("pieces", "num_prefix", "expected"),
        [
            # One token per tag: tags with their content, contents without.
            ("<think>|a| b|</think>| |<answer>|c|</answer>", 0, ((0, 4), (1, 3), (5, 8), (6, 7))),
            # BPE merges tags with their neighbours: a token belongs where it touches a character.
            (
                "<th|ink|>a| b|.</|think|>\n<|answer|>4|2</|answer>",
                *(0, ((0, 7), (2, 5), (6, 11), (8, 10))),
            ),
            ("<think>a</think><answer>b</answer>", 0, ((0, 1),) * 4),
            # Cut by the length limit: T_think counts all that was reasoned.
            ("x|<think>|a| b", 0, ((1, 4), (2, 4), None, None)),
            # Spans may overlap; each is mapped on its own.
            (
                "<think>|a|<answer>|b|</answer>|c|</think>",
                *(0, ((0, 7), (1, 6), (2, 5), (3, 4))),
            ),
            # Empty contents have no tokens, also where `></` is one token.
            ("<think>|</think>|<answer>|</answer>", 0, ((0, 2), (1, 1), (2, 4), (3, 3))),
            ("<think|></|think>", 0, ((0, 3), (1, 1), None, None)),
            # Reflection: spans count from the first sampled token; forced ones are not in them.
            (
                "<think>|bad|\n|cue|\n|good|</think>| |<answer>|7|</answer>",
                *(5, ((0, 2), (0, 1), (3, 6), (4, 5))),
            ),
            ("<think>|bad|cue|more| and| more", 3, ((0, 3), (0, 3), None, None)),
            # What lies, or ends, in forced tokens is no part of the response.
            ("<think>|a|</think>|<answer>|b|</answer>|cue|x|y", 7, (None,) * 4),
            ("<answer>|a|</answer>|x", 3, (None,) * 4),
            # An answer opened there is one from its first sampled token; of a tag split there only
            # the rest is in the span, and no content is left.
            ("<answer>|a|b|</answer>", 2, (None, None, (0, 2), (0, 1))),
            ("<answer>|a|</ans|wer>", 3, (None, None, (0, 1), None)),
        ],
    )
    def test_by_hand(self, pieces, num_prefix, expected):
        """Tokens' texts between bars, the first of them forced."""
        found = locate(pieces.split("|"), num_prefix)
        assert found == Spans(*expected)
        assert found.well_formed == (expected[2] is not None)
        for span, length in ((expected[1], found.think_length), (expected[3], found.answer_length)):
            assert length == (span[1] - span[0] if span else 0)

    def test_eos_is_in_no_span(self):
        """EOS has no text and may be left out of the offsets; an unclosed think ends before it."""
        spans = parse_spans("<think>a")
        assert token_spans(spans, [7, 8]) == token_spans(spans, [7, 8, 8])
        assert token_spans(spans, [7, 8, 8]).think == (0, 2)

    def test_characters_split_over_tokens(self):
        """A token ending inside a character ends before it; the one completing it holds it.

        The two characters take three tokens each; a span has all tokens between its ends.
        """
        ends = [7, 7, 7, 8, 8, 8, 9, 17]
        spans = token_spans(parse_spans("<think>好嗎</think>"), ends)
        assert spans.think == (0, 8)
        assert spans.think_content == (3, 7)

    def test_text_after_the_last_token(self):
        """Trailing incomplete bytes decode to a character that no token ends at."""
        assert token_spans(parse_spans("<think>a\ufffd"), [7, 8, 8]).think == (0, 3)


_PIECES = ["<think>", "</think>", "<answer>", "</answer>", "a", " b", ".", "<", ">", "é", "好"]


@st.composite
def tokenised(draw) -> tuple[TextSpans, list[int], int]:
    """A text with or without tags, cut into tokens anywhere, some of them empty; and a prefix."""
    text = "".join(draw(st.lists(st.sampled_from(_PIECES), max_size=14)))
    cuts = draw(st.lists(st.integers(0, len(text)), max_size=14))
    ends = sorted([*cuts, len(text)])
    return parse_spans(text), ends, draw(st.integers(0, len(ends)))


@settings(max_examples=100)
@given(tokenised())
def test_spans_hold_exactly_the_tokens_that_touch_them(case):
    """A token is in a span if, and only if, it shares a character with it."""
    spans, ends, num_prefix = case
    starts = [0, *ends][: len(ends)]
    found = token_spans(spans, ends, num_prefix)
    for name in ("think", "think_content", "answer", "answer_content"):
        span = getattr(spans, name)
        touching = [
            i - num_prefix
            for i in range(num_prefix, len(ends))
            if span is not None and max(starts[i], span[0]) < min(ends[i], span[1])
        ]
        held = getattr(found, name)
        if held is None:
            assert touching == []
            continue
        with_text = [i for i in range(*held) if ends[i + num_prefix] > starts[i + num_prefix]]
        assert with_text == touching
