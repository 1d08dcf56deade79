"""What trainer and server say to each other: one record per message, as JSON.

Nothing is pickled. The server validates each message before it uses any of it: unknown keys, other
types and numbers out of range are errors that name the key. Bytes travel as base64. A batch holds
each of its prompts once, with one placeholder per image and its images as PNG (lossless).
"""

import io
from collections.abc import Sequence
from typing import Annotated, Any, TypeVar

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from care_train.data.images import load_image
from care_train.models.load import LoadedModel
from care_train.rollout.engine import Completion, Request, SamplingSettings, model_identity
from care_train.rollout.vllm_engine import unexpanded_ids, vllm_prompt
from care_train.rollout.weight_sync import SentTensor

_TokenIds = tuple[Annotated[int, Field(ge=0, lt=1 << 31)], ...]
_Identifier = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
MessageType = TypeVar("MessageType", bound="Message")


class RequestError(Exception):
    """Why a request gets no answer, for whoever sent it. HTTP's status: 409 where it does not fit
    the server's state, 413 and 422 where it is wrong by itself, 500 where vLLM failed at it, 503
    where vLLM is gone."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Message(BaseModel):
    """What all messages have in common."""

    model_config = ConfigDict(
        strict=True,
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        ser_json_bytes="base64",
        val_json_bytes="base64",
    )


class PackedPrompt(Message):
    """A prompt with one placeholder per image, and its images as PNG files."""

    token_ids: _TokenIds = Field(min_length=1)
    images: tuple[bytes, ...]


class PackedRequest(Message):
    """One response to sample."""

    prompt: int = Field(ge=0)
    """Index into the batch's prompts."""
    prefix_ids: _TokenIds
    seed: int = Field(ge=0, lt=1 << 63)


class Generate(Message):
    """A batch of responses to sample."""

    version: _Identifier | None
    """Of the weights to sample from; None: the run has sent none."""
    sampling: SamplingSettings
    eos_ids: _TokenIds
    prompts: tuple[PackedPrompt, ...]
    requests: tuple[PackedRequest, ...] = Field(min_length=1, max_length=1 << 16)

    @model_validator(mode="after")
    def _prompts_exist(self) -> "Generate":
        for index, request in enumerate(self.requests):
            if request.prompt >= len(self.prompts):
                raise ValueError(
                    f"requests.{index}.prompt: got {request.prompt}, wanted one of the batch's "
                    f"{len(self.prompts)} prompts"
                )
        return self


class Generated(Message):
    """The answer to `Generate`."""

    # Log-probs of broken weights are NaN.
    model_config = ConfigDict(allow_inf_nan=True, ser_json_inf_nan="constants")

    expanded: tuple[tuple[int, ...] | None, ...]
    """Per prompt, its tokens as vLLM expanded them; None where no request asked for it."""
    completions: tuple[Completion, ...]
    """Per request."""


class OfSender(Message):
    """Something that only the run that has the lease may ask for."""

    sender: _Identifier


class TakeLease(OfSender):
    """A run takes the server, or keeps it."""

    who: str = Field(min_length=1, max_length=200, pattern=r"^[ -~]+$")
    """Its process and machine, for others who ask."""


class Begin(OfSender):
    """A weight sync begins."""

    version: _Identifier | None
    """Of the run's weights that the server holds: an adapter may come to their base weights."""
    unique_id: Annotated[bytes, Field(min_length=128, max_length=128)] | None
    """NCCL's, of a group in which the trainer's rank 0 waits for the server's workers. None: they
    have met, or need not."""


class Bucket(OfSender):
    """Some tensors of a weight sync."""

    tensors: tuple[SentTensor, ...] = Field(min_length=1)
    content: bytes | None
    """The tensors' bytes in this order; None: the trainer broadcasts them meanwhile."""

    @model_validator(mode="after")
    def _tensors_fill_the_bucket(self) -> "Bucket":
        total = sum(tensor.num_bytes for tensor in self.tensors)
        if self.content is not None and len(self.content) != total:
            got = len(self.content)
            raise ValueError(f"content: got {got} bytes, wanted the tensors' {total}")
        return self


class Done(Message):
    """The answer to what has no other."""

    version: _Identifier | None = None
    """After the end of a weight sync: the name of the weights, for `Generate`."""


class ServerInfo(Message):
    """What a run must know of a server before it uses it."""

    identity: dict[str, Any]
    """`server_identity` of what is served."""
    max_context: int
    """Longest prompt, forced prefix and response together, in tokens."""
    num_workers: int


