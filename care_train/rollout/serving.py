"""`care-train serve`: an empty vLLM behind HTTP, which a run fills with its weights."""

import signal
import socket
import tempfile
import threading
from collections.abc import Callable
from typing import Any

from care_train.models.load import LoadedModel
from care_train.rollout.model_identity import model_identity
from care_train.rollout.server_app import RolloutServer, build_app
from care_train.rollout.server_engine import EngineLoop
from care_train.rollout.settings import VllmSettings
from care_train.rollout.vllm_process import context_within, start_vllm

_GRACE_SECONDS = 5
"""For answers under way when the server is told to end."""


def serve(
    loaded: LoadedModel,
    settings: VllmSettings,
    *,
    max_context: int,
    batch_size: int,
    lora_rank: int | None,
    host: str,
    port: int,
    announce: Callable[[str], None],
) -> bool:
    """Serve until SIGTERM or Ctrl-C; whether that is how it ended.

    Args:
        loaded: the model without weights.
        settings: `rollout.vllm`.
        max_context: longest prompt, forced prefix and response together, in tokens.
        batch_size: sequences generated at once, of all ranks together.
        lora_rank: of adapters that come beside base weights; None where none do.
        host: address to listen at.
        port: 0 takes a free one.
        announce: gets the URL once requests are taken.

    Raises:
        ValueError: vLLM is not installed, or the port is taken.
    """
    max_context = context_within(loaded, max_context)
    # The port first: vLLM takes long to start.
    with _listen(host, port) as listening, tempfile.TemporaryDirectory("-care-vllm") as folder:
        loaded.save_skeleton(folder)
        llm = start_vllm(
            loaded,
            folder,
            settings,
            max_context,
            batch_size,
            lora_rank,
            distributed_executor_backend="uni" if settings.tensor_parallel_size == 1 else "mp",
            worker_extension_cls="care_train.rollout.weight_receiver.WeightReceiver",
        )
        info = {
            "model": model_identity(loaded),
            "max_context": max_context,
            "lora_rank": lora_rank,
            "num_workers": settings.tensor_parallel_size,
        }
        announce(f"http://{host}:{listening.getsockname()[1]}")
        return _answer_until_told(llm, info, listening)


def _listen(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port))
    except OSError as error:
        raise ValueError(f"--host, --port: cannot listen at {host}:{port}: {error}") from None


def _answer_until_told(llm: Any, info: dict[str, Any], listening: socket.socket) -> bool:
    import uvicorn

    death = threading.Event()

    def die() -> None:
        death.set()
        web.should_exit = True

    app = build_app(RolloutServer(EngineLoop(llm, die), info))
    web = uvicorn.Server(
        uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=_GRACE_SECONDS)
    )
    # uvicorn ends by raising again the signal that it caught: to end as asked is no failure.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    web.run(sockets=[listening])
    return not death.is_set()
