"""`care-train export`: from a checkpoint to a folder that transformers, vLLM and peft load."""

from pathlib import Path

from care_train.models.load import load_skeleton
from care_train.models.lora import save_adapter
from care_train.training.checkpoint import SKELETON, Checkpoints
from care_train.training.engine import read_weights
from care_train.training.folders import write_folder
from care_train.training.resume import saved_lora
from care_train.training.run_folder import writing_within_runs
from care_train.training.weights import whole_weights


def export(run_dir: Path, name: str, folder: Path, *, adapter: bool = False) -> None:
    """`care-train export`: a checkpoint's weights as a plain Hugging Face folder, LoRA merged.

    Args:
        run_dir: the run's folder.
        name: `step_…`, `best` or `last`.
        folder: where to; must not exist.
        adapter: write the LoRA adapter alone, as peft and vLLM read it.

    Raises:
        ValueError: no such checkpoint, a damaged one, or `folder` exists; `adapter` without LoRA.
        FolderInUseError: `folder` lies in that of a run which another process writes to.
    """
    if folder.exists():
        raise ValueError(f"--out: {folder} exists; choose another folder")
    checkpoint = Checkpoints(run_dir / "checkpoints").find(name)
    lora = saved_lora(checkpoint.state["settings"])
    if adapter and lora is None:
        raise ValueError(f"--adapter: {run_dir} trained all weights (model.lora=null)")
    loaded = load_skeleton(checkpoint.folder / SKELETON, read_weights(checkpoint.folder), lora)
    with writing_within_runs(folder):
        if adapter:
            base = _base_of(run_dir, checkpoint.state["settings"]["model.path"])
            write_folder(folder, lambda partial: save_adapter(loaded.model, partial, str(base)))
        else:
            write_folder(folder, lambda partial: loaded.save(partial, whole_weights(loaded.model)))
    print(f"{folder}: {checkpoint.folder}, {checkpoint.step} steps")


def _base_of(run_dir: Path, model_path: str) -> Path:
    """The model that the adapters of a run belong to."""
    for name in ("cold_start", "base"):
        if (run_dir / name).is_dir():
            return (run_dir / name).resolve()
    return Path(model_path)
