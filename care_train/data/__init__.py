"""From files to samples: one schema, images decoded on demand, a resumable order."""

from care_train.data.easy_vqa import Figure, derive_figures
from care_train.data.images import load_image, load_images
from care_train.data.order import PromptOrder
from care_train.data.schema import ImageRef, Sample, sample_from_row
from care_train.data.sources import load_samples, require_rationales

__all__ = [
    "Figure",
    "ImageRef",
    "PromptOrder",
    "Sample",
    "derive_figures",
    "load_image",
    "load_images",
    "load_samples",
    "require_rationales",
    "sample_from_row",
]
