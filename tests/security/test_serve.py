"""Attacks on `care-train serve`: from the network, from web pages, from other runs, by messages."""

from __future__ import annotations

import ast
import asyncio
import base64
import copy
import io
import json
import os
import pickle
import socket
import stat
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from care_train.config import VllmSettings
from care_train.rollout.engine import in_background
from care_train.rollout.errors import RolloutServerError
from tests.rollout.test_vllm_engine import GREEDY, tokens

STRANGER = "0" * 32
KEY = base64.b64encode(bytes(64)).decode()
ROUTES = (
    *("/lease", "/release", "/generate", "/nothing"),
    *("/weights/open", "/weights/begin", "/weights/bucket", "/weights/end"),
)


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, proof: Path) -> None:
        self._proof = proof

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self._proof}",)


class Listener:
    """A port of the attacker's, which says nothing, or `answer` to whoever connects."""

    def __init__(self, answer: bytes = b"") -> None:
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        self.connections: list[socket.socket] = []
        self._answer = answer
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            connection = self._listening.accept()[0]
            self.connections.append(connection)
            connection.sendall(self._answer)


def tcp_message(target, port: int, **more: Any) -> dict[str, Any]:
    """The live run's own request to be met at a port."""
    sender = target.run.engine._lease.sender
    return {"sender": sender, "call": {"backend": "tcp", "port": port, "key": KEY} | more}


@pytest.mark.parametrize("has_token", [False, True])
def test_a_peers_pickle_is_never_run(target, tmp_path, has_token):
    """The published attack: `/weights/open` with a store whose objects vLLM unpickles, from a web
    page or from a run; the store is not even connected to."""
    proof = tmp_path / "ran"
    store = torch.distributed.TCPStore(
        "127.0.0.1", 0, None, True, timedelta(seconds=5), wait_for_workers=False
    )
    store.set("broadcast_from/0/0", pickle.dumps(Payload(proof)))
    place = {"backend": "nccl", "host": "127.0.0.1", "port": store.port, "timeout": 2.0}
    headers = {} if has_token else {"Content-Type": "text/plain", "Origin": "http://evil.example"}
    answer = target.ask(
        "/weights/open", {"sender": STRANGER, "call": place}, headers=headers, has_token=has_token
    )
    assert not proof.exists()
    assert answer.status_code == (422 if has_token else 403)


def test_nccl_gets_its_id_as_bytes(monkeypatch):
    """Through the request, whole, and no store is made; a group that does not come is given up."""
    pytest.importorskip("vllm")
    from vllm.distributed import utils
    from vllm.distributed.weight_transfer import nccl_common

    from care_train.rollout import weight_channel
    from care_train.rollout.server_messages import OpenChannel, RequestError, parse

    unique_id, seen = bytes(range(128)), []
    hanging = threading.Event()

    def join(*arguments: Any) -> Any:
        seen.append(arguments)
        hanging.wait(20)

    def no_store(*arguments: Any, **more: Any) -> Any:
        raise AssertionError("a store was made")

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(utils.StatelessProcessGroup, "create", no_store)
    monkeypatch.setattr(nccl_common, "uid_init_process_group", join)
    monkeypatch.setattr(weight_channel, "_new_unique_id", lambda: unique_id)
    monkeypatch.setattr(weight_channel, "MEET_SECONDS", 0.2)
    invitation = weight_channel.invite("nccl", "127.0.0.1")
    content = OpenChannel(sender=STRANGER, call=invitation.call).model_dump_json().encode()
    call = parse(OpenChannel, content).call
    with pytest.raises(RuntimeError, match=r"no NCCL group of 3 ranks in 0.2 s"):
        weight_channel.join(call, "127.0.0.1", 2, 3)
    hanging.set()
    weight_channel.join(call, "127.0.0.1", 1, 2)
    invitation.open(2, 1.0)
    assert seen == [(unique_id, 2, 3, 0), (unique_id, 1, 2, 0), (unique_id, 0, 2, 0)]
    with pytest.raises(RequestError, match=r"unique_id: .*128 bytes"):
        parse(OpenChannel, content.replace(b"AAEC", b""))


