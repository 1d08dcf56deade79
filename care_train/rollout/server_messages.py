"""What trainer and server say to each other: plain JSON, each prompt and image once per batch.

Nothing is pickled. The server checks each message against the schema here before it uses any of it:
unknown keys, other types and numbers out of range are errors that name the key.
"""

import base64
import binascii
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import prod
from typing import Annotated, Any, Literal

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from care_train.data.images import load_image
from care_train.rollout.engine import Completion, Request, SamplingSettings
from care_train.rollout.server_engine import EngineError, InvalidError
from care_train.rollout.vllm_inputs import unexpanded_ids, vllm_prompt
from care_train.rollout.weight_channel import (
    KEY_BYTES,
    UNIQUE_ID_BYTES,
    NcclMeeting,
    TcpMeeting,
)

MAX_BUCKET_BYTES = 1 << 35
"""Larger than any one tensor: an embedding of 256k tokens by 16k in float32 has 2^34."""

_ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

_TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]
_Size = Annotated[int, Field(ge=0, lt=1 << 40)]
_Checksum = Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)]
_Identifier = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
_TensorName = Annotated[str, Field(min_length=1, max_length=500)]


class Message(BaseModel):
    """What all messages have in common."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class SamplingMessage(Message):
    """`SamplingSettings`."""

    max_new_tokens: int = Field(ge=1, lt=1 << 31)
    temperature: float = Field(gt=0, le=2)
    """vLLM takes no higher one."""
    top_p: float = Field(gt=0, le=1)
    top_k: int = Field(ge=0, lt=1 << 31)
    greedy: bool


class PromptMessage(Message):
    """A prompt with one placeholder per image, and its images as base64 of PNG files."""

    token_ids: tuple[_TokenId, ...] = Field(min_length=1)
    images: tuple[str, ...]


class RequestMessage(Message):
    """One response to sample."""

    prompt: int = Field(ge=0)
    """Which of the batch's."""
    prefix_ids: tuple[_TokenId, ...]
    seed: int = Field(ge=0, lt=1 << 63)


class GenerateMessage(Message):
    """A batch."""

    version: _Identifier | None
    """Of the weights that it is to be sampled from; None: the run has sent none."""
    sampling: SamplingMessage
    eos_ids: tuple[_TokenId, ...]
    prompts: tuple[PromptMessage, ...]
    requests: tuple[RequestMessage, ...] = Field(min_length=1, max_length=1 << 16)

    @model_validator(mode="after")
    def _prompts_are_there(self) -> "GenerateMessage":
        for place, request in enumerate(self.requests):
            if request.prompt >= len(self.prompts):
                raise ValueError(
                    f"requests.{place}.prompt: got {request.prompt}, wanted one of the batch's "
                    f"{len(self.prompts)} prompts"
                )
        return self


class LeaseMessage(Message):
    """A run takes the server, or keeps it."""

    sender: _Identifier
    who: str = Field(min_length=1, max_length=200, pattern=r"^[ -~]+$")
    """Its process and machine, for others who ask."""


class SenderMessage(Message):
    """Something that only the run that has the server may do."""

    sender: _Identifier


class TcpMessage(SenderMessage):
    """The trainer waits at a port of the address that this request comes from."""

    backend: Literal["tcp"]
    port: int = Field(ge=1, le=65535)
    key: str
    """Base64."""


class NcclMessage(SenderMessage):
    """The trainer waits for those that have NCCL's unique id."""

    backend: Literal["nccl"]
    unique_id: str
    """Base64."""


OpenMessage = Annotated[TcpMessage | NcclMessage, Field(discriminator="backend")]


class BucketMessage(SenderMessage):
    """The tensors that the trainer broadcasts meanwhile: name, dtype, shape and checksum of each,
    in the order in which they lie in the bucket."""

    tensors: tuple[
        tuple[
            _TensorName,
            Literal["float32", "bfloat16", "float16"],
            Annotated[tuple[_Size, ...], Field(max_length=8)],
            _Checksum,
        ],
        ...,
    ] = Field(min_length=1)
    num_bytes: int = Field(ge=0, le=MAX_BUCKET_BYTES)

    @model_validator(mode="after")
    def _tensors_fill_the_bucket(self) -> "BucketMessage":
        total = sum(prod(shape) * _ITEM_BYTES[dtype] for _, dtype, shape, _ in self.tensors)
        if total != self.num_bytes:
            raise ValueError(f"num_bytes: got {self.num_bytes}, wanted the tensors' {total}")
        return self


@dataclass(frozen=True)
class PromptLimits:
    """What a server's model takes."""

    vocab_size: int
    max_context: int
    """Prompt, prefix and response together, in tokens."""
    image_token_id: int | None
    """The placeholder; None where the model takes no images."""
    media_token_ids: frozenset[int]
    """Other tokens that stand for what is no text."""
    max_image_pixels: int


def parse(kind: TypeAdapter[Any], content: bytes) -> Any:
    """A message of a kind.

    Raises:
        InvalidError: names the first key that is wrong, what it got and what it wanted.
    """
    try:
        return kind.validate_json(content)
    except ValidationError as error:
        [first, *_] = error.errors(include_url=False, include_context=False)
        place = ".".join(map(str, first["loc"]))
        got = "" if first["type"] in ("missing", "value_error") else f"; got {first['input']!r:.80}"
        problem = first["msg"].removeprefix("Value error, ")
        raise InvalidError(f"{place}: {problem}{got}" if place else problem) from None


