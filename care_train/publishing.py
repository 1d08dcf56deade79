"""What a run leaves: summary.json, plots and report.md; its model as a folder, or on the Hub."""

import platform
import re
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml

import care_train
from care_train import hub
from care_train.config import SHIPPED_DATA, Config, config_to_yaml, hub_data, source_of
from care_train.distributed import is_main
from care_train.models.load import load_skeleton
from care_train.models.lora import save_adapter
from care_train.reporting import (
    ARCHIVE,
    SIGNATURE_COLUMNS,
    k_signature,
    read_archive,
    read_metrics,
    write_report,
    write_summary,
)
from care_train.reporting.files import write_file
from care_train.reporting.report import SCORES
from care_train.reporting.text import fenced, markdown_table, markdown_text
from care_train.training.checkpoint import SKELETON, Checkpoints
from care_train.training.engine import read_weights
from care_train.training.folders import write_folder
from care_train.training.resume import saved_lora
from care_train.training.run_folder import writing_within_runs
from care_train.training.session import Given
from care_train.training.weights import whole_weights

Summary = dict[str, Any]


def before_and_after(before: Mapping[str, float], after: Mapping[str, float]) -> Summary:
    """The scores of two evaluations side by side."""
    summary: Summary = {"num_questions": int(before["num_questions"])}
    for short in SCORES:
        key = {"greedy": "greedy_accuracy", "blind": "blind_accuracy"}.get(short, short)
        if key in before:
            summary |= {f"{short}_before": before[key], f"{short}_after": after[key]}
    return summary


def run_facts(config: Config, given: Given) -> Summary:
    """What ran: name, method, seed, model, versions, and the command where there was one."""
    # A notebook's is no command that anybody could repeat.
    command = {"command": shlex.join(["care-train", *sys.argv[1:]])}
    return ({} if given.in_program else command) | {
        "name": config.name,
        "algorithm": config.algorithm,
        "preset": config.preset,
        "seed": config.seed,
        "model": config.model.path,
        "versions": {
            "care-rl": care_train.__version__,
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers", "deepspeed", "triton")},
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        },
    }


def finish(run_dir: Path, config: Config, summary: Summary, start: float) -> Summary:
    """Write summary, plots and report; the wall time is the whole command's."""
    summary = summary | {"wall_seconds": round(time.perf_counter() - start, 1)}
    if is_main():
        path = run_dir / "metrics.jsonl"
        metrics = read_metrics(path) if path.is_file() else []
        draw_plots(run_dir, config.algorithm, metrics)
        write_summary(run_dir, summary)
        write_report(run_dir, summary, metrics)
        if config.hub.push_to and (run_dir / "final").is_dir():
            print(publish(run_dir, config, summary), file=sys.stderr)
    return summary


def draw_plots(run_dir: Path, algorithm: str, metrics: Sequence[Mapping[str, Any]]) -> None:
    """learning_curves.png of what was logged; of an archived CARE run signature.png too."""
    # Matplotlib takes half a second to load, which a run's start need not wait for.
    from care_train.reporting.plots import plot_learning_curves, plot_signature

    if metrics:
        plot_learning_curves(metrics, run_dir / "learning_curves.png")
    if algorithm == "care" and (run_dir / ARCHIVE).is_dir():
        signature = k_signature(read_archive(run_dir, columns=SIGNATURE_COLUMNS))
        if signature is not None:
            plot_signature(signature, run_dir / "signature.png")


_KEY = "hub.push_to"
_NOT_SHOWN = ("output_dir", "resume", "allow_changes", "overwrite", "hub", "limits", "logging")
"""Settings that change nothing of what was trained."""
_FOLDERS = re.compile(r"(?<![^\s=,{\[\"'])(?:~|/[^\s/,}\]\"']+)/(?:[^\s/,}\]\"']+/)*")
"""The folders of an absolute path, at the start of a value."""


