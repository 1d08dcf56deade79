"""The six benchmarks of Table 1, by their names in `eval.benchmarks`."""

from care_train.evaluation.benchmarks.math_vision import MATH_VISION
from care_train.evaluation.benchmarks.mathverse import MATHVERSE
from care_train.evaluation.benchmarks.mathvista import MATHVISTA
from care_train.evaluation.benchmarks.mmmu import MMMU, MMMU_PRO_STANDARD, MMMU_PRO_VISION

BENCHMARKS = {
    benchmark.name: benchmark
    for benchmark in (
        MATHVISTA,
        MATHVERSE,
        MATH_VISION,
        MMMU,
        MMMU_PRO_STANDARD,
        MMMU_PRO_VISION,
    )
}
"""In the order of Table 1."""

__all__ = ["BENCHMARKS"]
