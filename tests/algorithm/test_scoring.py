"""Which tokens the rationale embedding pools (Sec. 3.3)."""

from dataclasses import replace

import torch

from care_kernels import pool_rationale
from care_train.algorithm.spans import rationale_span
from care_train.algorithm.types import Spans
from tests.algorithm.builders import broken, make_rollout, right, wrong


def test_the_rationale_is_the_think_content():
    """Sec. 3.3: the think span's content tokens, without tags, after prompt and prefix."""
    assert rationale_span(right(think=4, answer=2)) == (1, 5)


def test_without_think_it_is_what_precedes_the_answer():
    """A response that never thinks reasons, if at all, before its answer."""
    spans = Spans(None, None, answer=(5, 8), answer_content=(6, 7))
    rollout = replace(wrong(), spans=spans, token_ids=tuple(range(9)))
    assert rationale_span(rollout) == (0, 5)


def test_without_either_it_is_the_whole_response():
    """Garbage is embedded as it is, so that it has a distance at all."""
    assert rationale_span(replace(broken(think=None), token_ids=(1, 2, 3))) == (0, 3)


def test_an_immediate_answer_has_an_empty_rationale():
    """Nothing precedes the answer: the zero vector, at distance 1 from everything."""
    start, end = rationale_span(make_rollout(0, 0, think=None))
    assert start == end == 0
    assert pool_rationale(torch.ones(1, 20, 3), torch.tensor([[start, end]])).tolist() == [[0] * 3]


def test_an_unclosed_rationale_is_pooled_to_its_end():
    """Cut by the length limit, all reasoned tokens count."""
    spans = Spans((0, 6), (1, 6), None, None)
    rollout = replace(broken(finished=False), spans=spans, token_ids=tuple(range(6)))
    assert rationale_span(rollout) == (1, 6)
