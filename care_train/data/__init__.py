"""From files to samples: one schema, images decoded on demand, a resumable order."""

from care_train.data.easy_vqa import Figure, derive_figures
from care_train.data.image_refs import ImageRef
from care_train.data.images import image_sizes, load_image, load_images
from care_train.data.lazy import sample_digests, samples_at
from care_train.data.order import PromptOrder
from care_train.data.row_error import RowError, join_errors
from care_train.data.schema import Sample, sample_digest, sample_from_row
from care_train.data.sources import load_samples, require_rationales

__all__ = [
    "Figure",
    "ImageRef",
    "PromptOrder",
    "RowError",
    "Sample",
    "derive_figures",
    "image_sizes",
    "join_errors",
    "load_image",
    "load_images",
    "load_samples",
    "require_rationales",
    "sample_digest",
    "sample_digests",
    "sample_from_row",
    "samples_at",
]
