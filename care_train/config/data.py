"""Settings of the rows: where they come from, the held-out ones, and `care-train data build`."""

import re
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args

from pydantic import Field, NonNegativeInt, PositiveInt

from care_train.config.base import Role, check, section

BenchmarkName = Literal[
    "mathvista",
    "mathverse",
    "math_vision",
    "mmmu",
    "mmmu_pro_standard",
    "mmmu_pro_vision",
    "data",
]


LEVELS = {"digits": range(2, 7), "charts": range(2, 7), "geometry": range(2, 7)}
"""Levels of difficulty of data sets that have them: digits, bars or rectangles of an image."""

SHIPPED_DATA = (
    *("easy_vqa", *LEVELS),
    *(f"{name}-{level}" for name, levels in LEVELS.items() for level in levels),
)
"""Data sets that come with the installation: their names take a path's place."""


_HUB_ID = re.compile(r"([\w-][\w.-]*/[\w.-]+)(?::([\w.-]+))?")
_SOURCE = re.compile(r"(.*?)(?:@([\w-]+))?(?:#([\w./-]+))?")
_ROW_FILE = re.compile(r"\.(parquet|jsonl|ndjson|json|csv|txt|gz|zip)$", re.IGNORECASE)


class Source(NamedTuple):
    """`PATH[@SPLIT][#REVISION]` in its parts."""

    path: str
    split: str | None
    revision: str | None


def source_of(path: str) -> Source:
    """The parts of a `data.path`; what is on this disk under the whole name has no others."""
    found = _SOURCE.fullmatch(path)
    if found is None or Path(path).expanduser().exists():
        return Source(path, None, None)
    return Source(found[1], found[2], found[3])


def hub_data(path: str) -> tuple[str, str | None] | None:
    """Repository and configuration of `ORG/NAME[:CONFIG]`; None: `path` is no such id.

    A file's name that is not there is a mistake, not an id.
    """
    found = _HUB_ID.fullmatch(path)
    if found is None or _ROW_FILE.search(path) or Path(path).exists():
        return None
    return found[1], found[2]


@section
class DataSettings:
    """Where rows come from."""

    path: str = "easy_vqa"
    """`easy_vqa` (the published package); `digits`, or `digits-2` to `digits-6` (strips of so many
    handwritten digits; `digits` has 4); `charts`, or `charts-2` to `charts-6` (charts of so many
    bars; `charts` has 3); `geometry`, or `geometry-2` to `geometry-6` (so many rectangles;
    `geometry` has 3); a Parquet, JSON lines or JSON file; a folder of them,
    such as a downloaded repository; a folder saved by the datasets library; or a data set of the
    Hugging Face Hub, `ORG/NAME[:CONFIG]`. What is on this disk comes first. `@SPLIT` behind it
    names a split, `#REVISION` the Hub's branch, tag or commit. Without a split training rows are
    those of `train`, held-out ones those of `test`, else `validation`, never `train`."""
    max_samples: PositiveInt | None = None
    """Take this many rows, chosen by the run's seed. None: all."""


@section
class EvalSettings:
    """Evaluation: single decode, no reflection (Sec. 8.3)."""

    data: str | None = None
    """Held-out rows, as data.path; `@SPLIT` alone is another split of data.path. None: the test
    split of training rows that come with the installation (`easy_vqa`, `digits`, `charts`,
    `geometry`); of other rows none, and a run is not evaluated."""
    max_samples: PositiveInt | None = None
    """Take this many held-out rows, and questions of each benchmark, chosen by the run's seed.
    None: all."""
    also: list[Literal["greedy", "blind"]] = field(default_factory=lambda: ["greedy"])
    """What is reported of eval.data beside the training temperature: `greedy` decoding; `blind`:
    accuracy with a blank image in the place of each, which is what can be answered without
    looking."""
    benchmarks: list[BenchmarkName] = field(default_factory=list)
    """What `care-train eval` scores (also `--benchmarks a,b`): benchmarks of Table 1, and `data`
    for the rows of eval.data. Empty: eval.data alone, at the training temperature and greedily."""
    sources: dict[str, str] = field(default_factory=dict)
    """Where a benchmark's rows are, by its name: a downloaded folder, a .parquet, .jsonl or .json
    file, or the id of a data set on the Hub. A benchmark not named: its published id."""
    decode: Literal["sampled", "greedy"] = "sampled"
    """How benchmarks are decoded: as rollouts are (Sec. 8.2), or greedily."""
    seeds: Annotated[list[int], Field(min_length=1)] = field(default_factory=lambda: [0])
    """One pass over the benchmarks per seed; from two on there is a 95 % interval over them."""
    samples: PositiveInt = 1
    """Responses to each question under each seed. Accuracy is their mean; of more than one, pass@k
    (unbiased) and majority@k are reported too, for every power of two and for all of them."""

    def __post_init__(self) -> None:
        once = len(set(self.seeds)) == len(self.seeds)
        check(once, "eval.seeds", self.seeds, "each seed once")
        same = self.decode == "greedy" and (len(self.seeds) > 1 or self.samples > 1)
        wanted = "'sampled' with several eval.seeds or eval.samples: greedy responses are equal"
        check(not same, "eval.decode", self.decode, wanted)
        names = [name for name in get_args(BenchmarkName) if name != "data"]
        unknown = [name for name in self.sources if name not in names]
        check(not unknown, "eval.sources", unknown[:1], f"one of {', '.join(names)}")


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
