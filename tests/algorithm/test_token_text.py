"""Decoding sampled ids token by token: `TokenText` against the tokenizer it wraps."""

from functools import cache
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from care_train.algorithm.spans import parse_spans, token_spans
from care_train.models.prompts import TokenText

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


def reference(token_ids) -> str:
    return tokenizer().decode(
        token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )


ANY_IDS = st.deferred(lambda: st.lists(st.integers(0, len(tokenizer()) - 1), max_size=40))
PIECES = [*CORPUS, "<think>", "</think>", "<tool_call>", "🙂", "é", " ", "\n", "x", "的"]
TEXTS = st.lists(st.sampled_from(PIECES), max_size=8).map("".join)


@settings(max_examples=100)
@given(ANY_IDS)
def test_any_ids_decode_as_the_tokenizer_decodes_them(token_ids):
    """Special tokens skipped, broken bytes as U+FFFD, whatever the policy samples."""
    text, ends = token_text().decode(token_ids)
    assert text == reference(token_ids)
    assert len(ends) == len(token_ids)
    assert ends == sorted(ends)
    assert not ends or ends[-1] <= len(text)


@settings(max_examples=60)
@given(TEXTS)
def test_offsets_are_those_of_whole_characters(text):
    """A token's text ends after the last character its bytes complete."""
    token_ids = tokenizer()(text, add_special_tokens=False)["input_ids"]
    decoded, ends = token_text().decode(token_ids)
    assert decoded == text
    for count, end in enumerate(ends, start=1):
        # The reference shows the bytes of an unfinished character as U+FFFD.
        assert text[:end] == reference(token_ids[:count]).rstrip("\ufffd")


def test_merges_cross_the_tags():
    """The tokenizer trained here does merge a full stop with the tag after it."""
    token_ids = tokenizer()("They are equal.</think>", add_special_tokens=False)["input_ids"]
    pieces = [reference([token_id]) for token_id in token_ids]
    assert any("." in piece and "<" in piece for piece in pieces), pieces


def test_spans_of_a_real_tokenization():
    """The tokens of a span decode to text that holds it, and none of them could be left out."""
    text = "<think>三角形的 sides are equal.</think> <answer>九十 🙂</answer>"
    token_ids = tokenizer()(text, add_special_tokens=False)["input_ids"]
    decoded, ends = token_text().decode(token_ids)
    ranges = parse_spans(decoded)
    spans = token_spans(ranges, ends)
    assert ranges.think is not None and ranges.answer is not None
    for span, characters in ((spans.think, ranges.think), (spans.answer, ranges.answer)):
        assert span is not None
        wanted = text[slice(*characters)]
        assert wanted in reference(token_ids[slice(*span)])
        assert wanted not in reference(token_ids[span[0] + 1 : span[1]])
        assert wanted not in reference(token_ids[span[0] : span[1] - 1])


def test_special_tokens_have_no_text():
    """EOS and image placeholders end where the token before them ended."""
    end, image = tokenizer().convert_tokens_to_ids(["<|im_end|>", "<|image_pad|>"])
    (letter,) = tokenizer()("x", add_special_tokens=False)["input_ids"]
    assert token_text().decode([image, letter, image, letter, end]) == ("xx", [0, 1, 1, 2, 2])


def test_added_tokens_that_are_not_special_have_text():
    """`<tool_call>` is one id and eleven characters."""
    token_id = tokenizer().convert_tokens_to_ids("<tool_call>")
    assert token_text().decode([token_id]) == ("<tool_call>", [11])


def test_ids_beyond_the_vocabulary_have_no_text():
    """Padded vocabularies let a policy sample ids that no token has."""
    assert token_text().decode([len(tokenizer()) + 5]) == ("", [0])


def test_an_unfinished_character_at_the_end():
    """It is shown as U+FFFD in the text, and no token ends after it."""
    token_ids = tokenizer()("☃", add_special_tokens=False)["input_ids"]
    assert len(token_ids) == 3
    assert token_text().decode(token_ids) == ("☃", [0, 0, 1])
    assert token_text().decode(token_ids[:2]) == ("\ufffd", [0, 0])


def test_nothing_decodes_to_nothing():
    """An empty response has no text and no offsets."""
    assert token_text().decode([]) == ("", [])


@pytest.mark.parametrize("decoder", [None, "Metaspace()", "WordPiece()"])
def test_a_tokenizer_without_byte_level_decoder_is_refused(decoder):
    """Offsets by bytes need a byte-level BPE: anything else is an error that says so."""
    other = SimpleNamespace(backend_tokenizer=SimpleNamespace(decoder=decoder))
    with pytest.raises(ValueError, match="wanted a byte-level BPE tokenizer"):
        TokenText(other)
