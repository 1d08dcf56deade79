"""The protocol of rollout engines, and the records they take and give."""

import hashlib
import json
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from enum import Enum
from typing import Annotated, Any, Protocol, TypeVar

import torch
from pydantic import Field

from care_train.models.load import LoadedModel
from care_train.models.prompts import EncodedPrompt

Value = TypeVar("Value")

# They say who wrote the folder, not what the model is.
_IRRELEVANT = ("transformers_version", "_name_or_path", "architectures", "dtype", "use_cache")


@dataclass(frozen=True)
class SamplingSettings:
    """How tokens are drawn; the bounds hold where they come in a message to a server."""

    max_new_tokens: Annotated[int, Field(ge=1, lt=1 << 31)]
    temperature: Annotated[float, Field(gt=0, le=2)] = 1.0
    """Ignored where `greedy`. vLLM takes none above 2."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0, lt=1 << 31)] = 0
    greedy: bool = False


@dataclass(frozen=True)
class Request:
    """One response to sample."""

    prompt: EncodedPrompt
    seed: int
    """The response depends on this seed, the prompt and the weights, not on what it is batched
    with."""
    prefix_ids: tuple[int, ...] = ()
    """Tokens forced before the first sampled one."""


@dataclass(frozen=True)
class Completion:
    """The sampled tokens of one request."""

    token_ids: tuple[int, ...]
    """Ends with EOS where `finished`."""
    finished: bool
    log_probs: tuple[float, ...] | None = None
    """Per token, its log-prob under the distribution it was drawn from: after bans, temperature,
    top-k and top-p (greedy: after bans, at temperature 1). None where the engine keeps none."""


class WeightParts(Enum):
    """Which of the policy's weights a sync sends: all, adapters added to what they adapt or beside
    it; or adapters alone."""

    MERGED = "merged"
    BASE_AND_ADAPTER = "base and adapter"
    ADAPTER = "adapter"


class RolloutEngine(Protocol):
    """Samples responses from the current policy."""

    @property
    def wanted(self) -> WeightParts:
        """What the next `sync` is to send; the same on every rank."""
        ...

    @property
    def num_starts(self) -> int:
        """How often the engine started or woke up; 0 where it shares the trainer's model. After
        each start the trainer compares log-probs with it before it updates the policy."""
        ...

    def generate(self, requests: Sequence[Request], sampling: SamplingSettings) -> list[Completion]:
        """One completion per request, in order."""
        ...

    def sync(self, weights: Iterable[tuple[str, torch.Tensor]]) -> dict[str, float]:
        """Take over the policy's weights; due before generating after every optimiser step.

        Args:
            weights: each parameter's name in a Hugging Face folder and its whole tensor, which is
                valid until the next is asked for. An engine that needs none asks for none.

        Returns:
            What there is to log of it.
        """
        ...

    def rest(self) -> None:
        """Nothing is generated until the next `sync`: free memory for training."""
        ...


def request_seed(run_seed: int, step: int, prompt_id: str, rollout_index: int) -> int:
    """A 63-bit seed from run, step, prompt and rollout: the same whatever the ranks and batches."""
    text = f"{run_seed}/{step}/{prompt_id}/{rollout_index}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def banned_token_ids(loaded: LoadedModel) -> list[int]:
    """Image, vision and other special tokens but EOS, and the head's padding.

    A sampled image token would have no image, and the next forward would end with an error.
    """
    eos = set(loaded.eos_token_ids)
    special = loaded.tokenizer.added_tokens_decoder.items()
    banned = [i for i, token in special if token.special and i not in eos]
    # Ids above the tokenizer's are the head's padding, not tokens.
    num_ids = loaded.model.get_output_embeddings().out_features
    return banned + list(range(len(loaded.tokenizer), num_ids))


def model_identity(loaded: LoadedModel) -> dict[str, Any]:
    """All of a model but its weights that decides how prompts become tokens and tokens logits;
    dotted names and JSON's values."""
    banned = json.dumps(banned_token_ids(loaded)).encode()
    identity = {
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "banned tokens": hashlib.sha256(banned).hexdigest()[:16],
        **_flat("config", loaded.model.config.to_dict()),
    }
    if loaded.processor is not None:
        identity |= _flat("image processor", loaded.processor.image_processor.to_dict())
    # Sorted: a saved model's config.json has the keys in another order than the Hub's.
    return json.loads(json.dumps(identity, default=str, sort_keys=True))


def _flat(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if key in _IRRELEVANT:
            continue
        inner = f"{name}.{key}"
        flat |= _flat(inner, value) if isinstance(value, Mapping) else {inner: value}
    return flat


def in_background(work: Callable[[], Value]) -> Future[Value]:
    """Run `work` in a daemon thread, which does not keep the process from ending."""
    future: Future[Value] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        # Whoever waits for the result gets it.
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future
