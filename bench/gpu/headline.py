"""The figures that lead the page: both heads, many rows, every way to the same loss."""

from bench.gpu.contest import CORE, RESERVED_SECONDS, Contest, peers
from bench.gpu.record import Bench
from bench.gpu.sizes import sizes_of


def run(bench: Bench) -> None:
    """First the floor, our own functions and plain torch on all shapes, then the peers beside."""
    sizes = sizes_of(bench.dry)
    contests = [
        Contest(bench, head, rows, width, vocab, check=True)
        for rows in sizes.headline_rows
        for head, (width, vocab) in sizes.heads.items()
    ]
    rounds = 2 if bench.dry else 9
    for contest in contests:
        contest.measure(CORE, rounds=rounds)
        contest.print()
    entrants = peers(bench)
    for contest in contests:
        if bench.seconds_left() > RESERVED_SECONDS + 5:
            contest.measure(entrants, rounds=rounds)
            contest.print()
