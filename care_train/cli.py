"""care-train: the command line."""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from care_train.config import (
    Config,
    config_files,
    configs_folder,
    load_build_settings,
    load_config,
    names_run,
)
from care_train.config.arguments import INSPECTIONS, parse_arguments
from care_train.rollout.errors import RolloutError
from care_train.training.failures import STOPPED_STATUS, RunError, Stopped, is_disk_full, status_of


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; user errors print one line and exit with 2."""
    options = parse_arguments(arguments)
    try:
        if options.command == "export":
            _export(options)
        elif options.command == "data":
            return _build_data(options)
        elif options.command == "table":
            return _table(options)
        else:
            path = _config_path(options)
            config = load_config(path, options.overrides)
            if options.command in INSPECTIONS:
                return _inspect(options, config)
            if options.command == "serve":
                return _serve(options, config)
            if options.command == "verify":
                return _verify(config)
            files = config_files(path, options.overrides)
            return _run(options.command, config, files)
    except (RunError, RolloutError, ValueError, OSError) as error:
        if isinstance(error, OSError) and not is_disk_full(error):
            raise
        print(f"care-train {options.command}: error: {error}", file=sys.stderr)
        return status_of(error)
    return 0


def _run(command: str, config: Config, files: Mapping[str, Path]) -> int:
    quiet_libraries()
    # Imported here: --help and configuration errors need no torch.
    from care_train import commands
    from care_train.distributed import barrier, is_main
    from care_train.reporting import show_summary
    from care_train.training.guard import guarded
    from care_train.training.run_folder import open_run
    from care_train.training.run_place import run_dir_of

    run = {
        "quickstart": commands.quickstart,
        "sft": commands.sft,
        "train": commands.train,
        "eval": commands.evaluate,
    }[command]
    try:
        with guarded(config.limits, run_dir_of(config)), open_run(config, files) as folder:
            summary = run(config, folder)
    except Stopped as stopped:
        if is_main():
            print(f"{stopped}; go on with the same command and --resume, or with", file=sys.stderr)
            print(f"  care-train {command} resume={stopped.run_dir}", file=sys.stderr)
        # Launchers kill the other ranks when the first one leaves: not before it is said.
        barrier()
        return STOPPED_STATUS
    if is_main():
        show_summary(run_dir_of(config), summary)
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

    return 0 if serve(config, options.host, options.port, options.allowed_host) else 1


def _verify(config: Config) -> int:
    # Without quiet_libraries, which loads torch: this command starts at once.
    from care_train.verifier import command

    command.run(config)
    return 0


def _export(options: argparse.Namespace) -> None:
    quiet_libraries()
    from care_train.export import export

    export(options.run, options.checkpoint, options.out, adapter=options.adapter)


def _table(options: argparse.Namespace) -> int:
    from care_train.evaluation.table import combine_runs, trainings_markdown

    groups = {}
    for group in options.groups:
        name, separator, folders = group.partition("=")
        if not (name and separator and folders):
            raise ValueError(f"table: got {group!r}, wanted NAME=RUN,RUN,...")
        groups[name] = combine_runs([Path(folder) for folder in folders.split(",")])
    print(trainings_markdown(groups), end="")
    return 0


def _build_data(options: argparse.Namespace) -> int:
    # No torch: the workers of a build start fast.
    from care_train.data_command import build_data

    try:
        build_data(load_build_settings(options.config, options.overrides))
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


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
