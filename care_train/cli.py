"""care-train: the command line."""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from care_train.config import describe_keys, load_config
from care_train.settings import Config

_COMMANDS = {
    "quickstart": "teach a tiny vision-language model to read images: cold start, CARE, report",
    "sft": "cold start: supervised fine-tuning on rationale and answer",
    "train": "reinforcement learning with CARE or a baseline, evaluated before and after",
    "eval": "accuracy and format of a model: single decode, no reflection",
}

_EPILOG = """\
examples:
  care-train quickstart
  care-train quickstart algorithm=grpo seed=1 name=grpo-1
  care-train train --config configs/care.yaml model.path=/models/Qwen2.5-VL-3B-Instruct
  deepspeed --num_gpus 8 --module care_train train --config configs/care.yaml

Every run writes runs/<name>/: config.yaml, metrics.jsonl, summary.json, checkpoints/, final/ (a
plain Hugging Face folder), learning_curves.png and report.md.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; user errors print one line and exit with 2."""
    options = _parse(arguments)
    try:
        config = load_config(_config_path(options), options.overrides)
        _run(options.command, config)
    except (ValueError, FloatingPointError) as error:
        print(f"care-train {options.command}: error: {error}", file=sys.stderr)
        return 2
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Options and overrides in any order, which argparse alone does not take."""
    parser = _parser()
    options, more = parser.parse_known_args(arguments)
    if unknown := [argument for argument in more if argument.startswith("-")]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    options.overrides += more
    return options


def _run(command: str, config: Config) -> None:
    _quiet_libraries()
    # Imported here: --help and configuration errors need no torch.
    from care_train import commands
    from care_train.training.distributed import is_main

    run = {
        "quickstart": commands.quickstart,
        "sft": commands.sft,
        "train": commands.train,
        "eval": commands.evaluate,
    }[command]
    summary = run(config)
    if is_main():
        _show_summary(commands.run_dir_of(config), summary)


def _show_summary(run_dir: Path, summary: Mapping[str, Any]) -> None:
    """Scores before and after on standard output, and where everything is."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if "accuracy_before" in summary:
        table = Table("held-out questions", "before", "after", "change", title_justify="left")
        for name in ("accuracy", "format", "greedy", "greedy_format"):
            if f"{name}_before" in summary:
                before, after = summary[f"{name}_before"], summary[f"{name}_after"]
                change = f"{100 * (after - before):+.1f} points"
                table.add_row(name, f"{before:.1%}", f"{after:.1%}", change)
        console.print(table)
    elif "accuracy" in summary:
        console.print(f"accuracy {summary['accuracy']:.1%}, format {summary['format']:.1%}")
    names = ("report.md", "summary.json", "metrics.jsonl", "final")
    written = ", ".join(name for name in names if (run_dir / name).exists())
    console.print(f"[bold]{run_dir}[/bold]: {written}")


def _config_path(options: argparse.Namespace) -> Path | None:
    if options.config is None and options.command == "quickstart":
        package = Path(__file__).resolve().parent
        # Wheels carry configs/ inside the package; a checkout has it beside.
        roots = (package, package.parent)
        return next(r / "configs" / "quickstart.yaml" for r in roots if (r / "configs").is_dir())
    return options.config


def _quiet_libraries() -> None:
    """Progress and errors are ours to show; these must be set before the libraries load."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    import warnings

    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()
    # DeepSpeed still calls collectives that torch has renamed.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    if not torch.cuda.is_available():
        # DeepSpeed otherwise warns that it found no accelerator.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="care-train",
        description="Post-train vision-language models from verifiable rewards with CARE.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    # Launchers put it before the command; the rank comes from the environment.
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    keys = _keys_help()
    for name, summary in _COMMANDS.items():
        command = commands.add_parser(
            name,
            help=summary,
            description=summary[0].upper() + summary[1:] + ".",
            epilog=keys,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_argument("--config", type=Path, help="a YAML file; see configs/")
        command.add_argument(
            "overrides", nargs="*", metavar="key=value", help="settings laid over the file's"
        )
    return parser


def _keys_help() -> str:
    lines = ["settings (key = default: meaning):"]
    for key, default, description in describe_keys():
        meaning = " ".join(description.split())
        lines.append(f"  {key} = {default}\n      {meaning}".replace("%", "%%"))
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
