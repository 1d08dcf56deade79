"""`care-train` as one rank whose device is not the CPU; the arguments are its own.

    python -m tests.train.second_device train ...

`train_on_device` puts transformers' trainers there, TRL's among them.

The device is `second_device.cpp`'s, which refuses operators on tensors of two devices, as GPUs do.
DeepSpeed, transformers and the trainer take it for an accelerator.
"""

import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import accelerate
import deepspeed
import ninja
import torch
import torch.distributed as dist
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from torch.testing._internal.distributed import fake_pg  # noqa: F401  registers the backend
from torch.utils.cpp_extension import load
from transformers import TrainingArguments

from care_train import distributed

NAME = "second"


class Accelerator(CPU_Accelerator):
    """What DeepSpeed asks of the device."""

    def device_name(self, device_index: int | None = None) -> str:
        return NAME if device_index is None else f"{NAME}:{device_index}"

    def device(self, device_index: int | None = None) -> torch.device:
        return torch.device(NAME, 0)

    def current_device(self) -> int:
        return 0

    def current_device_name(self) -> str:
        return f"{NAME}:0"

    def on_accelerator(self, tensor: torch.Tensor) -> bool:
        return tensor.device.type == NAME


def register_device() -> None:
    """Build the device and make it torch's `second:0`."""
    os.environ["PATH"] = os.pathsep.join([ninja.BIN_DIR, os.environ["PATH"]])
    source = str(Path(__file__).with_suffix(".cpp"))
    load("second_device", [source], extra_cflags=["-O0"], is_python_module=False)
    torch.utils.rename_privateuse1_backend(NAME)
    module: Any = ModuleType(f"torch.{NAME}")
    module.is_available = module.is_initialized = lambda: True
    module.device_count = lambda: 1
    module.current_device = lambda: 0
    module.manual_seed_all = lambda seed: None
    module._is_in_bad_fork = lambda: False
    module.get_amp_supported_dtype = lambda: [torch.float16, torch.bfloat16]
    torch._register_device_module(NAME, module)
    torch.utils.generate_methods_for_privateuse1_backend()


def take_device() -> None:
    """Every process group from here on has the device."""
    initialize, join = distributed.initialize_process_group, dist.init_process_group

    def join_with_device(_: str, **arguments: Any) -> None:
        # Collectives of the one rank change nothing: that is what torch's `fake` ones do.
        join(f"cpu:gloo,{NAME}:fake", **arguments)

    def initialize_with_device(*arguments: Any, **named: Any) -> torch.device:
        initialize(*arguments, **named)
        return torch.device(NAME, 0)

    dist.init_process_group = join_with_device
    for module in list(sys.modules.values()):
        if getattr(module, "initialize_process_group", None) is initialize:
            module.initialize_process_group = initialize_with_device
    deepspeed.accelerator.set_accelerator(Accelerator())


def train_on_device() -> None:
    """Every transformers `Trainer` from here on has the device."""
    register_device()
    own: Any = TrainingArguments.__dict__["_setup_devices"]
    device = torch.device(NAME, 0)

    def set_up(arguments: TrainingArguments) -> torch.device:
        own.__get__(arguments)
        return device

    accelerate.Accelerator.device = property(lambda _: device)
    trainers: Any = TrainingArguments
    trainers._setup_devices = property(set_up)


if __name__ == "__main__":
    register_device()
    take_device()
    from care_train.cli import main

    sys.exit(main(sys.argv[1:]))
