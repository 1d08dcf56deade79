"""The parts of a `care-train serve`, without one: tokens, names, channels, and whose weights are
sampled from."""

from __future__ import annotations

import asyncio
import os
import socket
import stat
import threading
import time
from pathlib import Path
from typing import Any, cast

import httpx
import pytest
import torch

from care_train.rollout import server, server_access, weight_sync
from care_train.rollout.errors import RolloutError
from care_train.rollout.server import Batch, EngineLoop
from care_train.rollout.server_access import TOKEN_VARIABLE, Guard, find_token, server_token
from care_train.rollout.server_messages import Begin, RequestError, TakeLease, parse

STRANGER = "0" * 32


def test_nccl_gets_its_id_as_bytes(monkeypatch):
    """Through the request, whole, and no store is made; a group whose ranks do not connect is given
    up, in NCCL's way in the first broadcast, and one that is used no more is destroyed."""
    pytest.importorskip("vllm")
    from vllm.distributed import utils
    from vllm.distributed.weight_transfer import nccl_common

    unique_id, seen = bytes(range(128)), []
    hanging = threading.Event()

    class Group:
        device, destroyed = torch.device("cpu"), 0

        def broadcast(self, tensor: Any, src: int) -> None:
            hanging.wait(20)

        def destroy(self) -> None:
            Group.destroyed += 1

    def join(*arguments: Any) -> Any:
        seen.append(arguments)
        return Group()

    def no_store(*arguments: Any, **more: Any) -> Any:
        raise AssertionError("a store was made")

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(utils.StatelessProcessGroup, "create", no_store)
    monkeypatch.setattr(nccl_common, "uid_init_process_group", join)
    begin = Begin(sender=STRANGER, version=None, unique_id=unique_id)
    assert parse(Begin, begin.model_dump_json().encode()) == begin
    with pytest.raises(RuntimeError, match=r"no NCCL group of 3 ranks in 0.2 s"):
        weight_sync.join_group(unique_id, 2, 3, 0.2)
    hanging.set()
    broadcast = weight_sync.join_group(unique_id, 1, 2, 1.0)
    assert Group.destroyed == 0
    del broadcast
    assert Group.destroyed == 1
    assert seen == [(unique_id, 2, 3, 0), (unique_id, 1, 2, 0)]
    monkeypatch.setenv("VLLM_DISABLE_PYNCCL", "1")
    with pytest.raises(ValueError, match="VLLM_DISABLE_PYNCCL: got 1, wanted it unset"):
        weight_sync.backend_for(torch.device("cuda"))
    assert weight_sync.backend_for(torch.device("cpu")) == "http"


def test_names_of_a_server_for_other_machines():
    """Its own and those it was given; an address may be translated on the way, a name is not."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def status(host: str) -> int:
        guard: Any = Guard(app, "secret", "0.0.0.0", ["rollouts.cluster"])
        async with httpx.AsyncClient(transport=httpx.ASGITransport(guard)) as client:
            headers = {"Host": host, "Authorization": "Bearer secret"}
            return (await client.get("http://x/info", headers=headers)).status_code

    own = ("rollouts.cluster:8000", "10.1.2.3:8000", "localhost", socket.gethostname())
    assert [asyncio.run(status(host)) for host in own] == [200] * 4
    assert asyncio.run(status("evil.example:8000")) == 421


class FakeLlm:
    """vLLM that never finishes what it was given."""

    def __init__(self) -> None:
        self.llm_engine = self.model_executor = self
        self.thread = threading.current_thread()
        self.outputs: list[Any] = []
        self.lost: str | None = None

    def enqueue(self, prompts: Any, parameters: Any, **more: Any) -> list[str]:
        return ["0-a"]

    def abort_request(self, ids: Any, **more: Any) -> None:
        pass

    def step(self) -> list[Any]:
        time.sleep(0.01)
        return self.outputs

    def collective_rpc(self, method: str, args: Any = ()) -> list[str | None]:
        self.asked = method, args
        return [None, self.lost]

    def register_failure_callback(self, callback: Any) -> None:
        self.fail = callback


def engine_loop() -> Any:
    return EngineLoop(FakeLlm, on_death=lambda: None)


def test_the_engine_is_started_on_the_thread_that_drives_it():
    """vLLM keeps its thread's CUDA stream. An error of its start is the caller's."""
    here = engine_loop().call(lambda llm: llm.thread is threading.current_thread())
    assert here.result(10)
    with pytest.raises(ZeroDivisionError):
        EngineLoop(lambda: 1 / 0, on_death=lambda: None)


def test_a_worker_that_dies_while_nothing_is_sampled_ends_the_server():
    """Once, and whoever asks meanwhile hears why."""
    deaths: list[int] = []
    loop = EngineLoop(FakeLlm, on_death=lambda: deaths.append(1))
    for _ in range(2):
        loop._llm.fail()
    with pytest.raises(RequestError, match="vLLM failed: a worker process died"):
        loop.call(lambda llm: None).result(10)
    assert deaths == [1] and loop.failure is not None


def test_a_call_that_loses_the_gpu_ends_the_server():
    """Other failures do not: who asked hears of them, and the next call is made."""
    deaths: list[int] = []
    loop = EngineLoop(FakeLlm, on_death=lambda: deaths.append(1))

    def fail(llm: Any) -> None:
        raise RolloutError("weight sync: no")

    with pytest.raises(RequestError, match="weight sync: no"):
        loop.call(fail).result(10)
    assert loop.failure is None
    loop._llm.lost = "CUDA error: an illegal memory access was encountered"
    for _ in range(2):
        with pytest.raises(RequestError, match=r"vLLM failed: weight sync: no .*illegal memory"):
            loop.call(fail).result(10)
    assert deaths == [1]


def test_a_request_given_up_while_it_waits_does_not_end_the_engine():
    """Its future is cancelled before the engine's thread comes to it."""
    loop, busy = engine_loop(), threading.Event()
    loop.call(lambda llm: busy.wait(10))
    assert loop.call(lambda llm: 1).cancel()
    busy.set()
    assert loop.call(lambda llm: 2).result(10) == 2


