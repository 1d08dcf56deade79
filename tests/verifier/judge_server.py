"""A real local HTTP server that speaks the OpenAI protocol, in place of a judge."""

import json
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Server(ThreadingHTTPServer):
    """Counts requests; `reply` makes an answer from a prompt.

    An answer is a text, a failing status, or a whole body as bytes. Of the options in `refused` it
    names the first that it gets, as OpenAI's endpoint does.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.prompts: list[str] = []
        self.keys: list[str] = []
        self.options: list[set[str]] = []
        self.refused: tuple[str, ...] = ()
        self.reply: Callable[[str], str | int | bytes] = lambda prompt: "CORRECT"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that waits no longer, as some tests have it, is no error of the server."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert self.path == "/v1/chat/completions" and body.get("temperature", 0.0) == 0.0
        prompt = body["messages"][0]["content"]
        self.server.prompts.append(prompt)
        self.server.keys.append(self.headers["Authorization"].removeprefix("Bearer "))
        self.server.options.append(body.keys() - {"model", "messages"})
        refused = next((name for name in self.server.refused if name in body), None)
        reply = _refusal(refused) if refused else self.server.reply(prompt)
        encoded = reply if isinstance(reply, bytes) else _completion(body["model"], str(reply))
        self.send_response(400 if refused else reply if isinstance(reply, int) else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(encoded)))
        self.end_headers()
        self.wfile.write(encoded)

    def log_message(self, format: str, *args: object) -> None:
        pass


def _refusal(name: str) -> bytes:
    """What OpenAI sends for an option that a model does not take."""
    said = f"Unsupported parameter: '{name}' is not supported with this model."
    error = {"message": said, "type": "invalid_request_error", "param": name}
    return json.dumps({"error": error | {"code": "unsupported_parameter"}}).encode()


def _completion(model: str, content: str) -> bytes:
    message = {"role": "assistant", "content": content}
    choice = {"index": 0, "finish_reason": "stop", "message": message}
    data = {"id": "1", "object": "chat.completion", "created": 0, "model": model}
    return json.dumps(data | {"choices": [choice]}).encode()


@contextmanager
def serving() -> Iterator[Server]:
    """A running server."""
    server = Server()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
