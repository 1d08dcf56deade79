"""Where rationale and answer lie, in text and in tokens, and Eq. 1 (Algorithm 1, lines 1-2)."""

from dataclasses import replace
from functools import cache
from itertools import accumulate
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from care_kernels import pool_rationale
from care_train.algorithm.spans import (
    TextSpans,
    parse_spans,
    rationale_span,
    reward,
    token_spans,
)
from care_train.algorithm.types import Spans
from care_train.models.prompts import TokenText
from tests.algorithm.builders import broken, make_rollout, right, wrong

TEXTS = [
    ("<think>a</think> <answer>b</answer>", "a", "b"),
    ("<think></think><answer></answer>", "", ""),
    *[(text, None, None) for text in ("a b", "", "</answer><answer>", "< think>a</think>")],
    # An unclosed think runs to the end; an unclosed answer is none.
    ("<think>a <answer>b</answer> c", "a <answer>b</answer> c", "b"),
    ("<think>a</think> <answer>b", "a", None),
    # A second rationale is text like any other.
    ("</think>a<think>b", "b", None),
    ("<think>a</think><think>b</think>", "a", None),
    # One answer is scored and credited: the last that has both tags.
    ("<answer>a</answer> <answer>b", None, "a"),
    ("<answer>a <answer>b</answer>", None, "b"),
    ("<think><answer>a</answer></think> <answer>b</answer>", "<answer>a</answer>", "b"),
    ("<answer>a</answer> so </answer>", None, "a"),
]


def cut(text: str, span: tuple[int, int] | None) -> str | None:
    return None if span is None else text[slice(*span)]


@pytest.mark.parametrize(("text", "think", "answer"), TEXTS)
def test_spans_in_text(text, think, answer):
    """Contents as listed, in spans that have the tags too."""
    spans = parse_spans(text)
    assert (cut(text, spans.think_content), cut(text, spans.answer_content)) == (think, answer)
    closed = None if think is None else f"<think>{think}</think>"
    is_closed = closed is None or closed in text
    assert cut(text, spans.think) == (closed if is_closed else f"<think>{think}")
    assert cut(text, spans.answer) == (None if answer is None else f"<answer>{answer}</answer>")


@pytest.mark.parametrize(
    ("pieces", "num_prefix", "expected"),
    [
        # BPE merges tags with their neighbours: a token belongs where it touches a character.
        (
            "<th|ink|>a| b|.</|think|>\n<|answer|>4|2</|answer>",
            *(0, ((0, 7), (2, 5), (6, 11), (8, 10))),
        ),
        # Cut by the length limit: T_think counts all that was reasoned.
        ("x|<think>|a| b", 0, ((1, 4), (2, 4), None, None)),
        # Empty contents have no tokens, also where `></` is one token.
        ("<think>|</think>|<answer>|</answer>", 0, ((0, 2), (1, 1), (2, 4), (3, 3))),
        ("<think|></|think>", 0, ((0, 3), (1, 1), None, None)),
        # Reflection: spans count from the first sampled token; forced ones are not in them.
        (
            "<think>|bad|\n|cue|\n|good|</think>| |<answer>|7|</answer>",
            *(5, ((0, 2), (0, 1), (3, 6), (4, 5))),
        ),
        # What lies, or ends, in forced tokens is no part of the response.
        ("<think>|a|</think>|<answer>|b|</answer>|cue|x|y", 7, (None,) * 4),
        # Of a tag that is split there only the rest is in the span, and no content is left.
        ("<answer>|a|</ans|wer>", 3, (None, None, (0, 1), None)),
    ],
)
def test_spans_in_tokens(pieces, num_prefix, expected):
    """Tokens' texts between bars, the first of them forced."""
    texts = pieces.split("|")
    found = token_spans(parse_spans("".join(texts)), [*accumulate(map(len, texts))], num_prefix)
    assert found == Spans(*expected)
    assert found.well_formed == (expected[2] is not None)
    for span, length in ((expected[1], found.think_length), (expected[3], found.answer_length)):
        assert length == (span[1] - span[0] if span else 0)


def test_tokens_without_a_character_of_their_own():
    """A token that ends inside a character ends before it: here each has three. EOS has no text and
    may be left out of the offsets."""
    found = token_spans(parse_spans("<think>好嗎</think>"), [7, 7, 7, 8, 8, 8, 9, 17])
    assert (found.think, found.think_content) == ((0, 8), (3, 7))
    found = token_spans(parse_spans("<think>a"), [7, 8])
    assert (found.think, found.think_content) == ((0, 2), (1, 2))


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
        span, held = getattr(spans, name), getattr(found, name)
        touching = [
            i - num_prefix
            for i in range(num_prefix, len(ends))
            if span is not None and max(starts[i], span[0]) < min(ends[i], span[1])
        ]
        inside = range(*held) if held is not None else ()
        assert touching == [i for i in inside if ends[i + num_prefix] > starts[i + num_prefix]]


