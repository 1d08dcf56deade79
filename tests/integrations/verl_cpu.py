"""A CPU as a device of verl's: name it in `VERL_USE_EXTERNAL_MODULES`, before others."""

# verl is installed where verl runs, not where this project is checked.
# pyright: reportMissingImports=false
from types import SimpleNamespace

import torch
from verl.plugin.platform import set_platform
from verl.plugin.platform.platform_cuda import PlatformCUDA

NOTHING = ("empty_cache", "synchronize", "memory_allocated", "memory_reserved")
NOTHING += ("max_memory_allocated", "max_memory_reserved")


class Cpu(PlatformCUDA):
    """Its memory is not asked about, its speed is not known."""

    device_name = "cpu"
    device_module = SimpleNamespace(
        get_device_name=lambda: "CPU",
        is_available=lambda: False,
        mem_get_info=lambda: (0, 0),
        **dict.fromkeys(NOTHING, lambda *args: 0),
    )

    def current_device(self) -> torch.device:
        return torch.device("cpu")


set_platform(Cpu())
