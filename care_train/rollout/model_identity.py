"""Whether a server runs the trainer's model: compared when a run begins."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from care_train.models.load import LoadedModel
from care_train.rollout.engine import banned_token_ids

# They say who wrote the folder, not what the model is.
_IRRELEVANT = ("transformers_version", "_name_or_path", "architectures", "dtype", "use_cache")


def model_identity(loaded: LoadedModel) -> dict[str, Any]:
    """What decides how prompts become tokens and tokens logits, but the weights; JSON's types."""
    banned = json.dumps(banned_token_ids(loaded)).encode()
    identity = {
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "config": _relevant(loaded.model.config.to_dict()),
        "banned tokens": hashlib.sha256(banned).hexdigest()[:16],
    }
    if loaded.processor is not None:
        identity["image processor"] = loaded.processor.image_processor.to_dict()
    return json.loads(json.dumps(identity, default=str))


def first_difference(server: Any, trainer: Any, name: str = "") -> str | None:
    """Where two identities differ: the key, the server's value, the trainer's."""
    if not (isinstance(server, Mapping) and isinstance(trainer, Mapping)):
        return None if server == trainer else f"{name}: server {server!r}, trainer {trainer!r}"
    for key in sorted({*server, *trainer}):
        inner = f"{name}.{key}" if name else key
        difference = first_difference(server.get(key), trainer.get(key), inner)
        if difference is not None:
            return difference
    return None


def _relevant(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _relevant(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if key not in _IRRELEVANT
    }
