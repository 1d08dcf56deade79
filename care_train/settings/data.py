"""Settings of the rows: where they come from, and the held-out ones."""

from dataclasses import dataclass, field

from care_train.algorithm.settings import STRICT


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Where rows come from."""

    __pydantic_config__ = STRICT

    path: str = "easy_vqa"
    """`easy_vqa` (the published package), or a .jsonl, .json or .parquet file, or a folder saved by
    the datasets library."""
    split: str = "train"
    """Split, where the source has several."""
    max_samples: int | None = None
    """Take this many rows, chosen by the run's seed. None: all."""
    max_image_pixels: int = 50_000_000
    """Largest image accepted, in pixels: model input is untrusted."""


@dataclass(frozen=True, kw_only=True)
class EvalSettings:
    """Evaluation: single decode, no reflection (Sec. 8.3)."""

    __pydantic_config__ = STRICT

    data: DataSettings = field(default_factory=lambda: DataSettings(split="test"))
    """Held-out rows."""
    greedy: bool = True
    """Report greedy decoding too, beside the training temperature."""
    batch_size: int = 256
    """Sequences generated at once on one rank."""
