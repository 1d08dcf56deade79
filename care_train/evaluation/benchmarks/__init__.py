"""The six benchmarks of Table 1, by their names in `eval.benchmarks`.

Schemas: the data sets' cards on the Hugging Face Hub (Lu et al., 2024; Zhang et al., 2024; Wang et
al., 2024; Yue et al., 2024 and 2025), read in November 2026.
"""

from care_train.data.columns import (
    ENCODED_TEXTS,
    FILLED_TEXT,
    IMAGE,
    NUMBER_OR_NULL,
    TEXT,
    TEXTS,
    Kind,
    optional,
)
from care_train.evaluation.benchmarks.math import (
    choose_math_vision,
    choose_mathvista,
    match_math_vision,
    match_mathverse,
    match_mathvista,
    math_vision_question,
    mathverse_question,
    mathvista_question,
)
from care_train.evaluation.benchmarks.mmmu import (
    match_mmmu,
    mmmu_pro_vision_question,
    mmmu_question,
)
from care_train.evaluation.question import Benchmark


def _filled(*names: str) -> dict[str, Kind]:
    return dict.fromkeys(names, FILLED_TEXT)


_MMMU_COLUMNS = {
    **_filled("id", "question", "answer"),
    "options": ENCODED_TEXTS,
    **{f"image_{number}": optional(IMAGE) for number in range(1, 8)},
}

_ALL = (
    Benchmark(
        name="mathvista",
        title="MathVista mini",
        dataset="AI4Math/MathVista",
        split="testmini",
        columns={
            **_filled("pid", "query", "answer", "question_type", "answer_type"),
            "decoded_image": IMAGE,
            "choices": optional(TEXTS),
            "precision": NUMBER_OR_NULL,
        },
        to_question=mathvista_question,
        matches=match_mathvista,
        choose=choose_mathvista,
    ),
    Benchmark(
        name="mathverse",
        title="MathVerse mini",
        dataset="AI4Math/MathVerse",
        split="testmini",
        subsets=("testmini",),
        columns={
            **_filled("sample_index", "problem_version", "query_cot", "answer", "question_type"),
            "image": IMAGE,
            "question_for_eval": TEXT,
        },
        to_question=mathverse_question,
        matches=match_mathverse,
    ),
    Benchmark(
        name="math_vision",
        title="MATH-Vision full",
        dataset="MathLLMs/MathVision",
        split="test",
        columns={
            **_filled("id", "question", "answer", "subject"),
            "options": TEXTS,
            "decoded_image": IMAGE,
        },
        to_question=math_vision_question,
        matches=match_math_vision,
        choose=choose_math_vision,
    ),
    Benchmark(
        name="mmmu",
        title="MMMU val",
        dataset="MMMU/MMMU",
        split="validation",
        columns=_MMMU_COLUMNS | {"question_type": FILLED_TEXT},
        to_question=mmmu_question,
        matches=match_mmmu,
    ),
    Benchmark(
        name="mmmu_pro_standard",
        title="MMMU-Pro standard",
        dataset="MMMU/MMMU_Pro",
        split="test",
        subsets=("standard (10 options)",),
        columns=_MMMU_COLUMNS | {"subject": FILLED_TEXT},
        to_question=mmmu_question,
        matches=match_mmmu,
    ),
    Benchmark(
        name="mmmu_pro_vision",
        title="MMMU-Pro vision",
        dataset="MMMU/MMMU_Pro",
        split="test",
        subsets=("vision",),
        columns=_filled("id", "answer", "subject") | {"image": IMAGE, "options": ENCODED_TEXTS},
        to_question=mmmu_pro_vision_question,
        matches=match_mmmu,
    ),
)

BENCHMARKS = {benchmark.name: benchmark for benchmark in _ALL}
"""In the order of Table 1."""
