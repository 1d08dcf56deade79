"""What a run tells: metrics, progress, groups, plots, the report."""

from care_train.reporting.archive import ARCHIVE, image_path, open_archive, read_archive
from care_train.reporting.charts import mean_interval, proportion_interval
from care_train.reporting.metrics import MetricsLogger, read_metrics
from care_train.reporting.progress import TrainProgress, show_group, show_summary, track
from care_train.reporting.report import write_report, write_summary
from care_train.reporting.signature import SIGNATURE_COLUMNS, k_signature
from care_train.reporting.text import SampleRecord

__all__ = [
    "ARCHIVE",
    "SIGNATURE_COLUMNS",
    "MetricsLogger",
    "SampleRecord",
    "TrainProgress",
    "image_path",
    "k_signature",
    "mean_interval",
    "open_archive",
    "proportion_interval",
    "read_archive",
    "read_metrics",
    "show_group",
    "show_summary",
    "track",
    "write_report",
    "write_summary",
]
