"""Which sequences go through the model together.

Sharded weights make ranks wait for each other at every layer, so all must run the same number of
micro-batches: each says how many it needs, all take the largest, and each spreads what it has.
"""

from collections.abc import Sequence

import torch

from care_train.config import TrainSettings
from care_train.distributed import all_max
from care_train.models.batch import TokenSequence

Parts = list[list[int]]
"""Micro-batches, as indices of their sequences."""


def agreed_micro_batches(
    sequences: Sequence[TokenSequence], train: TrainSettings, device: torch.device
) -> tuple[Parts, int]:
    """This rank's micro-batches, and how many every rank runs. A collective call.

    A rank that has fewer sequences than others have micro-batches gets one micro-batch per
    sequence, and runs fillers for the rest.

    Raises:
        ValueError: a sequence has more tokens than a micro-batch may hold.
    """
    lengths = [len(sequence.token_ids) for sequence in sequences]
    count = all_max(len(split(lengths, train)), device)
    return split(lengths, train, at_least=count), count


def split(lengths: Sequence[int], train: TrainSettings, at_least: int = 0) -> Parts:
    """As few micro-batches as `micro_batch_size`, or `micro_batch_tokens` and `packing`, allow, the
    largest first; but `at_least` so many, where there are as many sequences.

    Raises:
        ValueError: a length is over `micro_batch_tokens`.
    """
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i), reverse=True)
    at_least = min(at_least, len(order))
    budget = train.micro_batch_tokens
    if budget is None:
        return _divide(lengths, _chunks(order, train.micro_batch_size), at_least)
    if not order:
        return []
    longest = lengths[order[0]]
    if longest > budget:
        raise ValueError(
            f"train.micro_batch_tokens: got {budget}, wanted at least {longest}, "
            "the tokens of the longest sequence, which are never cut"
        )
    fill, size = (_spread, num_tokens) if train.packing else (_cut, padded_tokens)
    parts = fill(lengths, order, budget, at_least)
    return sorted(parts, key=lambda part: size(lengths, part), reverse=True)


def num_tokens(lengths: Sequence[int], part: Sequence[int]) -> int:
    """Positions of a packed micro-batch."""
    return sum(lengths[i] for i in part)


def padded_tokens(lengths: Sequence[int], part: Sequence[int]) -> int:
    """Positions of a padded micro-batch: every row as wide as the longest."""
    return len(part) * max(lengths[i] for i in part)


def _chunks(order: Sequence[int], size: int) -> Parts:
    """Sequences of similar length together. The chunk that is not full comes first, with the
    longest sequences: these differ most in length, so a small chunk of them wastes least."""
    first = len(order) % size
    chunks = [list(order[start : start + size]) for start in range(first, len(order), size)]
    return [list(order[:first]), *chunks] if first else chunks


def _spread(lengths: Sequence[int], order: Sequence[int], budget: int, at_least: int) -> Parts:
    """From the longest on, each sequence into the micro-batch that is least full.

    Source: R. L. Graham, "Bounds on multiprocessing timing anomalies" (1969): the fullest is then
    at most 4/3 of the best possible.
    """
    total = sum(lengths)
    for count in range(max(-(-total // budget), at_least), len(order) + 1):
        parts: Parts = [[] for _ in range(count)]
        filled = [0] * count
        for i in order:
            emptiest = filled.index(min(filled))
            parts[emptiest].append(i)
            filled[emptiest] += lengths[i]
        if max(filled) <= budget:
            return parts
    raise AssertionError("one sequence each always fits")


def _cut(lengths: Sequence[int], order: Sequence[int], budget: int, at_least: int) -> Parts:
    """Sequences of similar length together, in parts whose largest padded size is the smallest
    that is possible for their number."""
    count = max(len(_fill(lengths, order, budget)), at_least)
    low, high = lengths[order[0]], budget
    while low < high:  # a larger budget never needs more parts
        middle = (low + high) // 2
        if len(_fill(lengths, order, middle)) <= count:
            high = middle
        else:
            low = middle + 1
    return _divide(lengths, _fill(lengths, order, low), count)


def _divide(lengths: Sequence[int], parts: Parts, count: int) -> Parts:
    """Halve the largest part until there are `count`."""
    while len(parts) < count:
        divisible = [part for part in parts if len(part) > 1]
        largest = max(divisible, key=lambda part: padded_tokens(lengths, part))
        place, half = parts.index(largest), (len(largest) + 1) // 2
        parts[place : place + 1] = [largest[:half], largest[half:]]
    return parts


def _fill(lengths: Sequence[int], order: Sequence[int], budget: int) -> Parts:
    """From the longest on, as many sequences into each part as `budget` positions allow."""
    parts: Parts = []
    for i in order:
        if parts and (len(parts[-1]) + 1) * lengths[parts[-1][0]] <= budget:
            parts[-1].append(i)
        else:
            parts.append([i])
    return parts