def pack_requests(
    requests: Sequence[Request],
    sampling: SamplingSettings,
    eos_ids: Sequence[int],
    image_token_id: int | None,
    merge_size: int,
) -> dict[str, Any]:
    """A batch of requests: prompts with one placeholder per image, images as PNG (lossless)."""
    places: dict[int, int] = {}
    prompts = []
    for request in requests:
        if id(request.prompt) not in places:
            places[id(request.prompt)] = len(prompts)
            ids = unexpanded_ids(request.prompt, image_token_id, merge_size)
            images = [_encode_image(image) for image in request.prompt.images]
            prompts.append({"token_ids": ids, "images": images})
    return {
        "sampling": asdict(sampling),
        "eos_ids": list(eos_ids),
        "prompts": prompts,
        "requests": [
            {"prompt": places[id(r.prompt)], "prefix_ids": r.prefix_ids, "seed": r.seed}
            for r in requests
        ],
    }


def unpack_meeting(message: TcpMessage | NcclMessage, address: str) -> TcpMeeting | NcclMeeting:
    """How the workers meet the trainer whose request came from `address`.

    Raises:
        InvalidError: key or unique id are none.
    """
    if isinstance(message, NcclMessage):
        return NcclMeeting(_from_base64("unique_id", message.unique_id, UNIQUE_ID_BYTES))
    return TcpMeeting(address, message.port, _from_base64("key", message.key, KEY_BYTES))


def unpack_prompts(message: GenerateMessage, limits: PromptLimits) -> list[dict[str, Any]]:
    """What vLLM takes for each request of a batch; requests of a prompt share its images.

    Raises:
        InvalidError: tokens or images that the model does not take; names the key.
    """
    _check_tokens(message, limits)
    images = [
        [
            _decode_image(text, f"prompts.{place}.images.{number}", limits.max_image_pixels)
            for number, text in enumerate(prompt.images)
        ]
        for place, prompt in enumerate(message.prompts)
    ]
    return [
        vllm_prompt(message.prompts[r.prompt].token_ids, r.prefix_ids, images[r.prompt])
        for r in message.requests
    ]


def _check_tokens(message: GenerateMessage, limits: PromptLimits) -> None:
    _check_vocabulary("eos_ids", message.eos_ids, limits)
    for place, prompt in enumerate(message.prompts):
        _check_text(f"prompts.{place}.token_ids", prompt.token_ids, len(prompt.images), limits)
    for place, request in enumerate(message.requests):
        _check_text(f"requests.{place}.prefix_ids", request.prefix_ids, 0, limits)
        length = len(message.prompts[request.prompt].token_ids) + len(request.prefix_ids)
        if length + message.sampling.max_new_tokens > limits.max_context:
            raise InvalidError(
                f"requests.{place}: got a context of {length} tokens and max_new_tokens "
                f"{message.sampling.max_new_tokens}, wanted at most {limits.max_context} together"
            )


def _check_text(key: str, ids: Sequence[int], num_images: int, limits: PromptLimits) -> None:
    """Ids of the vocabulary, and an image for each that stands for one: vLLM's forward would not
    survive a placeholder without."""
    _check_vocabulary(key, ids, limits)
    placeholders = 0 if limits.image_token_id is None else ids.count(limits.image_token_id)
    if placeholders != num_images:
        raise InvalidError(
            f"{key}: got {num_images} images and {placeholders} image tokens, wanted as many"
        )
    if media := limits.media_token_ids.intersection(ids):
        raise InvalidError(f"{key}: got {min(media)}, wanted no token of media but images")


def _check_vocabulary(key: str, ids: Sequence[int], limits: PromptLimits) -> None:
    if ids and max(ids) >= limits.vocab_size:
        raise InvalidError(f"{key}: got {max(ids)}, wanted ids below {limits.vocab_size}")


def pack_expansions(
    message: GenerateMessage, expanded: Sequence[Sequence[int]]
) -> list[list[int] | None]:
    """vLLM's expansion of each prompt, once, without the requests' prefixes.

    Args:
        message: the batch.
        expanded: per request, all of its prompt's tokens in vLLM.

    Returns:
        Per prompt; None for one that no request has.

    Raises:
        EngineError: vLLM expanded one prompt in two ways.
    """
    prompts: list[list[int] | None] = [None] * len(message.prompts)
    for request, ids in zip(message.requests, expanded, strict=True):
        own, place = list(ids[: len(ids) - len(request.prefix_ids)]), request.prompt
        if prompts[place] not in (None, own):
            raise EngineError(f"vLLM expanded prompt {place} of the batch in two ways")
        prompts[place] = own
    return prompts


def unpack_completion(values: dict[str, Any], eos_ids: Sequence[int]) -> Completion:
    """One completion of the server's answer."""
    ids = tuple(values["token_ids"])
    return Completion(ids, ids[-1] in eos_ids, tuple(values["log_probs"]))


def _encode_image(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=1)
    return base64.b64encode(buffer.getvalue()).decode()


def _decode_image(text: str, key: str, max_pixels: int) -> Image.Image:
    content = _from_base64(key, text)
    try:
        return load_image(content, location=key, max_pixels=max_pixels)
    except ValueError as error:
        raise InvalidError(str(error)) from None


def _from_base64(key: str, text: str, length: int | None = None) -> bytes:
    try:
        content = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidError(f"{key}: got no base64: {error}") from None
    if length is not None and len(content) != length:
        raise InvalidError(f"{key}: got {len(content)} bytes, wanted {length}")
    return content
