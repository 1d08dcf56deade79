"""What accelerators have: memory, arithmetic and bandwidth, from their makers' data sheets."""

from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class Accelerator:
    """One GPU, or the CPU where `bench.plan` checks the formulas."""

    name: str
    memory: float
    """Bytes that a process can see."""
    flops: float
    """Dense bfloat16 FLOP per second, fp32 accumulation."""
    bandwidth: float
    """Of its memory, in bytes per second."""
    link: float
    """To the other GPUs of its node, bytes per second and direction."""
    network: float
    """To other nodes, bytes per second and GPU: assumed, one network card per GPU."""
    kind: str = "cuda"
    gpus_per_node: int = 8

    @property
    def overhead(self) -> float:
        """Bytes of CUDA context, libraries' workspaces and NCCL's buffers: assumed, 1.5 GiB."""
        return 0.0 if self.kind == "cpu" else 1.5 * GIB


def _gpu(
    name: str, gib: float, tflops: float, tb: float, link_gb: float, network_gb: float
) -> Accelerator:
    return Accelerator(name, gib * GIB, tflops * 1e12, tb * 1e12, link_gb * 1e9, network_gb * 1e9)


ACCELERATORS = {
    gpu.name: gpu
    for gpu in (
        # Memory as nvidia-smi reports it; FLOP and bandwidths from NVIDIA's data sheets (SXM).
        _gpu("b200", 179.1, 2250, 8.0, 900, 50),
        _gpu("h200", 140.4, 989, 4.8, 450, 50),
        _gpu("h100", 79.6, 989, 3.35, 450, 50),
        _gpu("a100", 79.3, 312, 2.04, 300, 25),
        _gpu("a100-40", 39.4, 312, 1.56, 300, 25),
        # Over PCIe 4.0 x16, without NVLink.
        _gpu("l40s", 45.0, 362, 0.864, 32, 25),
        _gpu("rtx4090", 24.0, 165, 1.01, 32, 12.5),
    )
}
"""By the names that `--gpu` takes."""


def accelerator(name: str) -> Accelerator:
    """The accelerator of a name.

    Raises:
        ValueError: an unknown one.
    """
    if name.lower() not in ACCELERATORS:
        raise ValueError(f"--gpu: got {name!r}, wanted one of {', '.join(ACCELERATORS)}")
    return ACCELERATORS[name.lower()]
