"""Read a data set into samples."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from care_train.data.easy_vqa import easy_vqa_samples
from care_train.data.order import permutation
from care_train.data.schema import Sample, sample_from_row
from care_train.settings import DataSettings

if TYPE_CHECKING:
    import pyarrow
