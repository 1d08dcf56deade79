"""Write the trained policy as a plain Hugging Face folder."""

from pathlib import Path

from care_train.training.distributed import is_main
from care_train.training.engine import PolicyEngine
from care_train.training.folders import write_folder


def save_model(engine: PolicyEngine, folder: Path) -> None:
    """The policy as a plain Hugging Face folder, from any ZeRO stage.

    Raises:
        SaveError: it could not be written.
    """

    def write(partial: Path) -> None:
        if is_main():
            engine.loaded.save(partial)

    with engine.gathered():
        write_folder(folder, write)
