"""care-train: the command line."""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from care_train.arguments import INSPECTIONS, parse_arguments
from care_train.config import configs_folder, load_build_settings, load_config, names_run
from care_train.rollout.errors import RolloutError
from care_train.settings import Config
from care_train.training.failures import RunError, is_disk_full, status_of


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; user errors print one line and exit with 2."""
    options = parse_arguments(arguments)
    try:
        if options.command == "export":
            _export(options)
        elif options.command == "data":
            return _build_data(options)
        else:
            config = load_config(_config_path(options), options.overrides)
            if options.command in INSPECTIONS:
                return _inspect(options, config)
            if options.command == "serve":
                return _serve(options, config)
            if options.command == "verify":
                return _verify(config)
            return _run(options.command, config)
    except (RunError, RolloutError, ValueError, OSError) as error:
        if isinstance(error, OSError) and not is_disk_full(error):
            raise
        print(f"care-train {options.command}: error: {error}", file=sys.stderr)
        return status_of(error)
    return 0


def _run(command: str, config: Config) -> int:
    quiet_libraries()
    # Imported here: --help and configuration errors need no torch.
    from care_train import commands
    from care_train.training.distributed import barrier, is_main
    from care_train.training.guard import guarded
    from care_train.training.stopping import STOPPED_STATUS, Stopped

    run = {
        "quickstart": commands.quickstart,
        "sft": commands.sft,
        "train": commands.train,
        "eval": commands.evaluate,
    }[command]
    try:
        with guarded(config.limits, commands.run_dir_of(config)):
            summary = run(config)
    except Stopped as stopped:
        if is_main():
            print(f"{stopped}; go on with the same command and --resume, or with", file=sys.stderr)
            print(f"  care-train {command} resume={stopped.run_dir}", file=sys.stderr)
        # Launchers kill the other ranks when the first one leaves: not before it is said.
        barrier()
        return STOPPED_STATUS
    if is_main():
        _show_summary(commands.run_dir_of(config), summary)
    return 0


def _inspect(options: argparse.Namespace, config: Config) -> int:
    quiet_libraries()
    if options.command == "doctor":
        from care_train.doctor.run import doctor

        return doctor(config, options.gpus, as_json=options.json)
    from care_train.planning.command import plan

    plan(config, options)
    return 0


def _serve(options: argparse.Namespace, config: Config) -> int:
    quiet_libraries()
    from care_train.serve import serve

    return 0 if serve(config, options.host, options.port) else 1


def _verify(config: Config) -> int:
    # Without quiet_libraries, which loads torch: this command starts at once.
    from care_train.verifier import command

    command.run(config)
    return 0


def _export(options: argparse.Namespace) -> None:
    quiet_libraries()
    from care_train import commands

    commands.export(options.run, options.checkpoint, options.out, adapter=options.adapter)


def _build_data(options: argparse.Namespace) -> int:
    # No torch: the workers of a build start fast.
    from care_train.data_command import build_data

    try:
        build_data(load_build_settings(options.config, options.overrides))
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


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
    elif "benchmarks" in summary:
        table = Table("benchmark", "accuracy")
        for name, accuracy in summary["benchmarks"].items():
            table.add_row(name, f"{accuracy:.1%}")
        if "macro_accuracy" in summary:
            table.add_row("macro average", f"{summary['macro_accuracy']:.1%}")
        console.print(table)
    elif "accuracy" in summary:
        console.print(f"accuracy {summary['accuracy']:.1%}, format {summary['format']:.1%}")
    names = ("results.md", "results.json", "report.md", "summary.json", "metrics.jsonl", "final")
    written = ", ".join(name for name in names if (run_dir / name).exists())
    console.print(f"[bold]{run_dir}[/bold]: {written}")


def _config_path(options: argparse.Namespace) -> Path | None:
    has_own = options.config is None and not names_run(options.overrides)
    if has_own and options.command == "quickstart":
        return configs_folder() / "quickstart.yaml"
    return options.config


def quiet_libraries() -> None:
    """Progress and errors are ours to show; these must be set before the libraries load."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Else torch reports with stacks that a rank is gone, which the guard says better.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
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


if __name__ == "__main__":
    sys.exit(main())