def parse(kind: type[MessageType], content: bytes) -> MessageType:
    """A message of a kind.

    Raises:
        RequestError: names the first key that is wrong, what it got and what it wanted.
    """
    try:
        return kind.model_validate_json(content)
    except ValidationError as error:
        [first, *_] = error.errors(include_url=False, include_context=False)
        place = ".".join(map(str, first["loc"]))
        got = "" if first["type"] in ("missing", "value_error") else f"; got {first['input']!r:.80}"
        problem = first["msg"].removeprefix("Value error, ")
        raise RequestError(422, f"{place}: {problem}{got}" if place else problem) from None


def pack_batch(
    requests: Sequence[Request],
    sampling: SamplingSettings,
    loaded: LoadedModel,
    version: str | None,
) -> Generate:
    """The message for requests, each of their prompts packed once."""
    prompts = list(dict.fromkeys(request.prompt for request in requests))
    index_of = {prompt: index for index, prompt in enumerate(prompts)}
    return Generate(
        version=version,
        sampling=sampling,
        eos_ids=loaded.eos_token_ids,
        prompts=tuple(
            PackedPrompt(
                token_ids=unexpanded_ids(prompt, loaded), images=tuple(map(_png, prompt.images))
            )
            for prompt in prompts
        ),
        requests=tuple(
            PackedRequest(prompt=index_of[r.prompt], prefix_ids=r.prefix_ids, seed=r.seed)
            for r in requests
        ),
    )


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def unpack_batch(message: Generate, loaded: LoadedModel, max_context: int) -> list[dict[str, Any]]:
    """What vLLM takes for each request of a batch; requests of a prompt share its images.

    Raises:
        RequestError: tokens or images that the model does not take, or a context over
            `max_context` tokens; names the key. vLLM would crash on some of them, and sample
            nonsense from others.
    """
    _check_vocabulary("eos_ids", message.eos_ids, loaded)
    images = []
    for index, prompt in enumerate(message.prompts):
        place = f"prompts.{index}"
        _check_ids(f"{place}.token_ids", prompt.token_ids, loaded, len(prompt.images))
        files = enumerate(prompt.images)
        images.append([_image(content, f"{place}.images.{number}") for number, content in files])
    unpacked = []
    for index, request in enumerate(message.requests):
        _check_ids(f"requests.{index}.prefix_ids", request.prefix_ids, loaded, 0)
        ids = message.prompts[request.prompt].token_ids
        length, more = len(ids) + len(request.prefix_ids), message.sampling.max_new_tokens
        if length + more > max_context:
            raise RequestError(
                422,
                f"requests.{index}: got a context of {length} tokens and max_new_tokens {more}, "
                f"wanted at most {max_context} together",
            )
        unpacked.append(vllm_prompt(ids, request.prefix_ids, images[request.prompt]))
    return unpacked


def _check_vocabulary(key: str, ids: Sequence[int], loaded: LoadedModel) -> None:
    size = loaded.model.config.get_text_config().vocab_size
    if ids and max(ids) >= size:
        raise RequestError(422, f"{key}: got {max(ids)}, wanted ids below {size}")


def _check_ids(key: str, ids: Sequence[int], loaded: LoadedModel, num_images: int) -> None:
    """Ids of the vocabulary, and as many image placeholders as images."""
    _check_vocabulary(key, ids, loaded)
    takes_images = loaded.processor is not None
    placeholders = ids.count(loaded.image_token_id) if takes_images else 0
    if placeholders != num_images:
        raise RequestError(
            422, f"{key}: got {num_images} images and {placeholders} image tokens, wanted as many"
        )
    for kind in ("video", "audio"):
        if (token := getattr(loaded.model.config, f"{kind}_token_id", None)) in ids:
            raise RequestError(422, f"{key}: got {token}, wanted no token of media but images")


def _image(content: bytes, key: str) -> Image.Image:
    try:
        return load_image(content, location=key)
    except ValueError as error:
        raise RequestError(422, str(error)) from None


def server_identity(loaded: LoadedModel, lora_rank: int | None, backend: str) -> dict[str, Any]:
    """What trainer and server must agree on, but the weights; dotted names and JSON's values.

    Args:
        loaded: the model.
        lora_rank: of adapters that go beside base weights; None: merged weights.
        backend: by which the weights go (`weight_sync.backend_for`).
    """
    return {
        "rank of model.lora with rollout.vllm.lora=adapter": lora_rank,
        "weights go by (nccl: between GPUs; http: without)": backend,
        **model_identity(loaded),
    }