def test_the_server_has_no_code_that_unpickles():
    """Neither pickle nor torch's collectives of objects, nor vLLM's group that uses it."""
    folder = Path(__file__).parents[2] / "care_train" / "rollout"
    patterns = ("serv*.py", "weight_*.py", "vllm_worker.py", "remote_engine.py")
    for path in [path for pattern in patterns for path in folder.glob(pattern)]:
        for node in ast.walk(ast.parse(path.read_text())):
            name = getattr(node, "attr", getattr(node, "id", getattr(node, "name", "")))
            bad = ("pickle", "cloudpickle", "marshal", "stateless_init_process_group")
            assert name not in bad and not str(name).endswith(("gather_object", "object_list")), (
                f"{path}:{getattr(node, 'lineno', '')}: {name}"
            )


def test_every_route_demands_the_token(target):
    """None, another, a part of it, it as another scheme: all the same; also where nothing is."""
    token = target.token
    wrong = ("", "Bearer", f"Bearer {token[:-1]}", f"Bearer {token}x", f"Basic {token}")
    for path in ROUTES:
        assert target.ask(path, {}, has_token=False).status_code == 401, path
        assert target.ask(path, {}).status_code in (404, 409, 422), path
    for method in ("GET", "HEAD", "OPTIONS", "PUT", "DELETE"):
        assert target.ask("/info", method=method, has_token=False).status_code == 401, method
    assert target.ask("/info", method="GET").status_code == 200
    for value in wrong:
        answer = target.ask("/info", method="GET", headers={"Authorization": value})
        assert answer.status_code == 401 and token not in answer.text
    assert token not in target.server.errors()


def test_web_pages_are_kept_out(target):
    """Even those that know the token: any Origin, other names for this machine, forms' types."""
    message = {"sender": STRANGER, "who": "page"}
    for origin in ("http://evil.example", "null", target.server.url):
        assert target.ask("/lease", message, headers={"Origin": origin}).status_code == 403
    port = target.server.url.rpartition(":")[2]
    bad = ("evil.example", "10.0.0.1", "0.0.0.0", "localhost.evil.example", "a@127.0.0.1", "")
    for host in bad:
        answer = target.ask("/lease", message, headers={"Host": f"{host}:{port}"})
        assert answer.status_code in (400, 421), host
    for host in ("localhost", f"LOCALHOST.:{port}", "127.0.0.1", f"[::1]:{port}"):
        answer = target.ask("/info", method="GET", headers={"Host": host})
        assert answer.status_code == 200, host
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""):
        assert target.ask("/lease", message, headers={"Content-Type": kind}).status_code == 415


def test_names_of_a_server_for_other_machines():
    """Its own and those it was given; an address may be translated on the way, a name is not."""
    from care_train.rollout.server_access import Guard

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


