"""More numbers of rows: the floor, our own functions and plain torch."""

from bench.gpu.contest import CORE, Contest
from bench.gpu.record import Bench
from bench.gpu.sizes import sizes_of


def run(bench: Bench) -> None:
    """From few rows, where the head's weights dominate the traffic, to many."""
    sizes = sizes_of(bench.dry)
    for rows in sizes.more_rows:
        for head, (width, vocab) in sizes.heads.items():
            contest = Contest(bench, head, rows, width, vocab, check=False)
            contest.measure(CORE, rounds=2 if bench.dry else 5)
            contest.print()
