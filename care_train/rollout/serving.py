"""`care-train serve`: starts an empty vLLM and answers for it until a signal."""

import signal
import socket
import tempfile
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch

from care_train.config import VllmSettings
from care_train.models.load import LoadedModel
from care_train.rollout.server_access import server_token
from care_train.rollout.server_app import RolloutServer, build_app
from care_train.rollout.server_loop import EngineLoop
from care_train.rollout.server_messages import PromptLimits, ServerInfo, model_identity
from care_train.rollout.vllm_process import context_within, start_vllm

_GRACE_SECONDS = 5
"""What running answers get when the server is told to end."""


def serve(
    loaded: LoadedModel,
    settings: VllmSettings,
    *,
    max_context: int,
    batch_size: int,
    lora_rank: int | None,
    host: str,
    port: int,
    allowed_hosts: Sequence[str],
    announce: Callable[[str, str], None],
) -> bool:
    """Serve until SIGTERM or Ctrl-C; returns whether that is how it ended.

    Args:
        loaded: the model without weights.
        settings: `rollout.vllm`.
        max_context: longest prompt, forced prefix and response together, in tokens.
        batch_size: sequences generated at once, of all ranks together.
        lora_rank: of adapters that come beside base weights; None where none do.
        host: address to listen at.
        port: 0 takes a free one.
        allowed_hosts: more names that runs may call the server by.
        announce: gets the URL, and where the token is, once requests are taken.

    Raises:
        ValueError: vLLM is not installed, the port is taken, or a given token has another form.
    """
    max_context = context_within(loaded, max_context)
    with ExitStack() as stack:
        # Port and token first: vLLM takes long to start.
        listening = stack.enter_context(_listen(host, port))
        name = socket.gethostname() if host in ("0.0.0.0", "::", "") else host
        url = f"http://{name}:{listening.getsockname()[1]}"
        token = stack.enter_context(server_token(url))
        assert token.value is not None
        folder = stack.enter_context(tempfile.TemporaryDirectory("-care-vllm"))
        loaded.save_skeleton(folder)
        llm = start_vllm(
            loaded,
            folder,
            settings,
            max_context,
            batch_size,
            lora_rank,
            distributed_executor_backend="uni" if settings.tensor_parallel_size == 1 else "mp",
        )
        info = ServerInfo(
            identity=model_identity(loaded),
            max_context=max_context,
            lora_rank=lora_rank,
            num_workers=settings.tensor_parallel_size,
            backend="nccl" if torch.cuda.is_available() else "tcp",
        )
        limits = PromptLimits.of(loaded, max_context)
        died = threading.Event()
        server = RolloutServer(EngineLoop(llm, died.set), info, limits)
        app = build_app(server, token.value, host, allowed_hosts)
        announce(url, token.source)
        return _answer_until_told(app, listening, died)


def _listen(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port))
    except OSError as error:
        raise ValueError(f"--host, --port: cannot listen at {host}:{port}: {error}") from None


def _answer_until_told(app: Any, listening: socket.socket, died: threading.Event) -> bool:
    import uvicorn

    web = uvicorn.Server(
        uvicorn.Config(
            app,
            log_level="error",
            timeout_graceful_shutdown=_GRACE_SECONDS,
            # Weights are fetched from the address that asks, which no header may change.
            proxy_headers=False,
            ws="none",
        )
    )

    def end_when_dead() -> None:
        died.wait()
        web.should_exit = True

    threading.Thread(target=end_when_dead, daemon=True).start()
    # uvicorn raises the signal that it caught once more; to end as asked is no failure.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    web.run(sockets=[listening])
    return not died.is_set()