def png(width: int, height: int) -> str:
    """A black image."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("L", (width, height)).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


BATCHES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "text seed": (lambda m: m["requests"][1].update(seed="7"), "requests.1.seed"),
    "oversized seed": (lambda m: m["requests"][1].update(seed=1 << 63), "requests.1.seed"),
    "huge seed": (lambda m: m["requests"][1].update(seed=10**400), "requests.1.seed"),
    "negative seed": (lambda m: m["requests"][1].update(seed=-1), "requests.1.seed"),
    "float seed": (lambda m: m["requests"][1].update(seed=1.0), "requests.1.seed"),
    "true as seed": (lambda m: m["requests"][1].update(seed=True), "requests.1.seed"),
    "no seed": (lambda m: m["requests"][1].pop("seed"), "requests.1.seed"),
    "negative token": (lambda m: m["prompts"][2]["token_ids"].append(-1), "prompts.2.token_ids"),
    "large token": (lambda m: m["prompts"][2]["token_ids"].append(10**6), "prompts.2.token_ids"),
    "huge token": (lambda m: m["eos_ids"].append(1 << 64), "eos_ids"),
    "no tokens": (lambda m: m["prompts"][2].update(token_ids=[]), "prompts.2.token_ids"),
    "image token": (lambda m: m["prompts"][2]["token_ids"].append(6), "prompts.2.token_ids"),
    "video token": (lambda m: m["prompts"][2]["token_ids"].append(7), "prompts.2.token_ids"),
    "prefix image": (lambda m: m["requests"][1]["prefix_ids"].append(6), "requests.1.prefix_ids"),
    "no image": (lambda m: m["prompts"][0].update(images=[]), "prompts.0"),
    "no base64": (lambda m: m["prompts"][0].update(images=["?"]), "prompts.0.images.0"),
    "no PNG": (lambda m: m["prompts"][0].update(images=["AAAA"]), "prompts.0.images.0"),
    "bomb": (lambda m: m["prompts"][0].update(images=[png(9000, 9000)]), "prompts.0.images.0"),
    "a line": (lambda m: m["prompts"][0].update(images=[png(1, 3000)]), "Qwen2_5_VLProcessor"),
    "no prompt": (lambda m: m["requests"][0].update(prompt=3), "requests.0.prompt"),
    "negative prompt": (lambda m: m["requests"][0].update(prompt=-1), "requests.0.prompt"),
    "no requests": (lambda m: m.update(requests=[]), "requests"),
    "long": (lambda m: m["sampling"].update(max_new_tokens=10**6), "requests.0"),
    "no length": (lambda m: m["sampling"].update(max_new_tokens=0), "sampling.max_new_tokens"),
    "NaN": (lambda m: m["sampling"].update(temperature=float("nan")), "sampling.temperature"),
    "hot": (lambda m: m["sampling"].update(temperature=1e300), "sampling.temperature"),
    "top_p": (lambda m: m["sampling"].update(top_p=0), "sampling.top_p"),
    "top_k": (lambda m: m["sampling"].update(top_k=1 << 31), "sampling.top_k"),
    "unknown key": (lambda m: m["sampling"].update(logits_processors=["x"]), "logits_processors"),
    "version": (lambda m: m.update(version=7), "version"),
    "a list": (lambda m: [m], "object"),
    "deep": (lambda m: json.loads("[" * 900 + "]" * 900), ""),
}


def test_no_batch_ends_the_server(target):
    """Each is an error that names the key, and the next batch is answered as before."""
    good = target.batch()
    wanted = target.ask("/generate", good).json()
    for name, (spoil, key) in BATCHES.items():
        message = copy.deepcopy(good)
        other = spoil(message)
        message = other if isinstance(other, list) and name in ("a list", "deep") else message
        answer = target.ask("/generate", message)
        status = 500 if name == "a line" else 422
        assert answer.status_code == status and key in answer.json()["error"], (name, answer.text)
        assert target.ask("/generate", good).json() == wanted, name
    for content in (b"", b"\xff", b"{", b"null", b'{"a":' * 5000, b"[" * 100_000):
        assert target.ask("/generate", content).status_code == 422
    assert target.ask("/lease", b" " * (17 << 20)).status_code == 413


TENSOR = {"name": "lm_head.weight", "dtype": "float32", "shape": [2, 3], "checksum": 1}


def tensor(num_bytes: int = 24, **fields: Any) -> dict[str, Any]:
    """A bucket of one tensor."""
    return {"tensors": [TENSOR | fields], "num_bytes": num_bytes}


@pytest.mark.parametrize(
    ("path", "message", "key"),
    [
        ("/weights/open", {"port": 0}, "port"),
        ("/weights/open", {"port": 65536}, "port"),
        ("/weights/open", {"port": "80"}, "port"),
        ("/weights/open", {"timeout": 1e9}, "timeout"),
        ("/weights/open", {"host": "10.0.0.1"}, "host"),
        ("/weights/open", {"key": "AAAA"}, "key"),
        ("/weights/open", {"backend": "mpi"}, "mpi"),
        ("/weights/bucket", {"tensors": [TENSOR], "num_bytes": 23}, "num_bytes"),
        ("/weights/bucket", {"tensors": [TENSOR], "num_bytes": -24}, "num_bytes"),
        ("/weights/bucket", {"tensors": [], "num_bytes": 0}, "tensors"),
        ("/weights/bucket", tensor(dtype="Tensor"), "tensors.0.dtype"),
        ("/weights/bucket", tensor(dtype="int8"), "tensors.0.dtype"),
        ("/weights/bucket", tensor(shape=[-2]), "tensors.0.shape.0"),
        ("/weights/bucket", tensor(1 << 41, shape=[1 << 39]), "num_bytes"),
        ("/weights/bucket", tensor(checksum=1 << 63), "tensors.0.checksum"),
        ("/weights/bucket", tensor(pickle="AAAA"), "tensors.0.pickle"),
    ],
)
def test_messages_about_weights_are_checked(path, message, key, target):
    """Before anything is changed: the live run's weights stay valid."""
    opens = path.endswith("open")
    whole = (
        tcp_message(target, **{"port": 1, **message}) if opens else {"sender": STRANGER} | message
    )
    answer = target.ask(path, whole)
    assert answer.status_code == 422 and key in answer.json()["error"], answer.text
    assert target.ask("/generate", target.batch()).status_code == 200


