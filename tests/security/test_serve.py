"""Attacks on `care-train serve`: from the network, from web pages, from other runs, by messages."""

from __future__ import annotations

import base64
import io
import json
import os
import socket
from typing import Any
from urllib.parse import urlsplit

import pytest
from PIL import Image

from care_train.config import VllmSettings
from care_train.rollout import remote_engine
from care_train.rollout.errors import RolloutServerError
from care_train.rollout.remote_engine import VllmServerEngine
from care_train.rollout.server_access import TOKEN_VARIABLE
from tests.rollout.conftest import GREEDY, largest_gap, tokens
from tests.security.conftest import join_by_pipe

STRANGER = "0" * 32
ROUTES = (
    *("/lease", "/release", "/generate", "/nothing"),
    *("/weights/begin", "/weights/bucket", "/weights/end"),
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
        for path in ROUTES:
            assert target.ask(path, message, headers={"Origin": origin}).status_code == 403
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


def png(width: int, height: int) -> str:
    """A black image."""
    buffer = io.BytesIO()
    Image.new("L", (width, height)).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


GONE = object()
"""Instead of a value: the key is left out."""

BATCHES: list[tuple[Any, ...]] = [
    *(("requests.1.seed", seed) for seed in ("7", 1 << 63, 10**400, True, GONE)),
    # 6 stands for an image.
    *(("prompts.2.token_ids", ids) for ids in ([], [9, -1], [9, 10**6], [9, 6])),
    ("requests.1.prefix_ids", [6]),
    ("eos_ids", [9, 1 << 64]),
    ("prompts.0.images", [], "prompts.0"),
    *(("prompts.0.images.0", image) for image in ("AAAA", png(9000, 9000))),
    *(("requests.0.prompt", prompt) for prompt in (3, -1)),
    ("requests", []),
    ("sampling.max_new_tokens", 10**6, "requests.0"),
    ("sampling.temperature", float("nan")),
    ("sampling.top_k", 1 << 31),
    ("sampling.logits_processors", ["x"]),
    ("version", 7),
]
"""Where a batch is spoilt, with what, and the key that the error names if it is another."""


def spoilt(message: Any, path: str, value: Any) -> Any:
    """The message with another value at a place."""
    whole = json.loads(json.dumps(message))
    *outer, last = [int(key) if key.isdigit() else key for key in path.split(".")]
    part = whole
    for key in outer:
        part = part[key]
    if value is GONE:
        del part[last]
    else:
        part[last] = value
    return whole


def test_no_batch_ends_the_server(target):
    """Each is an error that names the key, and the next batch is answered as before."""
    good = target.batch()
    wanted = target.ask("/generate", good).json()
    for path, value, *key in BATCHES:
        answer = target.ask("/generate", spoilt(good, path, value))
        named = key[0] if key else path
        assert answer.status_code == 422 and named in answer.json()["error"], (path, answer.text)
    # vLLM's own processor refuses an image of one row.
    answer = target.ask("/generate", spoilt(good, "prompts.0.images.0", png(1, 3000)))
    assert answer.status_code == 500 and "Qwen2_5_VLProcessor" in answer.json()["error"]
    listed = json.dumps([good]).encode()
    for content in (b"", b"\xff", b'{"a":' * 5000, b"[" * 100_000, listed):
        assert target.ask("/generate", content).status_code == 422
    assert target.ask("/lease", b" " * (17 << 20)).status_code == 413
    assert target.ask("/generate", good).json() == wanted


TENSOR = {"name": "lm_head.weight", "dtype": "float32", "shape": [2, 3], "checksum": 1}
BUCKET = {"sender": STRANGER, "tensors": [TENSOR], "content": base64.b64encode(bytes(24)).decode()}
BEGIN = {"sender": STRANGER, "version": None, "unique_id": None}
WEIGHTS: list[tuple[Any, ...]] = [
    *(("begin", "unique_id", value) for value in ("AAAA", 7, GONE)),
    # The published attack: a store of the attacker's, whose objects vLLM unpickles.
    *(("begin", key, value) for key, value in {"host": "10.0.0.1", "port": 5000}.items()),
    *(("bucket", "content", content) for content in ("AAAA", "no base64", [0])),
    *(("bucket", "tensors.0.dtype", dtype) for dtype in ("Tensor", "int8")),
    ("bucket", "tensors.0.shape", [-2], "tensors.0.shape.0"),
    ("bucket", "tensors.0.shape", [1 << 39], "content"),
    ("bucket", "tensors.0.pickle", "AAAA"),
]


def test_messages_about_weights_are_checked(target):
    """Before anything is changed: the live run's weights stay valid."""
    messages = {"begin": BEGIN, "bucket": BUCKET}
    sender = {"sender": target.run.engine.client.sender}
    for route, path, value, *key in WEIGHTS:
        message = spoilt(messages[route] | sender, path, value)
        answer = target.ask(f"/weights/{route}", message)
        wanted = key[0] if key else path
        assert answer.status_code == 422 and wanted in answer.json()["error"], answer.text
    assert target.ask("/generate", target.batch()).status_code == 200


def test_a_message_that_breaks_off_is_given_up(target):
    """In bounded time, with the reason; the engine and its other users go on."""
    place = urlsplit(target.server.url)
    head = (
        f"POST /weights/bucket HTTP/1.1\r\nHost: {place.netloc}\r\nConnection: close\r\n"
        f"Authorization: Bearer {target.token}\r\nContent-Type: application/json\r\n"
        "Content-Length: 100\r\n\r\n{"
    )
    with socket.create_connection((place.hostname, place.port), 6) as connection:
        connection.sendall(head.encode())
        assert b"the message was not there after 2 s" in connection.makefile("rb").read()


def test_a_sync_that_stops_in_the_middle_is_given_up(target):
    """A bucket that cannot be loaded: the server says so, and takes no part of a sync alone."""
    run = target.run
    sender = {"sender": run.engine.client.sender}
    assert target.ask("/weights/begin", BEGIN | sender).status_code == 200
    bucket = BUCKET | sender
    assert "could not load it" in target.ask("/weights/bucket", bucket).json()["error"]
    for path, message in (("bucket", bucket), ("end", sender)):
        answer = target.ask(f"/weights/{path}", message)
        assert answer.status_code == 409 and "wanted its beginning" in answer.json()["error"]
    with pytest.raises(RolloutServerError, match="wanted a weight sync first"):
        run.engine.generate(run.requests(1), GREEDY)


def test_a_live_run_keeps_its_server(target):
    """Whatever another process asks for: it is told who has the server, and the run goes on."""
    run = target.run
    wanted = tokens(run.engine.generate(run.requests(), GREEDY))
    of_stranger = {"sender": STRANGER}
    attacks = {
        "/weights/begin": BEGIN,
        "/weights/bucket": BUCKET,
        "/weights/end": of_stranger,
        "/release": of_stranger,
        "/lease": of_stranger | {"who": "a stranger"},
    }
    answers = [target.ask(path, message) for path, message in attacks.items()]
    assert tokens(run.engine.generate(run.requests(), GREEDY)) == wanted
    for answer in answers:
        assert answer.status_code == 409
        assert f"process {os.getpid()} on {socket.gethostname()}" in answer.json()["error"]


def test_weights_between_gpus_go_through_one_group(target, monkeypatch, tmp_path):
    """Here through a pipe in place of NCCL. Where the server's workers cannot join, its reason is
    raised, and the next sync makes another group."""
    run, pipe, made = target.run, tmp_path / "pipe", []
    os.mkfifo(pipe)

    def unique_id() -> bytes:
        made.append(pipe)
        return str(pipe if len(made) > 1 else tmp_path / "none").encode().ljust(128, b"\0")

    monkeypatch.setattr(run.engine, "_backend", "nccl")
    monkeypatch.setattr(run.engine, "_broadcast", None)
    monkeypatch.setattr(remote_engine, "new_unique_id", unique_id)

    def no_group(*_: Any) -> None:
        raise RuntimeError("no group")

    with monkeypatch.context() as patch:
        patch.setattr(remote_engine, "join_group", no_group)
        with pytest.raises(RolloutServerError, match="weight sync: FileNotFoundError"):
            run.sync()
    monkeypatch.setattr(remote_engine, "join_group", join_by_pipe)
    for seed in range(2):
        run.change_weights(seed)
        run.sync()
    assert len(made) == 2
    requests = run.requests()
    assert largest_gap(run, requests, run.engine.generate(requests, GREEDY)) < 1e-3


def test_a_run_without_the_token_says_where_it_is_from(target, monkeypatch):
    """The source that was looked at, and how another is given."""
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
