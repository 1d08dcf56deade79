"""What a run tells: metrics, progress, plots, the report."""

from care_train.reporting.metrics import MetricsLogger, read_metrics
from care_train.reporting.progress import TrainProgress, show_sample, track
from care_train.reporting.samples import SampleRecord, append_sample, read_samples

__all__ = [
    "MetricsLogger",
    "SampleRecord",
    "TrainProgress",
    "append_sample",
    "read_metrics",
    "read_samples",
    "show_sample",
    "track",
]
