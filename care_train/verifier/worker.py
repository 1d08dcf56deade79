"""One worker process: symbolic comparisons, one at a time, until its parent is gone.

Started as `python -m care_train.verifier.worker`, so it inherits no memory, threads or CUDA context
and imports neither the parent's script nor torch. Whatever a comparison does, it ends: the kernel's
alarm kills the process a second after its time is up, even when the parent no longer can.
"""

import json
import os
import resource
import signal
from dataclasses import asdict
from multiprocessing.connection import Connection

from care_train.verifier.answers import compare
from care_train.verifier.symbolic import MathVerify
from care_train.verifier.types import AnswerType, Item

_MEMORY_BYTES = 2 << 30
"""Address space: a number of gigabytes is a failed comparison, not a full machine."""

_PARENT_CHECK_SECONDS = 1.0


def main() -> None:
    """Answer items from standard input, as length-prefixed JSON, until it ends."""
    requests = Connection(os.dup(0), writable=False)
    replies = Connection(os.dup(1), readable=False)
    # Libraries may print: nothing but replies may come this way.
    os.dup2(2, 1)
    for limit, value in ((resource.RLIMIT_AS, _MEMORY_BYTES), (resource.RLIMIT_CORE, 0)):
        hard = resource.getrlimit(limit)[1]
        soft = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (soft, hard))
    # Ctrl-C reaches the whole foreground group; the parent decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent, symbolic = os.getppid(), MathVerify()
    symbolic.equal("\\frac{1}{2}", "x")
    replies.send_bytes(b"ready")
    while _wait(requests, parent):
        try:
            request = json.loads(requests.recv_bytes())
        except EOFError:
            return
        replies.send_bytes(json.dumps(_answer(request, symbolic)).encode())


def _wait(requests: Connection, parent: int) -> bool:
    # The end of the pipe is not enough: a child the parent forked may hold it open.
    while not requests.poll(_PARENT_CHECK_SECONDS):
        if os.getppid() != parent:
            return False
    return True


def _answer(request: dict, symbolic: MathVerify) -> dict:
    kind = request["answer_type"]
    item = Item(
        request["predicted"],
        request["expected"],
        AnswerType(kind) if kind else None,
        tuple(request["options"]),
        request["tolerance"],
    )
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, request["timeout"] + 1.0)
    verdict = compare(item, symbolic)
    signal.setitimer(signal.ITIMER_REAL, 0)
    return asdict(verdict)


if __name__ == "__main__":
    main()
