"""What LMMs-Eval's entry point `lmms_eval.models` loads."""

from typing import Any


def manifest() -> Any:
    """The registration of `--model care_train`."""
    from lmms_eval.models.registry_v2 import (  # pyright: ignore[reportMissingImports]
        ModelManifest,
    )

    return ModelManifest(
        model_id="care_train",
        simple_class_path="care_train.evaluation.lmms_eval_model.CareTrainModel",
    )
