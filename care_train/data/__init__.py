"""From files to samples: one reader of rows, images decoded on demand, a resumable order."""

from care_train.data.columns import RowError, join_errors
from care_train.data.dataset import (
    PromptOrder,
    load_samples,
    permutation,
    require_rationales,
    sample_digests,
    samples_at,
)
from care_train.data.files import Rows
from care_train.data.images import ImageRef, image_sizes, load_image, load_images
from care_train.data.schema import Sample, sample_digest, sample_from_row

__all__ = [
    "ImageRef",
    "PromptOrder",
    "RowError",
    "Rows",
    "Sample",
    "image_sizes",
    "join_errors",
    "load_image",
    "load_images",
    "load_samples",
    "permutation",
    "require_rationales",
    "sample_digest",
    "sample_digests",
    "sample_from_row",
    "samples_at",
]
