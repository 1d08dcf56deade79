"""`care-train plan`: from the command line's options to a report."""

import argparse
import re

from rich.console import Console

from care_train.config import Config
from care_train.planning.hardware import accelerator
from care_train.planning.plan import make_plan, plan_table
from care_train.planning.report import plan_to_json, show_plan, show_table, table_to_json
from care_train.planning.workload import Scenario


def plan(config: Config, options: argparse.Namespace) -> None:
    """Print the plan, or with `--table` the plans of 1 to 64 GPUs.

    Raises:
        ValueError: an unknown GPU or model, or an option that is out of range.
    """
    device, scenario = accelerator(options.gpu), scenario_of(config, options)
    console = Console(width=None if Console().is_terminal else 110)
    if options.table:
        rows = plan_table(config, scenario, device)
        print(table_to_json(rows)) if options.json else show_table(rows, console)
        return
    made = make_plan(config, scenario, device)
    print(plan_to_json(made)) if options.json else show_plan(made, console)


def scenario_of(config: Config, options: argparse.Namespace) -> Scenario:
    """What the options add to the configuration."""
    for name in ("gpus", "text_tokens", "response_tokens"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')}: got {value}, wanted at least 1")
    share = 0.5
    if options.response_tokens is not None:
        share = options.response_tokens / config.rollout.max_new_tokens
    return Scenario(
        gpus=options.gpus,
        images=options.images,
        image_pixels=_pixels(options.image_size),
        text_tokens=options.text_tokens,
        mean_response_share=min(1.0, share),
    )


def _pixels(size: str | None) -> int | None:
    if size is None:
        return None
    match = re.fullmatch(r"(\d+)[xX](\d+)", size)
    if match is None:
        raise ValueError(f"--image-size: got {size!r}, wanted the form 1024x768")
    return int(match[1]) * int(match[2])
