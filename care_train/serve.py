"""`care-train serve`: vLLM in a process of its own, for the run of a configuration."""

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from care_train.config import Config
from care_train.data import load_samples
from care_train.models.load import load_without_weights
from care_train.models.tiny import model_folder
from care_train.rollout.serving import serve as serve_model
from care_train.training.session import vllm_limits


def serve(config: Config, host: str, port: int, allowed_hosts: Sequence[str] = ()) -> bool:
    """Serve until a signal; whether vLLM was well to the end.

    The run that uses it sends the weights: it need not be started before.

    Args:
        config: the run's.
        host: address to listen at.
        port: 0 takes a free one.
        allowed_hosts: more names that runs may call the server by.

    Raises:
        ValueError: no model at `model.path`, no vLLM, no token, or the port is taken.
    """
    with tempfile.TemporaryDirectory(prefix="care-serve-") as temporary:
        # A tiny model is the one that `quickstart` makes under the same settings.
        rows = (
            row
            for data in (config.sft.data, config.data)
            for row in load_samples(data, config.seed)
        )
        folder = model_folder(config, Path(temporary) / "model", rows)
        loaded = load_without_weights(config.model, folder)
    max_context, batch_size = vllm_limits(config)
    lora = config.model.lora if config.rollout.vllm.lora == "adapter" else None
    return serve_model(
        loaded,
        config.rollout.vllm,
        max_context=max_context,
        batch_size=batch_size,
        lora_rank=None if lora is None else lora.rank,
        host=host,
        port=port,
        allowed_hosts=allowed_hosts,
        announce=lambda url, token: _announce(config, url, token),
    )


def _announce(config: Config, url: str, token: str) -> None:
    print(
        f"serving {config.model.path} at {url}\n"
        f"  train with rollout.engine=vllm rollout.vllm.server={url}\n"
        f"  token in {token}; for runs of other users or machines see docs/rollouts.md",
        file=sys.stderr,
        flush=True,
    )
