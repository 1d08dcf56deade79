"""Start and stop real `care-train serve` processes."""

from __future__ import annotations

import re
import signal
import weakref
from collections.abc import Mapping
from types import MappingProxyType

from tests.train.runs import FastRun


def limits(batch_size: int = 64) -> tuple[str, ...]:
    """Overrides for a server that takes what the tests' tiny models are asked."""
    return (
        *("prompt.max_prompt_tokens=300", "rollout.max_new_tokens=50"),
        f"rollout.batch_size={batch_size}",
        "rollout.vllm.kv_cache_gib=0.25",
    )


class Server:
    """A server process, ready when made."""

    def __init__(
        self,
        *arguments: str,
        port: int = 0,
        seconds: float = 180,
        before: str = "",
        environment: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """Start one.

        Args:
            arguments: of `care-train serve`.
            port: 0 takes a free one.
            seconds: how long it may take to start.
            before: code that it runs first, to break something.
            environment: variables laid over this process's.
        """
        variables = f"import os\nos.environ.update({dict(environment)!r})\n"
        self._run = FastRun("serve", f"--port={port}", *arguments, before=variables + before)
        # A test that fails leaves no server behind.
        weakref.finalize(self, self._run.kill)
        self.url = self._wait(seconds)

    def _wait(self, seconds: float) -> str:
        self._run.wait_for(lambda: " at http" in self.errors(), seconds, every=0.05)
        if found := re.search(r"serving .* at (http\S+)", self.errors()):
            return found[1]
        raise AssertionError(f"the server did not start:\n{self._run.end(0)}")

    @property
    def pid(self) -> int:
        return self._run.pid(0)

    @property
    def is_alive(self) -> bool:
        return self._run.is_alive

    def errors(self) -> str:
        """What it wrote so far."""
        return self._run.errors()

    def kill(self) -> None:
        """SIGKILL."""
        self._run.kill()

    def wait(self, seconds: float) -> int | None:
        """The exit status; None for one that had to be killed then."""
        return self._run.end(seconds)[0][0]

    def stop(self) -> int | None:
        """SIGTERM; the exit status."""
        self._run.send(signal.SIGTERM)
        return self.wait(120)
