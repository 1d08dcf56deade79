"""Settings of the rows: where they come from, and the held-out ones."""

import re
from dataclasses import field
from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import Field, PositiveInt

from care_train.config.base import check, section

BenchmarkName = Literal[
    "mathvista",
    "mathverse",
    "math_vision",
    "mmmu",
    "mmmu_pro_standard",
    "mmmu_pro_vision",
    "data",
]


LEVELS = {"digits": range(2, 7), "charts": range(2, 7)}
"""Levels of difficulty of data sets that have them: digits of a strip, bars of a chart."""

SHIPPED_DATA = (
    *("easy_vqa", *LEVELS),
    *(f"{name}-{level}" for name, levels in LEVELS.items() for level in levels),
)
"""Data sets that come with the installation: their names take a path's place."""


_HUB_ID = re.compile(r"([\w-][\w.-]*/[\w.-]+)(?::([\w.-]+))?(?:@([\w.-]+))?")
_ROW_FILE = re.compile(r"\.(parquet|jsonl|ndjson|json|csv|txt|gz|zip)$", re.IGNORECASE)


def hub_data(path: str) -> tuple[str, str | None, str | None] | None:
    """Repository, configuration and split of a data set of the Hub; None: `path` is no such id.

    A file's name that is not there is a mistake, not an id.
    """
    found = _HUB_ID.fullmatch(path)
    if found is None or _ROW_FILE.search(path) or Path(path).exists():
        return None
    return found[1], found[2], found[3]


def without_split(path: str) -> str:
    """`path` without the split of an id."""
    found = hub_data(path)
    return path if found is None else path.removesuffix(f"@{found[2]}")


@section
class DataSettings:
    """Where rows come from."""

    path: str = "easy_vqa"
    """`easy_vqa` (the published package); `digits`, or `digits-2` to `digits-6` (strips of so many
    handwritten digits; `digits` has 4); `charts`, or `charts-2` to `charts-6` (charts of so many
    bars; `charts` has 3); a Parquet, JSON lines or JSON file; a folder of them,
    such as a downloaded repository; a folder saved by the datasets library; or a data set of the
    Hugging Face Hub, `ORG/NAME[:CONFIG][@SPLIT]`. What is on this disk comes first."""
    split: str | None = None
    """Split, where the source has several. None: `train` for training rows; for held-out ones
    (sft.eval_data) `test`, else `validation`, never `train`."""
    revision: str | None = None
    """Branch, tag or commit of a data set of the Hub. None: the newest."""
    max_samples: PositiveInt | None = None
    """Take this many rows, chosen by the run's seed. None: all."""


@section
class HeldOutSettings:
    """Where held-out rows come from."""

    path: str | None = None
    """As data.path. None: that of data.path."""
    split: str | None = None
    """Split, where the source has several. None: `test`, else `validation`; never `train`."""
    revision: str | None = None
    """As data.revision, which counts where there is no path here."""
    max_samples: PositiveInt | None = None
    """Take this many rows, chosen by the run's seed. None: all."""


@section
class EvalSettings:
    """Evaluation: single decode, no reflection (Sec. 8.3)."""

    data: HeldOutSettings | None = None
    """Held-out rows. None: the test split of training rows that come with the installation
    (`easy_vqa`, `digits`, `charts`); of other rows none, and a run is not evaluated."""
    greedy: bool = True
    """Report greedy decoding too, beside the training temperature."""
    blind: bool = False
    """Report accuracy with a blank image in the place of each too, at the training temperature:
    what can be answered without looking."""
    benchmarks: list[BenchmarkName] = field(default_factory=list)
    """What `care-train eval` scores (also `--benchmarks a,b`): benchmarks of Table 1, and `data`
    for the rows of eval.data. Empty: eval.data alone, at the training temperature and greedily."""
    sources: dict[str, str] = field(default_factory=dict)
    """Where a benchmark's rows are, by its name: a downloaded folder, a .parquet, .jsonl or .json
    file, or the id of a data set on the Hub. A benchmark not named: its published id."""
    max_questions: PositiveInt | None = None
    """Take this many questions of each benchmark, chosen by the run's seed. None: all."""
    decode: Literal["sampled", "greedy"] = "sampled"
    """How benchmarks are decoded: as rollouts are (Sec. 8.2), or greedily."""
    seeds: Annotated[list[int], Field(min_length=1)] = field(default_factory=lambda: [0])
    """One pass over the benchmarks per seed; from two on there is a 95 % interval over them."""
    samples: PositiveInt = 1
    """Responses to each question under each seed. Accuracy is their mean; more than one allow
    pass@k and majority@k."""
    k: list[int] = field(default_factory=list)
    """For which k pass@k (unbiased) and majority@k are reported; each at most eval.samples."""

    def __post_init__(self) -> None:
        check(
            len(set(self.seeds)) == len(self.seeds),
            "eval.seeds",
            self.seeds,
            "each seed once",
        )
        repeats = len(self.seeds) > 1 or self.samples > 1
        check(
            not (self.decode == "greedy" and repeats),
            "eval.decode",
            self.decode,
            "'sampled' with several eval.seeds or eval.samples: greedy responses are all the same",
        )
        check(
            all(1 <= k <= self.samples for k in self.k),
            "eval.k",
            self.k,
            f"numbers from 1 to eval.samples = {self.samples}",
        )
        names = get_args(BenchmarkName)
        unknown = [name for name in self.sources if name not in names]
        check(not unknown, "eval.sources", unknown[:1], f"one of {', '.join(names)}")
