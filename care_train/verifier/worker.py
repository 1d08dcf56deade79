"""One worker process: symbolic comparisons, one at a time, until its parent is gone.

Started as `python -m care_train.verifier.worker`, so it inherits no memory, threads or CUDA context
and imports neither the parent's script nor torch. Whatever a comparison does, it ends: the kernel's
alarm kills the process a second after its time is up, even when the parent no longer can.
"""

import json
import resource
import signal
from dataclasses import asdict

from care_train.verifier.answers import compare
from care_train.verifier.child import Parent
from care_train.verifier.messages import READY, TAKEN
from care_train.verifier.symbolic import MathVerify
from care_train.verifier.types import AnswerType, Item

_MEMORY_BYTES = 2 << 30
"""Address space: a number of gigabytes is a failed comparison, not a full machine."""


def main() -> None:
    """Answer items from standard input, as length-prefixed JSON, until it ends."""
    parent = Parent()
    for limit, value in ((resource.RLIMIT_AS, _MEMORY_BYTES), (resource.RLIMIT_CORE, 0)):
        hard = resource.getrlimit(limit)[1]
        soft = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (soft, hard))
    symbolic = MathVerify()
    symbolic.equal("\\frac{1}{2}", "x")
    parent.replies.send_bytes(READY)
    while (request := parent.receive()) is not None:
        parent.replies.send_bytes(TAKEN)
        answer = _answer(json.loads(request), symbolic)
        parent.replies.send_bytes(json.dumps(answer).encode())


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
