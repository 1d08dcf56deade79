"""A trained model on the Hugging Face Hub: `final/` with a model card written from the run."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from care_train import hub
from care_train.config import FROM_PYTHON, SHIPPED_DATA, Config, config_to_yaml, hub_data, source_of
from care_train.distributed import is_main
from care_train.reporting.files import write_file
from care_train.reporting.report import SCORES
from care_train.reporting.text import fenced, markdown_table, markdown_text

_KEY = "hub.push_to"
_SCORES = ("accuracy", "greedy", "format", "greedy_format")
"""Of `report.SCORES`, those of the card."""

_NOT_SHOWN = ("output_dir", "resume", "allow_changes", "overwrite", "hub", "limits", "logging")
"""Settings that change nothing of what was trained."""
_FOLDERS = re.compile(r"(?<![^\s=,{\[\"'])(?:~|/[^\s/,}\]\"']+)/(?:[^\s/,}\]\"']+/)*")
"""The folders of an absolute path, at the start of a value."""


def publish(run_dir: Path, config: Config, summary: Mapping[str, Any]) -> str:
    """Write the model card into `final/` and upload the folder; the commit's address.

    Args:
        run_dir: the run's folder.
        config: its settings; `hub.push_to` names the repository.
        summary: what summary.json holds.

    Raises:
        ValueError: it could not be uploaded; `final/` is whole.
    """
    repo = config.hub.push_to
    assert repo is not None
    final = run_dir / "final"
    write_file(final / "README.md", model_card(config, summary))
    try:
        return hub.upload(final, repo, f"{config.name}, {summary['steps']} steps", _KEY)
    except ValueError as error:
        raise ValueError(f"{error}; {final} is whole: `hf upload {repo} {final}`") from None


def claim(config: Config) -> None:
    """Make the repository that a run will upload to, where it names one.

    Raises:
        ValueError: no token, or none that may write there.
    """
    if config.hub.push_to is not None and is_main():
        hub.create_repository(config.hub.push_to, key=_KEY)


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
    data = config.data.path
    shown = f"`{markdown_text(data)}`"
    if data.startswith(FROM_PYTHON):
        shown = "rows of a Python program"
    elif (path := source_of(data).path) not in SHIPPED_DATA and hub_data(path) is None:
        shown = "a local file" if Path(path).is_file() else "a local folder"
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
        for name in _SCORES
        if f"{name}_before" in summary
    ]
    if not rows:
        return ""
    table = markdown_table(("", "before", "after"), rows)
    return f"## Results\n\n{table}\n\nOn {summary['num_questions']} held-out questions."