@pytest.mark.parametrize("answer", [b"", os.urandom(1 << 16)], ids=["silent", "noise"])
def test_a_peer_that_is_no_trainer_is_given_up(answer, target):
    """In bounded time, with the reason; the engine and its other users go on."""
    listener = Listener(answer)
    start = time.monotonic()
    result = target.ask("/weights/open", tcp_message(target, listener.port))
    assert time.monotonic() - start < 6
    assert result.status_code == 500 and "trainer" in result.json()["error"]
    assert len(listener.connections) == 1
    target.run.engine._broadcast = None


def test_a_sync_that_stops_in_the_middle_is_given_up(target):
    """No bucket comes: the server says so in bounded time, and takes no part of a sync alone."""
    run = target.run
    begin = target.ask("/weights/begin", {"sender": run.engine._lease.sender})
    assert begin.status_code == 200
    bucket = {"sender": run.engine._lease.sender, "tensors": [TENSOR], "num_bytes": 24}
    start = time.monotonic()
    assert "did not come in 2 s" in target.ask("/weights/bucket", bucket).json()["error"]
    assert time.monotonic() - start < 6
    for path, message in (("bucket", bucket), ("end", {"sender": bucket["sender"]})):
        answer = target.ask(f"/weights/{path}", message)
        assert answer.status_code == 409 and "wanted its beginning" in answer.json()["error"]
    with pytest.raises(RolloutServerError, match="wanted a weight sync first"):
        run.engine.generate(run.requests(1), GREEDY)
    run.engine._broadcast = None


def test_a_live_run_keeps_its_server(target):
    """Whatever another process asks for: it is told who has the server, and the run goes on."""
    run = target.run
    wanted = tokens(run.engine.generate(run.requests(), GREEDY))
    foreign = tcp_message(target, Listener().port) | {"sender": STRANGER}
    bucket = {"sender": STRANGER, "tensors": [TENSOR], "num_bytes": 24}
    answers = [
        target.ask("/weights/open", foreign),
        target.ask("/weights/begin", {"sender": STRANGER}),
        target.ask("/weights/bucket", bucket),
        target.ask("/weights/end", {"sender": STRANGER}),
        target.ask("/release", {"sender": STRANGER}),
        target.ask("/lease", {"sender": STRANGER, "who": "a stranger"}),
    ]
    assert tokens(run.engine.generate(run.requests(), GREEDY)) == wanted
    for answer in answers:
        assert answer.status_code == 409
        assert f"process {os.getpid()} on {socket.gethostname()}" in answer.json()["error"]


