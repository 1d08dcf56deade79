"""`care-train data build`: many sources to one checked, deduplicated Parquet file."""

from care_train.data.building.run import build

__all__ = ["build"]
