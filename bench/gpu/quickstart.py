"""The quickstart on the GPU with the embedded engine, where what the trainer needs is there.

Shorter than `make quickstart`: enough steps to see the model learn. Of what the `train` extra asks
for, each package must be installed or lie as a wheel in `.wheels/`.
"""

import json
import os
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bench.gpu.section import Bench

_CONFIG = Path(__file__).parents[2] / "configs" / "easy_vqa.yaml"
_INTERPRET = "TRITON_INTERPRET"
_NEEDED = ("deepspeed", "pydantic", "yaml", "easy_vqa", "math_verify", "accelerate", "datasets")
_SETTINGS = ("train.steps=30", "eval.max_samples=500")
_DRY_SETTINGS = (
    "sft.steps=1",
    "sft.data.max_samples=8",
    "sft.batch_size=4",
    "train.steps=1",
    "train.prompts_per_step=2",
    "rollout.group_size=2",
    "rollout.max_new_tokens=4",
    "eval.max_samples=4",
)


def run(bench: Bench) -> None:
    """Cold start, training steps and evaluation in a process of their own."""
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        bench.record.put("missing", dict.fromkeys(missing, "not installed, nor in .wheels/"))
        print(f"  left out: {', '.join(missing)} not installed, nor in .wheels/")
        return
    settings = _DRY_SETTINGS if bench.dry else _SETTINGS
    with tempfile.TemporaryDirectory(prefix="quickstart-") as folder:
        command = [sys.executable, "-m", "care_train", "quickstart", "--config", str(_CONFIG)]
        # The trainer's own kernels are for the device, or torch's.
        environment = {key: value for key, value in os.environ.items() if key != _INTERPRET}
        command += [f"output_dir={folder}", *settings, "name=quickstart"]
        code = subprocess.run(command, env=environment).returncode
        summaries = sorted(Path(folder).rglob("summary.json"))
        summary: dict[str, Any] = json.loads(summaries[0].read_text()) if summaries else {}
    bench.record.put("quickstart", {"exit_code": code, "settings": settings, "summary": summary})
    if code:
        sys.exit(f"the quickstart ended with {code}")
