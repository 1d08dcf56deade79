"""Algorithm 1 as a trainer: DeepSpeed optimisation, rollouts, verifier, evaluation, reports.

    CareTrainer    trains on rows and reward functions of a Python program
    CareConfig     the settings of a run

Both are imported when first asked for: `import care_train` loads neither torch nor deepspeed.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from care_train.trainer import CareConfig, CareTrainer

__version__ = "0.1.0"
__all__ = ["CareConfig", "CareTrainer", "__version__"]


def __getattr__(name: str) -> Any:
    if name in ("CareConfig", "CareTrainer"):
        from care_train import trainer

        return getattr(trainer, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