def test_only_the_weights_asked_for_are_sampled_from():
    """None and others are refused; a batch ends when they go, and does not outlive them."""
    loop = engine_loop()
    batch = Batch("new", [], [])
    for refused in (Batch(None, [], []), batch):
        with pytest.raises(RequestError, match="wanted a weight sync"):
            loop.generate(refused).result(10)
    loop.call(lambda llm: loop.hold_weights("new")).result(10)
    with pytest.raises(RequestError, match="wanted a weight sync"):
        loop.generate(Batch("old", [], [])).result(10)
    loop.generate(batch).result(10)
    assert loop.running
    loop.call(lambda llm: loop.hold_weights(None)).result(10)
    with pytest.raises(RequestError, match="new weights came before it was done"):
        batch.result.result(10)
    assert not loop.running


def test_who_has_the_server(monkeypatch):
    """A run, until it leaves, or was silent for a while and nothing is sampled for it; and the next
    one does not get its weights."""
    loop, unused = engine_loop(), cast(Any, None)
    rollouts = server.RolloutServer(loop, unused, unused)
    one, two = (TakeLease(sender=digit * 32, who=f"run {digit}") for digit in "12")

    def refusal(handler: Any, message: Any) -> str:
        try:
            asyncio.run(handler(message, None))
        except RequestError as error:
            assert error.status == 409
            return str(error)
        return ""

    assert not refusal(rollouts.take, one) and "run 1" in refusal(rollouts.take, two)
    asyncio.run(rollouts.release(one, None))
    assert not refusal(rollouts.take, two) and "run 2" in refusal(rollouts.take, one)
    for version, keeps_base in (("a" * 32, True), ("b" * 32, False), (None, False)):
        loop.call(lambda llm: loop.hold_weights("a" * 32)).result(10)
        assert not refusal(
            rollouts.begin, Begin(sender=two.sender, version=version, unique_id=None)
        )
        assert loop._llm.asked == ("care_begin", (keeps_base,)) and loop.version is None
    # Two went on with a group from before another run's: nobody would answer there.
    rollouts._met, again = one.sender, Begin(sender=two.sender, version=None, unique_id=None)
    assert "workers met another trainer" in refusal(rollouts.begin, again)
    assert not refusal(rollouts.begin, again.model_copy(update={"unique_id": bytes(128)}))
    assert not refusal(rollouts.begin, again)
    monkeypatch.setattr(server, "LEASE_SECONDS", 0.0)
    loop.running = {"0": Batch("a", [], [])}
    assert "run 2" in refusal(rollouts.take, one)
    loop.running = {}
    assert not refusal(rollouts.take, one)


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(server_access.tempfile, "gettempdir", lambda: str(tmp_path / "tmp"))
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    return tmp_path


def test_the_token_is_in_a_file_of_its_user(home):
    """Found for the server's own URL by its names for itself, for no other; gone at the end. A file
    that others can read, and a link, are refused; where the folder is someone's, another is taken.
    """
    url = "http://127.0.0.1:8000"
    with server_token(url) as token:
        path = Path(token.source)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        assert token.value == path.read_text() and len(token.value) >= 40
        for own in (url, "http://localhost:8000/", f"http://{socket.gethostname()}:8000"):
            assert find_token(own) == token
        others = ("http://127.0.0.1:8001", "http://evil.example:8000", "http://10.0.0.1:8000")
        assert [find_token(other).value for other in others] == [None] * 3
    assert not path.exists() and "no " in find_token(url).source
    with server_token(url) as again:
        assert again.value != token.value
        path.chmod(0o640)
        with pytest.raises(ValueError, match=r"mode 640, wanted a file that only user"):
            find_token(url)
        kept = path.rename(path.with_name("kept"))
        path.symlink_to(kept)
        with pytest.raises(ValueError, match="cannot read"):
            find_token(url)
    path.parent.rename(home / "real")
    path.parent.symlink_to(home / "real")
    with server_token(url) as token:
        assert Path(token.source).parent == home / "tmp" / f"care-train-{os.getuid()}"
        assert find_token(url) == token


def test_a_given_token_is_one(home, monkeypatch):
    """From the variable: another secret is refused unsent, and shown nowhere."""
    url, given = "http://127.0.0.1:8000", "care_" + "a" * 32
    monkeypatch.setenv(TOKEN_VARIABLE, given)
    with server_token(url) as token:
        assert token.value == given and find_token("http://other:1") == token
    for secret in ("hf_" + "s" * 40, "", "care_short", "care_" + "s" * 2000):
        monkeypatch.setenv(TOKEN_VARIABLE, secret)
        with pytest.raises(ValueError, match=rf"{TOKEN_VARIABLE}: .*wanted `care_`") as error:
            find_token(url)
        assert "sss" not in str(error.value)
