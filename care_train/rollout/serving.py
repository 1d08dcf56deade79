"""`care-train serve`: an empty vLLM behind HTTP, which a run fills with its weights."""

import signal
import socket
import tempfile
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack

import torch

from care_train.config import VllmSettings
from care_train.models.load import LoadedModel
from care_train.rollout.model_identity import model_identity
from care_train.rollout.server_app import RolloutServer, build_app
from care_train.rollout.server_engine import EngineLoop
from care_train.rollout.server_guard import Guard
from care_train.rollout.server_messages import PromptLimits
from care_train.rollout.server_token import server_token
from care_train.rollout.vllm_process import context_within, start_vllm

_GRACE_SECONDS = 5
"""For answers under way when the server is told to end."""


def serve(
    loaded: LoadedModel,
    settings: VllmSettings,
    *,
    max_context: int,
    batch_size: int,
    max_image_pixels: int,
    lora_rank: int | None,
    host: str,
    port: int,
    allowed_hosts: Sequence[str],
    announce: Callable[[str, str], None],
) -> bool:
    """Serve until SIGTERM or Ctrl-C; whether that is how it ended.

    Args:
        loaded: the model without weights.
        settings: `rollout.vllm`.
        max_context: longest prompt, forced prefix and response together, in tokens.
        batch_size: sequences generated at once, of all ranks together.
        max_image_pixels: the largest width x height of an image in a prompt.
        lora_rank: of adapters that come beside base weights; None where none do.
        host: address to listen at.
        port: 0 takes a free one.
        allowed_hosts: more names that runs may call the server by.
        announce: gets the URL, and where the token is, once requests are taken.

    Raises:
        ValueError: vLLM is not installed, the port is taken, or a given token is none.
    """
    max_context = context_within(loaded, max_context)
    with ExitStack() as stack:
        # Port and token first: vLLM takes long to start.
        listening = stack.enter_context(_listen(host, port))
        url = f"http://{_announced(host)}:{listening.getsockname()[1]}"
        token = stack.enter_context(server_token(url, settings.server_token_file))
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
            worker_extension_cls="care_train.rollout.weight_receiver.WeightReceiver",
        )
        info = {
            "model": model_identity(loaded),
            "max_context": max_context,
            "lora_rank": lora_rank,
            "num_workers": settings.tensor_parallel_size,
            "backend": "nccl" if torch.cuda.is_available() else "tcp",
        }
        limits = prompt_limits(loaded, max_context, max_image_pixels)
        value = token.value
        assert value is not None
        announce(url, token.source)

        def make_app(on_death: Callable[[], None]) -> Guard:
            server = RolloutServer(EngineLoop(llm, on_death), info, limits)
            return build_app(server, value, host, allowed_hosts)

        return _answer_until_told(make_app, listening)


def prompt_limits(loaded: LoadedModel, max_context: int, max_image_pixels: int) -> PromptLimits:
    """What prompts of a model may be."""
    config = loaded.model.config
    media = (getattr(config, f"{kind}_token_id", None) for kind in ("video", "audio"))
    return PromptLimits(
        vocab_size=config.get_text_config().vocab_size,
        max_context=max_context,
        image_token_id=loaded.image_token_id if loaded.processor is not None else None,
        media_token_ids=frozenset(token for token in media if token is not None),
        max_image_pixels=max_image_pixels,
    )


def _announced(host: str) -> str:
    """How other machines call this one, where it listens at all of its addresses."""
    return socket.gethostname() if host in ("0.0.0.0", "::", "") else host


def _listen(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port))
    except OSError as error:
        raise ValueError(f"--host, --port: cannot listen at {host}:{port}: {error}") from None


def _answer_until_told(
    make_app: Callable[[Callable[[], None]], Guard], listening: socket.socket
) -> bool:
    import uvicorn

    death = threading.Event()

    def die() -> None:
        death.set()
        web.should_exit = True

    web = uvicorn.Server(
        uvicorn.Config(
            make_app(die),
            log_level="error",
            timeout_graceful_shutdown=_GRACE_SECONDS,
            # Weights are fetched from the address that asks, which no header may say.
            proxy_headers=False,
            ws="none",
        )
    )
    # uvicorn ends by raising again the signal that it caught: to end as asked is no failure.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    web.run(sockets=[listening])
    return not death.is_set()
