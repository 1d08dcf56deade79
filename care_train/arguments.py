"""What each command of care-train takes, and what its help says."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import care_train
from care_train.config import BuildSettings, Config, full_help, short_help

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
  care-train report runs/care runs/grpo --out comparison.html
  care-train replay runs/care care.max_negatives=2 care.neg_scale=0.3
  care-train table care=runs/score-0,runs/score-1 grpo=runs/score-2,runs/score-3

Every run writes runs/<name>/: config.yaml, metrics.jsonl, summary.json, checkpoints/, final/ (a
plain Hugging Face folder), learning_curves.png and report.md.

SIGTERM or Ctrl-C ends the current step, saves a checkpoint and exits with 75; a second one, more
than a second later, ends the run at once. Errors in input exit with 2. A run that cannot go on says
why and how it does: 65 not finite, 69 a rank lost, 70 hung, 71 out of memory, 72 rollout engine, 73
the run's folder in use, 74 no room on the disk, 1 anything else (docs/failures.md). torchrun's own
status is 1 for all of them.
"""

_MODEL = ("", "model", "prompt")
_SFT = (
    *(*_MODEL, "sft", "deepspeed"),
    *("train.micro_batch_size", "train.micro_batch_tokens", "train.gradient_checkpointing"),
    *("train.warmup_steps", "train.save_every", "train.eval_every"),
)
_TRAIN = (*_MODEL, "data", "rollout", "reward", "care", "loss", "train", "eval", "deepspeed")


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Options and overrides in any order, which argparse alone does not take.

    Bad ones print one line and exit with 2.
    """
    parser = _parser()
    options, more = parser.parse_known_args(arguments)
    takes_settings = hasattr(options, "overrides")
    if unknown := [text for text in more if text.startswith("-") or not takes_settings]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if takes_settings:
        options.overrides += more
    if getattr(options, "resume", False):
        given = any(override.split("=")[0].strip() == "resume" for override in options.overrides)
        options.overrides += [] if given else ["resume=true"]
    if getattr(options, "benchmarks", None) is not None:
        options.overrides.append(f"eval.benchmarks=[{options.benchmarks}]")
    return options


class _HelpAll(argparse.Action):
    """`--help-all`: print every setting and exit."""

    def __init__(self, *args: Any, root: type = Config, **kwargs: Any) -> None:
        super().__init__(*args, nargs=0, help="every setting, and exit", **kwargs)
        self._root = root

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        print(f"{parser.format_usage()}\n{full_help(self._root)}")
        parser.exit()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="care-train",
        description="Post-train vision-language models from verifiable rewards with CARE.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    version = f"%(prog)s {care_train.__version__}"
    parser.add_argument("--version", action="version", version=version)
    # Launchers put it before the command; the rank comes from the environment.
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    quickstart = "teach a tiny vision-language model to read images: cold start, CARE, report"
    sft = "cold start: supervised fine-tuning on rationale and answer"
    train = "reinforcement learning with CARE or a baseline, evaluated before and after"
    go_on = "go on from the run's newest usable checkpoint; from step 0 if it has none"
    for name, summary, sections in (
        ("quickstart", quickstart, (*_TRAIN, "sft")),
        ("sft", sft, _SFT),
        ("train", train, _TRAIN),
    ):
        add = _add_run(commands, name, summary, sections).add_argument
        add("--resume", action="store_true", help=go_on)

    summary = "score a model on the paper's benchmarks or held-out rows: single decode"
    add = _add_run(commands, "eval", summary, (*_MODEL, "rollout", "reward", "eval")).add_argument
    add("--resume", action="store_true", help="go on after the last response that the run wrote")
    names = "mathvista, mathverse, math_vision, mmmu, mmmu_pro_standard, mmmu_pro_vision; "
    names += "data: the rows of eval.data"
    add("--benchmarks", metavar="NAME,...", help=names)

    summary = "predict memory per rank, without loading the model"
    add = _add_run(commands, "plan", summary, _TRAIN).add_argument
    add("--json", action="store_true", help="print one JSON object")
    add("--gpus", type=int, default=8, help="ranks (default 8)")
    add("--gpu", default="h100", help="which: b200, h200, h100, a100, a100-40, l40s, rtx4090")
    add("--table", action="store_true", help="1 to 64 GPUs under every ZeRO stage")
    add("--images", type=int, default=1, help="images per prompt (default 1)")
    add("--image-size", metavar="WxH", help="pixels; default: the largest that are not scaled down")

    summary = "check machine, model, data and settings before a run"
    add = _add_run(commands, "doctor", summary, _TRAIN).add_argument
    add("--json", action="store_true", help="print one JSON object")
    add("--gpus", type=int, help="ranks of the run; default: all GPUs here")

    summary = "generate for runs: a vLLM that gets its weights from the run (rollout.vllm.server)"
    add = _add_run(commands, "serve", summary, (*_MODEL, "rollout")).add_argument
    listen = "where to listen; default %(default)s, 0.0.0.0 for other machines' trainers"
    add("--host", default="127.0.0.1", help=listen)
    add("--port", type=int, default=8000, help="default %(default)s; 0: a free one")
    names = "another name that trainers call this machine by; may be given several times"
    add("--allowed-host", action="append", default=[], metavar="NAME", help=names)

    summary = "score JSON lines with response, answer and optional type on standard input"
    _add_run(commands, "verify", summary, ("prompt", "reward"))

    data = commands.add_parser("data", help="`data build`: clean many sources into one file")
    actions = data.add_subparsers(dest="action", required=True, metavar="build")
    summary = "clean and deduplicate many sources into one checked Parquet file; a killed build "
    build = _add(actions, "build", f"{summary}goes on where it was")
    build.add_argument("--config", type=Path, required=True, help="see configs/data/")
    _add_settings(build, BuildSettings)

    summary = "write a checkpoint as a plain Hugging Face folder, from any ZeRO stage"
    add = _add(commands, "export", summary).add_argument
    add("--run", type=Path, required=True, help="the run's folder")
    add("--checkpoint", default="last", help="step_NNNNNN, best or last (the default)")
    add("--out", type=Path, required=True, help="the folder to write")
    add("--adapter", action="store_true", help="the LoRA adapter alone, not the merged model")

    summary = "one HTML page of runs: curves, diagnostics, a browser of their groups"
    add = _add(commands, "report", summary).add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder")
    out = "the file to write; default: report.html in the first run's folder"
    add("--out", type=Path, metavar="FILE", help=out)
    most = "how much of the archives the page carries; evenly spaced steps beyond (default 64)"
    add("--max-mib", type=int, default=64, metavar="N", help=most)
    watch = "serve the page to this machine's browsers, newest data first, until Ctrl-C"
    add("--watch", action="store_true", help=watch)
    add("--port", type=int, default=0, help="of --watch; default: a free one")

    summary = "another algorithm or ablation over a run's archive, without a model"
    replay = _add(commands, "replay", summary)
    replay.add_argument("run", type=Path, help="the run's folder")
    out = "also write totals and groups (.json), groups (.csv) or a picture (.png); may be given "
    out += "several times"
    replay.add_argument("--out", type=Path, action="append", default=[], metavar="FILE", help=out)
    _add_settings(replay, Config)

    summary = "means over the evaluations of several trainings, beside the paper's Tables 1 and 2"
    add = _add(commands, "table", summary).add_argument
    add("groups", nargs="+", metavar="NAME=RUN,RUN", help="a row's name and its eval runs")
    return parser


def _add_run(
    commands: Any, name: str, summary: str, sections: Sequence[str]
) -> argparse.ArgumentParser:
    """A command that takes a run's settings; its help shows the common ones of `sections`."""
    command = _add(commands, name, summary, epilog=short_help(sections))
    command.formatter_class = argparse.RawDescriptionHelpFormatter
    command.add_argument("--config", type=Path, help="a YAML file; see configs/")
    _add_settings(command, Config)
    return command


def _add(commands: Any, name: str, summary: str, epilog: str = "") -> argparse.ArgumentParser:
    sentence = f"{summary[0].upper()}{summary[1:]}."
    return commands.add_parser(name, help=summary, description=sentence, epilog=epilog)


def _add_settings(command: argparse.ArgumentParser, root: type) -> None:
    command.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings laid over the file's"
    )
    command.add_argument("--help-all", action=_HelpAll, root=root)
