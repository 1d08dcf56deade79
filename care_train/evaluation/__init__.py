"""Evaluation during training, the six benchmarks of Table 1, and the door for LMMs-Eval."""

from typing import Any


def lmms_eval_manifest() -> Any:
    """What LMMs-Eval's entry point `lmms_eval.models` loads: the registration of our model.

    LMMs-Eval loads it whatever model is asked for: it must import nothing heavy.
    """
    from lmms_eval.models.registry_v2 import (  # pyright: ignore[reportMissingImports]
        ModelManifest,
    )

    return ModelManifest(
        model_id="care_train",
        simple_class_path="care_train.evaluation.lmms_eval.CareTrainModel",
    )