def publish(run_dir: Path, config: Config, summary: Mapping[str, Any]) -> str:
    """Write the model card into `final/` and upload the folder; the commit's address.

    `summary` is what summary.json holds.

    Raises:
        ValueError: it could not be uploaded; `final/` is whole.
    """
    from huggingface_hub import HfApi

    repo = config.hub.push_to
    assert repo is not None
    final = run_dir / "final"
    write_file(final / "README.md", model_card(config, summary))
    try:
        with hub.explained(repo, _KEY):
            message = f"{config.name}, {summary['steps']} steps"
            done = HfApi().upload_folder(repo_id=repo, folder_path=final, commit_message=message)
    except ValueError as error:
        raise ValueError(f"{error}; {final} is whole: `hf upload {repo} {final}`") from None
    return done.commit_url


def claim(config: Config, *, private: bool = True) -> None:
    """Make the repository that a run will upload to, where it names one and may write there."""
    repo = config.hub.push_to
    if repo is not None and is_main():
        from huggingface_hub import HfApi

        with hub.explained(repo, _KEY):
            HfApi().create_repo(repo, private=private, exist_ok=True)


def model_card(config: Config, summary: Mapping[str, Any]) -> str:
    """The card: metadata that the Hub reads, results, how it was trained, versions."""
    from huggingface_hub import ModelCardData

    repo = config.hub.push_to or config.name
    base = None if Path(config.model.path).exists() else hub.repository_of(config.model.path)
    data = hub_data(source_of(config.data.path).path)
    metadata = ModelCardData(
        library_name="transformers",
        base_model=base,
        datasets=None if data is None else [data[0]],
        tags=["care", config.algorithm, "reinforcement-learning", "vision-language"],
    )
    parts = [
        f"---\n{metadata.to_yaml()}\n---",
        f"# {markdown_text(repo.rpartition('/')[2])}",
        _origin(config, summary),
        _results(summary),
        "## Training",
    ]
    if "command" in summary:
        parts.append(fenced(without_folders(str(summary["command"])), "sh"))
    parts.append(fenced(shown_settings(config), "yaml"))
    parts.append(f"Versions: {', '.join(map(' '.join, summary.get('versions', {}).items()))}.")
    return "\n\n".join(filter(None, parts)) + "\n"


def shown_settings(config: Config) -> str:
    """As YAML, what decides what was learnt, with the names alone of files and folders."""
    values = yaml.safe_load(config_to_yaml(config))
    kept = {name: value for name, value in values.items() if name not in _NOT_SHOWN}
    return without_folders(yaml.safe_dump(kept, sort_keys=False, width=10**6).rstrip())


def without_folders(text: str) -> str:
    """Each absolute path's last part in its place: where a file lay is no reader's business."""
    return _FOLDERS.sub("", text)


def _origin(config: Config, summary: Mapping[str, Any]) -> str:
    data = source_of(config.data.path).path
    is_named = data in SHIPPED_DATA or hub_data(data) is not None
    shown = f"`{markdown_text(config.data.path)}`" if is_named else "local rows"
    base = config.model.path
    is_local = Path(base).exists() or Path(base).is_absolute()
    base = "a local model" if is_local else f"`{markdown_text(base)}`"
    return (
        f"Trained from {base} on {shown} with {config.algorithm.upper()} for {summary['steps']} "
        "steps, by care-train (*CARE What Fails: Contrastive Anchored-Reflection for Verifiable "
        "Multimodal Reasoning*)."
    )


def _results(summary: Mapping[str, Any]) -> str:
    rows = [
        (SCORES[name], f"{summary[f'{name}_before']:.1%}", f"{summary[f'{name}_after']:.1%}")
        for name in SCORES
        if f"{name}_before" in summary
    ]
    if not rows:
        return ""
    table = markdown_table(("", "before", "after"), rows)
    return f"## Results\n\n{table}\n\nOn {summary['num_questions']} held-out questions."


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
        raise ValueError(f"--adapter: {run_dir} trained all weights (model.lora.rank=0)")
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
