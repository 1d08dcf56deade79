"""Start and stop real `care-train serve` processes."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from care_train.distributed import own_environment

ROOT = Path(__file__).parents[2]


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
        self._log = tempfile.NamedTemporaryFile(suffix=".log")
        main = f"{before}\nimport sys, care_train.cli\nsys.exit(care_train.cli.main())"
        self.process = subprocess.Popen(
            [sys.executable, "-c", main, "serve", f"--port={port}", *arguments],
            cwd=ROOT,
            env=own_environment() | {"OMP_NUM_THREADS": "1"} | dict(environment),
            stdout=subprocess.DEVNULL,
            stderr=self._log.file,
        )
        # A test that fails leaves no server behind.
        weakref.finalize(self, self.process.kill)
        self.url = self._wait(seconds)

    def _wait(self, seconds: float) -> str:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if found := re.search(r"serving .* at (http\S+)", self.errors()):
                return found[1]
            if self.process.poll() is not None:
                break
            time.sleep(0.05)
        self.stop()
        raise AssertionError(f"the server did not start:\n{self.errors()}")

    def errors(self) -> str:
        """What it wrote so far."""
        return Path(self._log.name).read_text()

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        """SIGTERM; the exit status."""
        if self.process.poll() is None:
            self.process.terminate()
        try:
            return self.process.wait(timeout=120)
        except subprocess.TimeoutExpired:
            self.kill()
            raise
