"""Settings of `care-train data build`: sources, what a usable row is, what a duplicate is."""

from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from care_train.config.base import Role, check, section

Adapter = Literal["rows", "chartqa", "geometry3k", "virl39k", "vision_r1_cold"]

HASH_SIZE = 16
"""Side of the perceptual hash: its 256 bits tell diagrams apart that 64 do not."""


@section
class SourceSettings:
    """One data set that goes into the build."""

    name: str
    """What the rows' `source` column calls it."""
    path: str | list[str]
    """A file (.parquet, .jsonl, .json), a folder of such files or of Dataset.save_to_disk, or a
    Hugging Face id, which is downloaded; or a list of files."""
    adapter: Adapter = "rows"
    """The published schema the rows must have: chartqa, geometry3k, virl39k, vision_r1_cold;
    `rows` for any other file: plain columns, or EasyR1's, verl's or TRL's."""
    split: str = "train"
    """Split, where the source has several."""
    revision: str | None = None
    """The Hugging Face revision to download. None: the newest."""
    image_dir: list[str] = field(default_factory=list)
    """Folders or .zip files that relative image paths start from, tried in order. Empty: the data
    file's folder, then the .zip files in it."""
    where: dict[str, Any] = field(default_factory=dict)
    """Take only rows whose columns have these values; how many were left out is counted."""
    expected_rows: int | None = None
    """How many usable rows there should be before duplicates go; another number is reported."""


@section
class CleanSettings:
    """What a usable row is; the others are quarantined with the reason."""

    max_prompt_chars: PositiveInt = 8192
    """Longest prompt."""
    max_answer_chars: PositiveInt = 256
    """Longest answer: keys that a verifier compares are short."""
    max_images: NonNegativeInt = 16
    """Most images of a row."""
    max_image_pixels: PositiveInt = 50_000_000
    """Largest image in pixels, checked before any pixel is decoded."""
    max_image_bytes: PositiveInt = 32_000_000
    """Largest encoded image."""
    max_aspect_ratio: Annotated[float, Field(ge=1)] = 200.0
    """Longest side over shortest: Qwen's image processors refuse more."""
    require_rationale: bool = False
    """Reject rows without a rationale, which a cold start cannot learn from."""


@section
class DedupSettings:
    """What a duplicate is: the same normalised prompt, and images that look the same."""

    enabled: bool = True
    """Reject duplicates; the source named first keeps its row."""
    max_distance: Annotated[int, Field(ge=0, lt=HASH_SIZE)] = 8
    """Bits in which the perceptual hashes of one image may differ, of 256: 6 is what encoding it
    anew as JPEG and scaling it changes. 0: none."""


@section
class BuildSettings:
    """A data set to build."""

    output: Annotated[str, Role.FREE]
    """The folder to write: train.parquet, manifest.json, quarantine.jsonl."""
    sources: Annotated[list[SourceSettings], Field(min_length=1)]
    """In the order of the rows; of duplicates the first is kept."""
    clean: CleanSettings = field(default_factory=CleanSettings)
    dedup: DedupSettings = field(default_factory=DedupSettings)
    workers: Annotated[PositiveInt | None, Role.FREE] = None
    """Processes that decode and hash. None: one per core that this process may use."""
    overwrite: Annotated[bool, Role.FREE] = False
    """Build anew where the folder holds another build."""

    def __post_init__(self) -> None:
        names = [source.name for source in self.sources]
        check(len(set(names)) == len(names), "sources", names, "different names")