def test_a_silent_run_loses_its_server(target):
    """One that was killed, after the lease; then its own requests are refused."""
    target.run.engine.close()
    dead, alive = ({"sender": digit * 32, "who": f"run {digit}"} for digit in "12")
    assert target.ask("/lease", dead).status_code == 200
    answer = target.ask("/lease", alive)
    assert answer.status_code == 409 and "run 1, heard of 0 s ago" in answer.json()["error"]
    time.sleep(3.1)
    assert target.ask("/lease", alive).status_code == 200
    assert target.ask("/lease", dead).status_code == 409
    assert target.ask("/weights/begin", {"sender": dead["sender"]}).status_code == 409
    # Nor does the next run get the weights of the one before.
    for part in ("begin", "end"):
        assert target.ask(f"/weights/{part}", {"sender": alive["sender"]}).status_code == 409
    assert target.ask("/release", {"sender": alive["sender"]}).status_code == 200
    target.run.engine._broadcast = None


def test_a_takeover_while_a_batch_is_unpacked(target):
    """The batch was checked, then another run sent its weights: it is refused, not served from
    them."""
    run, other = target.run, target.second_run()
    run.engine.close()
    target.slow.touch()
    late = in_background(lambda: run.engine.generate(run.requests(), GREEDY))
    while target.slow.exists():
        time.sleep(0.01)
    other.sync()
    assert not late.done(), "the server was too slow for this test"
    with pytest.raises(RolloutServerError, match="another run uses it"):
        late.result()
    assert other.engine.generate(other.requests(1), GREEDY)
    other.engine.close()
    run.engine._broadcast = None


class FakeLlm:
    """vLLM that never finishes what it was given."""

    def __init__(self) -> None:
        self.llm_engine = self
        self.outputs: list[Any] = []

    def enqueue(self, prompts: Any, parameters: Any, **more: Any) -> list[str]:
        return ["0-a"]

    def abort_request(self, ids: Any, **more: Any) -> None:
        pass

    def step(self) -> list[Any]:
        time.sleep(0.01)
        return self.outputs


def engine_loop() -> Any:
    from care_train.rollout.server_loop import EngineLoop

    return EngineLoop(FakeLlm(), lambda: None)


def test_a_request_given_up_while_it_waits_does_not_end_the_engine():
    """Its future is cancelled before the engine's thread comes to it."""
    loop, busy = engine_loop(), threading.Event()
    loop.call(lambda llm: busy.wait(10))
    waiting: Future[Any] = loop.call(lambda llm: 1)
    assert waiting.cancel()
    busy.set()
    assert loop.call(lambda llm: 2).result(10) == 2


def test_only_the_weights_asked_for_are_sampled_from():
    """None and others are refused; a batch ends when they go, and does not outlive them."""
    from care_train.rollout.server_loop import Batch
    from care_train.rollout.server_messages import RequestError

    loop = engine_loop()
    batches = [Batch(version, [], []) for version in (None, "old", "new")]
    loop.generate(batches[0])
    loop.call(lambda llm: loop.adopt_weights("new")).result(10)
    for batch in batches[1:]:
        loop.generate(batch)
    for batch in batches[:2]:
        with pytest.raises(RequestError, match="wanted a weight sync"):
            batch.result.result(10)
    assert loop.call(lambda llm: loop.is_sampling).result(10)
    loop.call(lambda llm: loop.drop_weights("others come")).result(10)
    with pytest.raises(RequestError, match="others come"):
        batches[2].result.result(10)
    assert not loop.is_sampling


