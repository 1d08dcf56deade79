"""Rows of data to the ids and pixels that a model reads, and sampled ids back to text."""

import codecs
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from jinja2 import TemplateError
from PIL import Image
from transformers.convert_slow_tokenizer import bytes_to_unicode

from care_train.config import PromptSettings
from care_train.data import Sample, image_sizes, load_images
from care_train.data.columns import IMAGE_PLACEHOLDER
from care_train.models.load import LoadedModel

# An opening tag, or an empty pair where the template keeps the model from thinking.
_OPENED = re.compile(r"<(?P<tag>\w+)>\s*(?:</(?P=tag)>\s*)?$")


@dataclass(frozen=True, eq=False)
class EncodedPrompt:
    """A prompt as the model sees it, image placeholders expanded.

    Compared by identity: a group's rollouts share theirs, and its images are encoded once.
    """

    token_ids: tuple[int, ...]
    pixel_values: torch.Tensor | None = field(default=None, repr=False)
    """[patches, patch_dim] of all its images."""
    image_grid_thw: torch.Tensor | None = None
    """[images, 3] int64: patches in time, height and width."""
    images: tuple[Image.Image, ...] = field(default=(), repr=False)
    """The images themselves, for engines that process them on their own."""
    location: str = ""
    """File and row, for errors."""

    @property
    def num_images(self) -> int:
        return 0 if self.image_grid_thw is None else len(self.image_grid_thw)


