"""What the commands take: their options, and every setting's help."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from care_train.config.build import BuildSettings
from care_train.config.keys import Key, list_keys

_COMMANDS = {
    "quickstart": "teach a tiny vision-language model to read images: cold start, CARE, report",
    "sft": "cold start: supervised fine-tuning on rationale and answer",
    "train": "reinforcement learning with CARE or a baseline, evaluated before and after",
    "eval": "score a model on the paper's benchmarks or held-out rows: single decode",
}

_RESUMABLE = ("quickstart", "sft", "train", "eval")

INSPECTIONS = {
    "plan": "predict memory per rank and time per step, without loading the model",
    "doctor": "check machine, model, data and settings before a run",
}

_SERVE = "generate for runs: a vLLM that gets its weights from the run (rollout.vllm.server)"

_VERIFY = "score JSON lines with response, answer and optional type on standard input"
_DATA_BUILD = "clean and deduplicate many sources into one checked Parquet file"

_EXPORT = "write a checkpoint as a plain Hugging Face folder, from any ZeRO stage"

_TABLE = "means over the evaluations of several trainings, beside the paper's Tables 1 and 2"

_EPILOG = """\
examples:
  care-train quickstart
  care-train quickstart algorithm=grpo seed=1 name=grpo-1
  care-train train --config configs/care.yaml model.path=/models/Qwen2.5-VL-3B-Instruct
  care-train plan --config configs/care.yaml --gpus 8 --gpu h100
  care-train doctor --config configs/care.yaml
  deepspeed --num_gpus 8 --module care_train train --config configs/care.yaml
  care-train train --config configs/care.yaml --resume
  care-train eval --config configs/eval.yaml --benchmarks mathvista,mmmu model.path=runs/care/final
  care-train serve --config configs/care.yaml --port 8000
  care-train verify < answers.jsonl
  care-train data build --config configs/data/rl.yaml
  care-train export --run runs/care --checkpoint best --out care-best
  care-train table care=runs/score-0,runs/score-1 grpo=runs/score-2,runs/score-3

Every run writes runs/<name>/: config.yaml, metrics.jsonl, summary.json, checkpoints/, final/ (a
plain Hugging Face folder), learning_curves.png and report.md.

SIGTERM or Ctrl-C ends the current step, saves a checkpoint and exits with 75; a second one, more
than a second later, ends the run at once. Errors in input exit with 2. A run that cannot go on says
why and how it does: 65 not finite, 69 a rank lost, 70 hung, 71 out of memory, 72 rollout engine, 73
the run's folder in use, 74 no room on the disk, 1 anything else (docs/failures.md). torchrun's own
status is 1 for all of them.
"""


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Options and overrides in any order, which argparse alone does not take.

    Bad ones print one line and exit with 2.
    """
    parser = _parser()
    options, more = parser.parse_known_args(arguments)
    if unknown := [argument for argument in more if argument.startswith("-")]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if options.command in ("export", "table"):
        if more:
            parser.error(f"unrecognized arguments: {' '.join(more)}")
        return options
    options.overrides += more
    if getattr(options, "resume", False):
        given = any(override.split("=")[0].strip() == "resume" for override in options.overrides)
        options.overrides += [] if given else ["resume=true"]
    if getattr(options, "benchmarks", None) is not None:
        options.overrides.append(f"eval.benchmarks=[{options.benchmarks}]")
    return options


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
    keys = _keys_help(list_keys())
    for name, summary in (_COMMANDS | INSPECTIONS | {"serve": _SERVE, "verify": _VERIFY}).items():
        command = commands.add_parser(
            name,
            help=summary,
            description=summary[0].upper() + summary[1:] + ".",
            epilog=keys,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_argument("--config", type=Path, help="a YAML file; see configs/")
        if name in _RESUMABLE:
            command.add_argument(
                "--resume",
                action="store_true",
                help="go on from the run's newest usable checkpoint; from step 0 if it has none"
                if name != "eval"
                else "go on after the last response that the run wrote",
            )
        command.add_argument(
            "overrides", nargs="*", metavar="key=value", help="settings laid over the file's"
        )
        if name == "eval":
            command.add_argument(
                "--benchmarks",
                metavar="NAME,...",
                help="mathvista, mathverse, math_vision, mmmu, mmmu_pro_standard, mmmu_pro_vision; "
                "data: the rows of eval.data",
            )
        if name in INSPECTIONS:
            _add_inspection_options(command, name)
        if name == "serve":
            command.add_argument(
                "--host",
                default="127.0.0.1",
                help="where to listen; default %(default)s, 0.0.0.0 for other machines' trainers",
            )
            command.add_argument(
                "--port", type=int, default=8000, help="default %(default)s; 0: a free one"
            )
            command.add_argument(
                "--allowed-host",
                action="append",
                default=[],
                metavar="NAME",
                help="another name that trainers call this machine by; may be given several times",
            )
    _add_data(commands)
    export = commands.add_parser("export", help=_EXPORT, description=_EXPORT)
    export.add_argument("--run", type=Path, required=True, help="the run's folder")
    export.add_argument(
        "--checkpoint", default="last", help="step_NNNNNN, best or last (the default)"
    )
    export.add_argument("--out", type=Path, required=True, help="the folder to write")
    export.add_argument(
        "--adapter", action="store_true", help="the LoRA adapter alone, not the merged model"
    )
    table = commands.add_parser(
        "table", help=_TABLE, description=_TABLE[0].upper() + _TABLE[1:] + "."
    )
    table.add_argument(
        "groups", nargs="+", metavar="NAME=RUN,RUN", help="a row's name and its eval runs"
    )
    return parser


def _add_data(commands: Any) -> None:
    data = commands.add_parser("data", help="`data build`: " + _DATA_BUILD)
    build = data.add_subparsers(dest="action", required=True, metavar="build").add_parser(
        "build",
        help=_DATA_BUILD,
        description=f"{_DATA_BUILD.capitalize()}. A killed build goes on where it was.",
        epilog=_keys_help(list_keys(BuildSettings)),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    build.add_argument("--config", type=Path, required=True, help="see configs/data/")
    build.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings laid over the file's"
    )


def _add_inspection_options(command: argparse.ArgumentParser, name: str) -> None:
    add = command.add_argument
    add("--json", action="store_true", help="print one JSON object")
    if name == "doctor":
        add("--gpus", type=int, help="ranks of the run; default: the launcher's, or all GPUs here")
        return
    add("--gpus", type=int, default=8, help="ranks (default 8)")
    add("--gpu", default="h100", help="which: b200, h200, h100, a100, a100-40, l40s, rtx4090")
    add("--table", action="store_true", help="1 to 64 GPUs under every ZeRO stage")
    add("--images", type=int, default=1, help="images per prompt (default 1)")
    add("--image-size", metavar="WxH", help="pixels; default: the largest that are not scaled down")
    add("--text-tokens", type=int, default=256, help="mean text of a prompt, for times only")
    add("--response-tokens", type=int, help="mean response, for times only; default: half the most")


def _keys_help(keys: Sequence[Key]) -> str:
    lines = ["settings (key = default: meaning):"]
    for key in keys:
        shown = f"  {key.name} = {key.default}  ({key.wanted})\n      {key.meaning}"
        lines.append(shown.replace("%", "%%"))
    return "\n".join(lines)