def test_a_running_batch_keeps_the_lease(monkeypatch):
    """However long its run was silent."""
    from care_train.rollout import server_app
    from care_train.rollout.server_messages import RequestError, TakeLease

    class Loop:
        is_sampling = True

    loop: Any = Loop()
    unused: Any = None
    monkeypatch.setattr(server_app, "LEASE_SECONDS", 0.0)
    server = server_app.RolloutServer(loop, unused, unused)
    one, two = (TakeLease(sender=digit * 32, who=digit) for digit in "12")
    asyncio.run(server.take(one, None))
    with pytest.raises(RequestError, match="another run has this server: 1"):
        asyncio.run(server.take(two, None))
    loop.is_sampling = False
    asyncio.run(server.take(two, None))


def test_the_trainers_port_takes_workers_only():
    """Strangers there get no weights, whether silent or guessing, and nobody waits for them long;
    it listens at the server's side alone."""
    from care_train.rollout import weight_channel

    invitation = weight_channel.invite("tcp", "127.0.0.1")
    call = invitation.call
    assert isinstance(call, weight_channel.TcpCall)
    port = call.port
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.2", port), 5)
    silent = socket.create_connection(("127.0.0.1", port), 5)
    guess = socket.create_connection(("127.0.0.1", port), 5)
    guess.sendall(bytes(32))
    worker = in_background(lambda: weight_channel.join(call, "127.0.0.1", 1, 2))
    send = invitation.open(2, 20)
    sent, received = torch.arange(200, dtype=torch.uint8), torch.zeros(200, dtype=torch.uint8)
    arrival = in_background(lambda: worker.result(10)(received))
    send(sent)
    arrival.result(10)
    assert torch.equal(sent, received)
    for stranger in (silent, guess):
        stranger.settimeout(5)
        assert stranger.recv(1) == b""


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    from care_train.rollout import server_access

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(server_access.tempfile, "gettempdir", lambda: str(tmp_path / "tmp"))
    monkeypatch.delenv(server_access.TOKEN_VARIABLE, raising=False)
    return tmp_path


def test_the_token_is_in_a_file_of_its_user(home):
    """Found for the server's own URL by its names for itself, for no other; gone at the end."""
    from care_train.rollout.server_access import find_token, server_token

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
    with server_token(url) as first, server_token(url) as second:
        assert first.value != second.value


def test_a_token_file_that_others_can_write_or_read_is_refused(home):
    """Neither a link, nor another mode; and where the folder is someone's, another is taken."""
    from care_train.rollout.server_access import find_token, server_token

    url = "http://127.0.0.1:8000"
    with server_token(url) as token:
        path = Path(token.source)
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
    from care_train.rollout.server_access import TOKEN_VARIABLE, find_token, server_token

    url, given = "http://127.0.0.1:8000", "care_" + "a" * 32
    monkeypatch.setenv(TOKEN_VARIABLE, given)
    with server_token(url) as token:
        assert token.value == given and find_token("http://other:1") == token
    secrets = ("hf_" + "s" * 40, "root:x:0:0\nmore", "", "care_short", "care_" + "s" * 2000)
    for secret in secrets:
        monkeypatch.setenv(TOKEN_VARIABLE, secret)
        with pytest.raises(ValueError, match=rf"{TOKEN_VARIABLE}: .*wanted `care_`") as error:
            find_token(url)
        assert "sss" not in str(error.value)


def test_a_run_without_the_token_says_where_it_is_from(target, monkeypatch):
    """The source that was looked at, and how another is given."""
    from care_train.rollout.remote_engine import VllmServerEngine
    from care_train.rollout.server_access import TOKEN_VARIABLE

    settings = VllmSettings(server=target.server.url)
    monkeypatch.setenv(TOKEN_VARIABLE, "care_" + "x" * 40)
    wanted = rf"its token is not the one \(\${TOKEN_VARIABLE}\).*otherwise give it by"
    with pytest.raises(RolloutServerError, match=wanted):
        VllmServerEngine(target.run.loaded, settings)
    monkeypatch.delenv(TOKEN_VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", "/nonexistent")
    with pytest.raises(RolloutServerError, match=r"no token was found \(no /nonexistent/"):
        VllmServerEngine(target.run.loaded, settings)
    monkeypatch.undo()