class PromptEncoder:
    """Applies the chat template and the processor to samples."""

    def __init__(self, loaded: LoadedModel, prompt: PromptSettings) -> None:
        """Set up; one template is for the cold start, reinforcement learning and evaluation.

        Raises:
            ValueError: the chat template opens a rationale with another tag than
                `prompt.tags[0]`.
        """
        self._loaded = loaded
        self._prompt = prompt
        added = loaded.tokenizer.added_tokens_decoder.values()
        self._special = [token.content for token in added if token.special]
        self._opening = self._opened_rationale()

    def encode(self, samples: Sequence[Sample]) -> list[EncodedPrompt]:
        """Ids and pixels of samples; all images go through the image processor in one call.

        Raises:
            ValueError: naming the row: an unreadable image, images for a text model, a prompt that
                holds special tokens, or one longer than `prompt.max_prompt_tokens`.
        """
        # A lazy sequence reads a row anew each time: one object per row here.
        samples = list(samples)
        with_images = iter(self._encode_images([sample for sample in samples if sample.images]))
        prompts = []
        for sample in samples:
            if sample.images:
                prompt = next(with_images)
            else:
                ids = self._token_ids(self.render(sample))
                prompt = EncodedPrompt(tuple(ids), location=sample.where)
            self._check(sample, prompt)
            prompts.append(prompt)
        return prompts

    def _token_ids(self, text: str) -> list[int]:
        return self._loaded.tokenizer(text, add_special_tokens=False)["input_ids"]

    def num_tokens(self, sample: Sample) -> int:
        """Tokens of a sample's prompt, by its images' sizes: no pixel is decoded.

        Raises:
            ValueError: as `encode`, but for damage behind an image's head, and whatever the length.
        """
        text, sizes = self.render(sample), image_sizes(sample)
        images = sum(self._num_image_tokens(sample, *size) - 1 for size in sizes)
        return len(self._token_ids(text)) + images

    def _num_image_tokens(self, sample: Sample, width: int, height: int) -> int:
        processor = self._loaded.processor.image_processor
        try:
            patches = processor.get_number_of_image_patches(height, width, {})
        # What the processor raises on a strip of an image.
        except ValueError as error:
            raise ValueError(
                f"{sample.where}: an image of {width} x {height} pixels: {error}"
            ) from None
        return patches // processor.merge_size**2

    def _check(self, sample: Sample, encoded: EncodedPrompt) -> None:
        if encoded.pixel_values is not None:
            merge = self._loaded.processor.image_processor.merge_size**2
            wanted = len(encoded.pixel_values) // merge
            got = encoded.token_ids.count(self._loaded.image_token_id)
            if got != wanted:
                raise ValueError(
                    f"{sample.location}: the prompt has {got} image tokens, its images need "
                    f"{wanted}: take the processor that belongs to the model"
                )
        limit = self._prompt.max_prompt_tokens
        if len(encoded.token_ids) > limit:
            raise ValueError(
                f"{sample.location}: the prompt has {len(encoded.token_ids)} tokens, wanted at "
                f"most {limit}: raise prompt.max_prompt_tokens, lower model.image_pixels or drop "
                "the row (prompts and images are never truncated)"
            )

    def encode_text(self, text: str) -> tuple[int, ...]:
        """`encode_text` by the model's tokenizer."""
        return encode_text(self._loaded.tokenizer, text)

    def render(self, sample: Sample) -> str:
        """The chat template's text for a row, a placeholder for each image.

        Raises:
            ValueError: the row's prompt spells a special token, which the tokenizer would read as
                one: the end of the turn, an image.
        """
        pieces = sample.prompt.split(IMAGE_PLACEHOLDER) if sample.images else [sample.prompt]
        found = [token for token in self._special if any(token in piece for piece in pieces)]
        if found:
            raise ValueError(
                f"{sample.where}: prompt: holds the special tokens "
                f"{', '.join(found)}; wanted plain text, as they would end the turn or stand for "
                "an image: remove them"
            )
        messages: list[dict[str, Any]] = []
        if self._prompt.system is not None:
            messages.append({"role": "system", "content": self._prompt.system})
        prompt = sample.prompt
        if self._prompt.suffix is not None:
            prompt = f"{prompt.strip()} {self._prompt.suffix}"
        content = _content_parts(prompt, len(sample.images)) if sample.images else prompt
        messages.append({"role": "user", "content": content})
        text = self._apply_template(messages, True).removesuffix(self._opening)
        if sample.images:
            self._check_placeholders(sample, text)
        return text

    def _apply_template(self, messages: list[dict[str, Any]], add_generation_prompt: bool) -> str:
        template = self._loaded.processor or self._loaded.tokenizer
        try:
            return template.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        # ValueError: there is none. TemplateError: it is damaged, or takes no such messages.
        except (TemplateError, ValueError) as error:
            raise ValueError(
                f"model.path: {self._loaded.tokenizer.name_or_path}: no prompt can be made by its "
                f"chat template ({error}): wanted a chat model, with chat_template.jinja or "
                "`chat_template` in tokenizer_config.json; if it takes no system message, "
                "prompt.system=null"
            ) from error

    def _opened_rationale(self) -> str:
        """What the chat template begins the response with, such as Qwen3-VL Thinking's `<think>`.

        It is left out of the prompt: the response has its tags itself, so that they are learnt,
        rewarded and read like the rest of it.
        """
        probe = [{"role": "user", "content": "?"}]
        begun = self._apply_template(probe, True)
        begun = begun.removeprefix(self._apply_template(probe, False))
        opened = _OPENED.search(begun)
        if opened is None:
            return ""
        if opened["tag"] != self._prompt.think_tag:
            raise ValueError(
                f"prompt.tags: got {self._prompt.think_tag!r}, but the model's chat template "
                f"begins every response with <{opened['tag']}>: set prompt.tags="
                f"[{opened['tag']},{self._prompt.tags[1]}], or choose the Instruct model"
            )
        return opened[0]

    def _encode_images(self, samples: Sequence[Sample]) -> list[EncodedPrompt]:
        if not samples:
            return []
        texts = [self.render(sample) for sample in samples]
        images = [load_images(sample) for sample in samples]
        inputs = self._loaded.processor(
            text=texts,
            images=[i for row in images for i in row],
            # `image_inputs` makes them for a whole batch.
            text_kwargs={"return_mm_token_type_ids": False},
        )
        grids = torch.as_tensor(inputs["image_grid_thw"]).split([len(row) for row in images])
        pixels = torch.as_tensor(inputs["pixel_values"])
        patches = pixels.split([int(grid.prod(-1).sum()) for grid in grids])
        return [
            EncodedPrompt(tuple(ids), rows, grid, tuple(row), sample.where)
            for ids, rows, grid, row, sample in zip(
                inputs["input_ids"], patches, grids, images, samples, strict=True
            )
        ]

    def _check_placeholders(self, sample: Sample, text: str) -> None:
        wanted = len(sample.images)
        if self._loaded.processor is None:
            raise ValueError(
                f"{sample.location}: images: got {len(sample.images)}, wanted none: the model "
                "reads text only; choose a vision-language model or drop the images"
            )
        placeholders = text.count(self._loaded.processor.image_token)
        if placeholders != wanted:
            raise ValueError(
                f"{sample.location}: the rendered prompt has {placeholders} image placeholders, "
                f"wanted {wanted}, one per image: choose a model whose chat template shows images"
            )


