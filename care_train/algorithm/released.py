"""Where the authors' released code is another computation than Algorithm 1 (`preset: official`).

    token_tag_spans     where a response's rationale and answer lie
    released_credit     what each token weighs
    with_rest           what trains beside the subgroup
    answer_prefix       what a reflection continues

Other differences are values of `config.Decisions`. Source: github.com/yongxinwang-ai/CARE at
8c6045c (verl/utils/response_tags.py, verl/algorithms, verl/hooks/rgr.py); docs/official.md.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from care_train.algorithm.types import Credit, GroupUpdate, Region, Rollout, Spans, TrainSequence

Pattern = tuple[int, ...]


@dataclass(frozen=True)
class TagPatterns:
    """Token sequences that stand for each tag."""

    think: tuple[Pattern, ...]
    think_end: tuple[Pattern, ...]
    answer: tuple[Pattern, ...]
    answer_end: tuple[Pattern, ...]


def tag_patterns(
    encode: Callable[[str], Sequence[int]], think_tag: str, answer_tag: str
) -> TagPatterns:
    """Each tag as it is tokenised alone, after a space, and after one or two newlines."""

    def patterns(tag: str) -> tuple[Pattern, ...]:
        return tuple(tuple(encode(before + tag)) for before in ("", " ", "\n", "\n\n"))

    tags = (f"<{think_tag}>", f"</{think_tag}>", f"<{answer_tag}>", f"</{answer_tag}>")
    return TagPatterns(*map(patterns, tags))


def token_tag_spans(token_ids: Sequence[int], tags: TagPatterns) -> Spans:
    """The tokens between the first opening tag and the first closing one behind it.

    A tag is found only where its tokens are one of its patterns: one that shares a token with the
    text beside it (`</think>` before a newline) is not. An unclosed span runs to the end. A span
    that is missing or empty is the whole response, end token included.
    """
    think = _between(token_ids, tags.think, tags.think_end) or (0, len(token_ids))
    answer = _between(token_ids, tags.answer, tags.answer_end) or (0, len(token_ids))
    return Spans(think, think, answer, answer)


def _between(
    token_ids: Sequence[int], opening: Sequence[Pattern], closing: Sequence[Pattern]
) -> tuple[int, int] | None:
    starts = [(place, len(p)) for p in opening if (place := _find(token_ids, p, 0)) is not None]
    if not starts:
        return None
    start = sum(min(starts, key=lambda found: found[0]))
    ends = [place for p in closing if (place := _find(token_ids, p, start)) is not None]
    end = min(ends, default=len(token_ids))
    return (start, end) if end > start else None


def _find(token_ids: Sequence[int], pattern: Pattern, start: int) -> int | None:
    places = range(start, len(token_ids) - len(pattern) + 1)
    return next((i for i in places if tuple(token_ids[i : i + len(pattern)]) == pattern), None)


def released_credit(rollout: Rollout, think_weight: float, *, earns_rationale: bool) -> Credit:
    """w = 1 on the answer, plus gamma+ on a positive's rationale: a token in both has the sum."""
    spans = rollout.spans
    assert spans.think is not None and spans.answer is not None
    start, end = max(spans.think[0], spans.answer[0]), min(spans.think[1], spans.answer[1])
    both = (Region(start, end, 1.0 + think_weight),) if earns_rationale and start < end else ()
    return Credit(spans.think, spans.answer, earns_rationale, both, think_weight=think_weight)


def with_rest(update: GroupUpdate, rollouts: Sequence[Rollout], *, has_kl: bool) -> GroupUpdate:
    """The update with every sampled sequence counted, and pulled by the KL.

    Args:
        update: of the subgroup, or of a skipped group.
        rollouts: all that were sampled for the group, its reflection included.
        has_kl: without a KL the others have no gradient and are not forwarded.
    """
    trained = {sequence.rollout for sequence in update.sequences}
    rest = [TrainSequence(r, 0.0, Credit(), role="rest") for r in rollouts if r not in trained]
    return replace(
        update,
        sequences=(*update.sequences, *(rest if has_kl else ())),
        num_sequences=len(rollouts),
        num_tokens=sum(len(rollout.token_ids) for rollout in rollouts),
    )


def answer_prefix(failed_text: str, cue: str, think_tag: str, answer_tag: str) -> str:
    """The failed response with the cue at the end of its rationale, and its answer opened anew.

    What it answered is dropped where it has an answer tag; without one it is kept whole.
    """
    opening, closing = f"<{think_tag}>", f"</{think_tag}>"
    if opening not in failed_text:
        text = f"{opening}{cue}{closing}\n{failed_text}"
    elif closing in failed_text:
        text = failed_text.replace(closing, cue + closing, 1)
    else:
        text = failed_text + cue
    before, tag, _ = text.partition(f"<{answer_tag}>")
    return before + tag if tag else f"{text.rstrip()}\n<{answer_tag}>"
