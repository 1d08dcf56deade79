"""Promises the code does not keep yet. Each test fails today and is marked so, strictly."""

import pytest

from care_train.algorithm.reflection import reflection_prefix
from care_train.algorithm.spans import parse_spans
from tests.algorithm.builders import wrong


@pytest.mark.xfail(strict=True, reason="removing a stray tag can join the halves of another")
@pytest.mark.parametrize(
    "text",
    ["<think>a</th<think>ink>", "<think>a</th</answer>ink>", "<think>a<ans</answer>wer>b"],
)
def test_removed_tags_leave_no_tag_behind(text):
    """Line 13: think stays open up to the cue, whatever untrusted text the failure wrote."""
    prefix = reflection_prefix(wrong(text=text), "look again:", "think", "answer")
    content = parse_spans(prefix).think_content
    assert content is not None and content[1] == len(prefix)
    assert "<answer>" not in prefix
