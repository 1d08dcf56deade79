"""`care-train replay`: another algorithm or ablation over a run's archive, without a model."""

from care_train.replay.compare import Replay, replay

__all__ = ["Replay", "replay"]
