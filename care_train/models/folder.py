"""Whether a model's folder is whole: transformers itself loads what is left of one in silence.

Weights that are not in the files it fills with random numbers, a tokenizer without its vocabulary
it makes of the special tokens alone. Here each is a `ValueError` that names what is wrong.
"""

import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

_FETCH = "fetch the whole repository, for example with `hf download ORG/NAME --local-dir FOLDER`"
_WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""Of which transformers reads the first that is there."""
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_PROBE = "Is AB = 3? (x_1^2 + y) / 7; \\boxed{0.5}\n <b> é中🙂"
_FEWEST_TOKENS = 0.9
"""Of the model's embeddings: they are padded to a round number, by less than a hundredth."""


@contextmanager
def readable(folder: Path, part: str, fix: str = _FETCH) -> Iterator[None]:
    """Turns what transformers raises on a folder it cannot read into a `ValueError` naming it."""
    try:
        yield
    # By its version and the model, transformers meets damaged or missing files with any of these.
    except (
        AttributeError,
        ImportError,
        LookupError,
        OSError,
        SafetensorError,
        TypeError,
        ValueError,
    ) as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ValueError(
            f"model.path: {folder}: {part} cannot be read ({reason}): {fix}"
        ) from error


def read_config(folder: Path) -> Any:
    """The folder's config.json as transformers' class for it; code in the folder is never run.

    Raises:
        ValueError: no config.json, one that cannot be read, a Git LFS pointer in place of any file,
            a model that needs code of its own, or a quantised one.
    """
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            raise ValueError(
                f"model.path: {folder}: holds an adapter alone; merge it into its base model first "
                "(peft: `merge_and_unload`, or `care-train export` without --adapter)"
            )
        raise ValueError(
            f"model.path: {folder}: no config.json there; wanted a Hugging Face model folder, or a "
            "model of the Hub (ORG/NAME)"
        )
    small = (path for path in folder.iterdir() if path.is_file() and path.stat().st_size <= 1024)
    pointers = sorted(path.name for path in small if path.read_bytes().startswith(_LFS_POINTER))
    if pointers:
        raise ValueError(
            f"model.path: {folder}: {_some(pointers)}: a Git LFS pointer in place of the file: run "
            "`git lfs pull` in the folder, or download it with `hf download`"
        )
    values = _json_object(folder, "config.json")
    if "quantization_config" in values:
        raise ValueError(
            f"model.path: {folder}: the weights are quantised (quantization_config in "
            "config.json) and cannot be trained: take the model in bfloat16 or float32"
        )
    if "auto_map" in values and values.get("model_type") not in CONFIG_MAPPING_NAMES:
        raise ValueError(
            f"model.path: {folder}: model_type {values.get('model_type')!r} needs the code in the "
            "folder, which is never run: take a model that transformers has itself (often the "
            "repository whose name ends with -HF or -hf)"
        )
    with readable(folder, "config.json", "install a transformers version that has this model"):
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)


def _json_object(folder: Path, name: str) -> dict[str, Any]:
    with readable(folder, name):
        return dict(json.loads((folder / name).read_text(encoding="utf-8")))


def check_weight_files(folder: Path) -> None:
    """All files of weights are there, and the safetensors among them are as long as they say.

    Raises:
        ValueError: naming the files that are missing or cut short.
    """
    first = next((name for name in _WEIGHT_FILES if (folder / name).is_file()), None)
    if first is None:
        raise ValueError(
            f"model.path: {folder}: no weights there; wanted model.safetensors, or its shards with "
            f"model.safetensors.index.json: {_FETCH}"
        )
    names = [first]
    if first.endswith(".json"):
        names = sorted(set(_json_object(folder, first).get("weight_map", {}).values()))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ValueError(
            f"model.path: {folder}: {first} lists {_some(missing)}, not there: {_FETCH}"
        )
    for name in names:
        if name.endswith(".safetensors"):
            with readable(folder, name), safe_open(folder / name, framework="pt"):
                pass


def check_loaded(folder: Path, report: Mapping[str, Any]) -> None:
    """Every weight of the model came from the folder, and the folder has no others.

    Raises:
        ValueError: naming the weights, by `report`: transformers' `output_loading_info`.
    """
    missing, unknown = sorted(report["missing_keys"]), sorted(report["unexpected_keys"])
    shapes = [
        f"{name} {list(found)} instead of {list(wanted)}"
        for name, found, wanted in sorted(report["mismatched_keys"])
    ]
    faults = (
        ("weights of the model are not in the folder", missing),
        ("in the folder are not the model's", unknown),
        ("have another shape", shapes),
    )
    found = [f"{len(names)} {what}: {_some(names)}" for what, names in faults if names]
    if not found:
        return
    fix = "save the model that config.json describes, by its own `save_pretrained`"
    if prefix := _prefix(missing, unknown):
        fix = f"take the prefix {prefix!r} off the names in the files, as `save_pretrained` of the "
        fix += "unwrapped model does"
    raise ValueError(f"model.path: {folder}: {'; '.join(found)}: {fix}")


def _prefix(missing: Collection[str], unknown: Collection[str]) -> str:
    """What stands before every unknown name that would otherwise be a missing one; "": nothing."""
    own = set(missing)
    for name in unknown:
        for place in (i + 1 for i, letter in enumerate(name) if letter == "."):
            if name[place:] in own and all(n.startswith(name[:place]) for n in unknown):
                return name[:place]
    return ""


def check_tokenizer(folder: Path, tokenizer: Any, num_embeddings: int) -> None:
    """The tokenizer gives back the text it was given, and has the size of the model's vocabulary.

    Raises:
        ValueError: it loses text, or is that of another model.
    """
    ids = tokenizer(_PROBE, add_special_tokens=False)["input_ids"]
    text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    # A tokenizer may add or join spaces.
    if "".join(text.split()) != "".join(_PROBE.split()):
        raise ValueError(
            f"model.path: {folder}: the tokenizer, of {len(tokenizer)} tokens, loses text: "
            f"{_PROBE!r} becomes {text!r}; is its vocabulary there (tokenizer.json, or vocab.json "
            f"and merges.txt)? {_FETCH}"
        )
    if not _FEWEST_TOKENS * num_embeddings <= len(tokenizer) <= num_embeddings:
        raise ValueError(
            f"model.path: {folder}: the tokenizer has {len(tokenizer)} tokens, the model "
            f"{num_embeddings} embeddings: it is another model's, or lost its vocabulary: {_FETCH}"
        )


def _some(names: Collection[str]) -> str:
    """The first few names."""
    first = list(names)[:3]
    return ", ".join(first) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