NO_THINK = replace(wrong(), spans=Spans(None, None, (5, 8), (6, 7)), token_ids=tuple(range(9)))
UNCLOSED = replace(wrong(), spans=Spans((0, 6), (1, 6), None, None), token_ids=tuple(range(6)))


@pytest.mark.parametrize(
    ("rollout", "expected"),
    [
        (right(think=4, answer=2), (1, 5)),
        (UNCLOSED, (1, 6)),
        (NO_THINK, (0, 5)),
        (replace(broken(think=None), token_ids=(1, 2, 3)), (0, 3)),
        (make_rollout(0, 0, think=None), (0, 0)),
    ],
    ids=["think content", "unclosed think", "before the answer", "no tags", "answer at once"],
)
def test_what_the_rationale_embedding_pools(rollout, expected):
    """Sec. 3.3: the think content; without it what precedes the answer; else the whole response.

    Where nothing precedes the answer it is the zero vector, at distance 1 from everything.
    """
    assert rationale_span(rollout) == expected
    pooled = pool_rationale(torch.ones(1, 20, 3), torch.tensor([expected]))
    assert bool(pooled.any()) == (expected[0] < expected[1])


def test_reward_mixes_accuracy_and_format():
    """Eq. 1: r = (1 - lambda) acc + lambda fmt."""
    assert reward(0.25, 0.5, 0.4) == pytest.approx(0.35)
    assert (reward(1.0, 0.0, 0.1), reward(0.0, 1.0, 0.1)) == pytest.approx((0.9, 0.1))


CORPUS = [
    "<think>the sides are 3. They are equal.</think> <answer>3</answer>",
    "the sides of a triangle.</think> the answer is.</think> <answer>",
    "naïve café — 三角形的角度是九十度 🙂🙃",
    "угол равен ∠ABC = 90° ≠ 45°",
]


@cache
def tokenizer():
    from transformers import Qwen2Tokenizer

    trained = Qwen2Tokenizer().train_new_from_iterator(
        CORPUS * 3,
        vocab_size=400,
        new_special_tokens=["<|im_end|>", "<|image_pad|>"],
        show_progress=False,
    )
    # As Qwen3 has it: the tag is a token of its own, and no special one.
    trained.add_tokens(["<tool_call>"])
    return trained


@cache
def token_text() -> TokenText:
    return TokenText(tokenizer())


def encode(text: str) -> list[int]:
    return tokenizer()(text, add_special_tokens=False)["input_ids"]


def reference(token_ids) -> str:
    return tokenizer().decode(
        token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )


ANY_IDS = st.deferred(lambda: st.lists(st.integers(0, len(tokenizer()) - 1), max_size=40))
WORDS = [*CORPUS, "<think>", "</think>", "<tool_call>", "🙂", "é", " ", "\n", "x", "的"]


@settings(max_examples=100)
@given(ANY_IDS)
def test_any_ids_decode_as_the_tokenizer_decodes_them(token_ids):
    """Special tokens skipped, broken bytes as U+FFFD, whatever the policy samples."""
    text, ends = token_text().decode(token_ids)
    assert text == reference(token_ids)
    assert len(ends) == len(token_ids) and ends == sorted(ends)
    assert not ends or ends[-1] <= len(text)


@settings(max_examples=60)
@given(st.lists(st.sampled_from(WORDS), max_size=8).map("".join))
def test_offsets_are_those_of_whole_characters(text):
    """A token's text ends after the last character its bytes complete."""
    token_ids = encode(text)
    decoded, ends = token_text().decode(token_ids)
    assert decoded == text
    for count, end in enumerate(ends, start=1):
        # The reference shows the bytes of an unfinished character as U+FFFD.
        assert text[:end] == reference(token_ids[:count]).rstrip("\ufffd")


def test_tokens_of_no_text_and_of_part_of_a_character():
    """EOS, images and ids beyond the vocabulary have no text; `<tool_call>`, which is not special,
    has; an unfinished character is U+FFFD, and no token ends after it."""
    end, image, call = tokenizer().convert_tokens_to_ids(
        ["<|im_end|>", "<|image_pad|>", "<tool_call>"]
    )
    (letter,), snowman = encode("x"), encode("☃")
    decode = token_text().decode
    assert decode([image, letter, image, letter, end]) == ("xx", [0, 1, 1, 2, 2])
    assert decode([call]) == ("<tool_call>", [11])
    assert decode([len(tokenizer()) + 5]) == ("", [0])
    assert len(snowman) == 3 and decode(snowman) == ("☃", [0, 0, 1])
    assert decode(snowman[:2]) == ("\ufffd", [0, 0])


@pytest.mark.parametrize("decoder", [None, "Metaspace()", "WordPiece()"])
def test_a_tokenizer_without_byte_level_decoder_is_refused(decoder):
    """Offsets by bytes need a byte-level BPE: anything else is an error that says so."""
    other = SimpleNamespace(backend_tokenizer=SimpleNamespace(decoder=decoder))
    with pytest.raises(ValueError, match="wanted a byte-level BPE tokenizer"):
        TokenText(other)