def encode_text(tokenizer: Any, text: str) -> tuple[int, ...]:
    """Ids of text that follows a prompt, such as a reflection's prefix.

    Such text is data or model output: what spells a special token in it stays text.
    """
    encoded = tokenizer(text, add_special_tokens=False, split_special_tokens=True)
    return tuple(encoded["input_ids"])


def _content_parts(prompt: str, num_images: int) -> list[dict[str, str]]:
    """The message's parts; without `<image>` placeholders the images come first."""
    if IMAGE_PLACEHOLDER not in prompt:
        return [{"type": "image"}] * num_images + [{"type": "text", "text": prompt}]
    parts = []
    for place, piece in enumerate(prompt.split(IMAGE_PLACEHOLDER)):
        if place:
            parts.append({"type": "image"})
        if piece:
            parts.append({"type": "text", "text": piece})
    return parts


class TokenText:
    """Decodes byte-level BPE ids (Qwen, Llama 3, GPT) token by token, without re-decoding prefixes.

    Raises:
        ValueError: a tokenizer whose decoder is not byte-level.
    """

    def __init__(self, tokenizer: Any) -> None:
        decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
        if "ByteLevel" not in repr(decoder):
            raise ValueError(
                f"tokenizer {type(tokenizer).__name__}: got the decoder {decoder!r}, wanted a "
                "byte-level BPE tokenizer, whose tokens map to text spans exactly"
            )
        self._bytes = _TokenBytes(tokenizer)

    def opening(self, prompt_ids: Sequence[int], think_tag: str) -> str:
        """The think tag that a prompt ends with, as Qwen3-VL Thinking's template has it, or "".

        What is sampled behind it lacks the tag, and is a rationale from its first token on.
        """
        # More tokens than a tag has.
        end, _ = self.decode(prompt_ids[-16:])
        opened = re.search(rf"<{re.escape(think_tag)}>\s*$", end)
        return opened[0] if opened else ""

    def decode_response(
        self, prompt_ids: Sequence[int], token_ids: Sequence[int], think_tag: str
    ) -> tuple[str, list[int]]:
        """`decode` of what was sampled behind a prompt, with the `opening` that it goes on from."""
        opening = self.opening(prompt_ids, think_tag)
        text, ends = self.decode(token_ids)
        return opening + text, [len(opening) + end for end in ends]

    def decode(self, token_ids: Sequence[int]) -> tuple[str, list[int]]:
        """Text, and for each token the character offset where its text ends.

        Special tokens have no text. Bytes that are not UTF-8 become U+FFFD; a token that ends
        inside a character ends, in the offsets, before it.
        """
        encoded = [self._bytes[token_id] for token_id in token_ids]
        if (joined := b"".join(encoded)).isascii():
            return joined.decode(), list(accumulate(map(len, encoded)))
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        pieces = [decoder.decode(piece) for piece in encoded]
        text = "".join(pieces) + decoder.decode(b"", final=True)
        return text, list(accumulate(map(len, pieces)))


class _TokenBytes(dict[int, bytes]):
    """What each token stands for, looked up when it is first met."""

    def __init__(self, tokenizer: Any) -> None:
        # Special tokens have no text.
        super().__init__(
            (index, b"" if token.special else token.content.encode())
            for index, token in tokenizer.added_tokens_decoder.items()
        )
        self._tokenizer = tokenizer
        self._byte_of = {char: byte for byte, char in bytes_to_unicode().items()}

    def __missing__(self, token_id: int) -> bytes:
        token = self._tokenizer.convert_ids_to_tokens(token_id)
        # Padded vocabularies have ids without a token.
        self[token_id] = bytes(self._byte_of[char] for char in token or "")
        return self[token_id]
