"""care-train: the command line, one function per command.

What a command computes stands where its noun is (`commands.py` for the runs). Functions import it
themselves: `--help` and errors in a configuration need no torch.
"""

import argparse
import os
import select
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from care_train.arguments import parse_arguments
from care_train.config import (
    BuildSettings,
    Config,
    config_files,
    configs_folder,
    load_build_settings,
    load_config,
    names_run,
)
from care_train.training.failures import STOPPED_STATUS, Stopped, is_explained, status_of

_SIGPIPE_STATUS = 128 + 13


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; errors that explain themselves print one line (docs/failures.md)."""
    try:
        try:
            return _main(arguments)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        if not any(events & select.POLLERR for _, events in poll.poll(0)):
            raise  # of another pipe
        # Who reads the output has enough of it, as `head` does. Python flushes once more at its
        # end: to nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _SIGPIPE_STATUS


def _main(arguments: Sequence[str] | None) -> int:
    options = parse_arguments(arguments)
    try:
        return _COMMANDS[options.command](options)
    except Exception as error:
        if not is_explained(error):
            raise
        print(f"care-train {options.command}: error: {error}", file=sys.stderr)
        return status_of(error)


def quiet_libraries() -> None:
    """Progress and errors are ours to show; these must be set before the libraries load."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Else torch reports with stacks that a rank is gone, which the guard says better.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    import logging
    import warnings

    import torch
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    # It says at length where it keeps its cache for a user without a home.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    # DeepSpeed still calls collectives that torch has renamed.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    # It is the rank's own.
    warnings.filterwarnings("ignore", r"barrier\(\): using the device under current context")
    if not torch.cuda.is_available():
        # DeepSpeed otherwise warns that it found no accelerator.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def _run(options: argparse.Namespace) -> int:
    """quickstart, sft, train and eval: a configuration becomes a run's folder."""
    path = options.config
    if options.command == "quickstart" and path is None and not names_run(options.overrides):
        path = configs_folder() / "quickstart.yaml"
    config, files = load_config(path, options.overrides), config_files(path, options.overrides)
    quiet_libraries()
    from care_train.commands import run_command
    from care_train.distributed import barrier, is_main
    from care_train.reporting import show_summary
    from care_train.training.run_folder import run_dir_of

    try:
        summary = run_command(options.command, config, files)
    except Stopped as stopped:
        if is_main():
            print(f"{stopped}; go on with the same command and --resume, or with", file=sys.stderr)
            print(f"  care-train {options.command} resume={stopped.run_dir}", file=sys.stderr)
        # Launchers kill the other ranks when the first one leaves: not before it is said.
        barrier()
        return STOPPED_STATUS
    if is_main():
        show_summary(run_dir_of(config), summary)
    return 0


def _doctor(options: argparse.Namespace) -> int:
    config = _config(options)
    quiet_libraries()
    from care_train.doctor.run import doctor

    return doctor(config, options.gpus, as_json=options.json)


def _plan(options: argparse.Namespace) -> int:
    config = _config(options)
    quiet_libraries()
    from care_train.planning.plan import plan

    plan(config, options)
    return 0


def _serve(options: argparse.Namespace) -> int:
    config = _config(options)
    quiet_libraries()
    from care_train.serve import serve

    return 0 if serve(config, options.host, options.port, options.allowed_host) else 1


def _verify(options: argparse.Namespace) -> int:
    # Without quiet_libraries, which loads torch: this command starts at once.
    config = _config(options)
    from care_train.verifier.command import verify_lines

    verify_lines(config, sys.stdin, sys.stdout)
    return 0


def _export(options: argparse.Namespace) -> int:
    quiet_libraries()
    from care_train.publishing import export

    export(options.run, options.checkpoint, options.out, adapter=options.adapter)
    return 0


def _report(options: argparse.Namespace) -> int:
    from care_train.reporting.page import LiveServer, write_page

    if options.max_mib < 1:
        raise ValueError(f"--max-mib: got {options.max_mib}, wanted at least 1")
    if not options.watch:
        path = options.out or options.runs[0] / "report.html"
        write_page(options.runs, path, options.max_mib)
        print(path)
        return 0
    with LiveServer(options.runs, options.port, options.max_mib) as server:
        print(f"{server.url}  (Ctrl-C ends it)", flush=True)
        with suppress(KeyboardInterrupt):
            server.serve_forever()
    return 0


def _replay(options: argparse.Namespace) -> int:
    quiet_libraries()
    from care_train.replay.compare import check_outputs, replay, show_replay, write_replay

    check_outputs(options.out)
    found = replay(options.run, options.overrides)
    show_replay(found)
    for path in options.out:
        write_replay(found, path)
    return 0


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
    settings = load_build_settings(options.config, options.overrides)
    # No torch: the workers of a build start fast.
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from care_train.data.build import build

    columns = (TextColumn("rows"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    hidden = not console.is_interactive
    try:
        with Progress(*columns, console=console, transient=True, disable=hidden) as progress:
            task = progress.add_task("rows", total=None)
            manifest = build(
                settings, lambda done, total: progress.update(task, completed=done, total=total)
            )
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    _show_build(settings, manifest["counts"])
    return 0


def _show_build(settings: BuildSettings, counts: Mapping[str, Any]) -> None:
    """A build's counts as a table on standard output."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table("source", "read", "rejected", "usable", "share", "duplicates", "kept", "share")
    for name, one in (*counts["sources"].items(), ("total", counts["total"])):
        read, usable, kept = one["read"] - one["filtered"], one["usable"], one["kept"]
        rejected, duplicates = (
            sum(n.values()) if isinstance(n, Mapping) else n
            for n in (one["rejected"], one["duplicates"])
        )
        shares = [f"{one[key]}%" if key in one else "" for key in ("usable_share", "kept_share")]
        first = (f"{n:,}" for n in (read, rejected, usable))
        table.add_row(name, *first, shares[0], f"{duplicates:,}", f"{kept:,}", shares[1])
    console.print(table)
    for name, one in counts["sources"].items():
        if one["expected_rows"] not in (None, one["usable"]):
            console.print(
                f"{name}: {one['usable']:,} usable rows, expected {one['expected_rows']:,} "
                f"(sources.{name}.expected_rows)"
            )
    console.print(f"[bold]{settings.output}[/bold]: train.parquet, manifest.json, quarantine.jsonl")


def _config(options: argparse.Namespace) -> Config:
    return load_config(options.config, options.overrides)


_COMMANDS = {
    "quickstart": _run,
    "sft": _run,
    "train": _run,
    "eval": _run,
    "plan": _plan,
    "doctor": _doctor,
    "serve": _serve,
    "verify": _verify,
    "data": _build_data,
    "export": _export,
    "report": _report,
    "replay": _replay,
    "table": _table,
}

if __name__ == "__main__":
    sys.exit(main())
