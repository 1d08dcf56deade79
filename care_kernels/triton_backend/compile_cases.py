"""Every kernel at the shapes of a real model, for ahead-of-time compilation without a GPU.

    for case in compile_cases("9"):
        compiled = triton.compile(
            case.source(), target=GPUTarget("cuda", 90, 32), options=case.options()
        )

`compiled.asm["cubin"]` (or `["hsaco"]`) is what a device would load: `cuobjdump
--dump-resource-usage` reads its registers and stack, `compiled.metadata.shared` is its shared
memory. A stack, or more shared memory than the device has, means that the kernel does not fit.

Compile in a process that does not set TRITON_INTERPRET: an interpreted kernel cannot be compiled.
A launch specialises on pointers aligned to 16 bytes and on integers divisible by 16, so that loads
become vectors; the sources here make the same assumptions, which hold at these shapes.

Shape letters: C rows of the chunk, D hidden, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any

from triton.compiler import ASTSource

NUM_ROWS = 4096
WIDTH = 3584
VOCAB_SIZE = 152_064
ALIGNMENT = 16


@dataclass(frozen=True)
class CompileCase:
    """One kernel, with everything that decides its machine code and what one launch costs."""

    name: str
    fn: Any
    """The function that `@triton.jit` made."""
    signature: dict[str, str]
    """Type of each argument, such as "*bf16", "i32", "fp32" or "constexpr"."""
    constexprs: dict[str, Any]
    """Value of each "constexpr" argument; None stands for an absent pointer."""
    num_warps: int
    num_stages: int
    grid: str
    """Programs of one launch, in words."""
    flops: int
    """Multiply-adds count as two; matrix products only."""
    hbm_bytes: int
    """Each input read once, each output written once."""
    is_aligned: bool = True
    """Whether sizes and row strides are divisible by 16."""

    def source(self) -> ASTSource:
        """What `triton.compile` takes."""
        aligned = {
            (index,): [["tt.divisibility", ALIGNMENT]]
            for index, parameter in enumerate(self.fn.params)
            if self.signature[parameter.name].startswith(("*", "i") if self.is_aligned else "*")
            and not parameter.do_not_specialize
        }
        return ASTSource(self.fn, self.signature, self.constexprs, aligned)

    def options(self) -> dict[str, int]:
        """Launch options of `triton.compile`."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


def compile_case(
    name: str,
    fn: Any,
    types: dict[str, str],
    constexprs: dict[str, Any],
    *,
    num_warps: int,
    num_stages: int = 1,
    grid: str,
    flops: int = 0,
    hbm_bytes: int,
    is_aligned: bool = True,
) -> CompileCase:
    """A case with the signature in argument order; integers not named in `types` are i32."""
    signature = {
        argument: "constexpr" if argument in constexprs else types.get(argument, "i32")
        for argument in fn.arg_names
    }
    return CompileCase(
        name,
        fn,
        signature,
        constexprs,
        num_warps,
        num_stages,
        grid,
        flops,
        hbm_bytes,
        is_aligned,
    )


def compile_cases(architecture: str = "9") -> list[CompileCase]:
    """Every kernel of the package, in the variants that a training run launches.

    `architecture` is "hip" or CUDA's major version, "8", "9" or "10": the GEMM's tile depends on
    it.
    """
    from care_kernels.triton_backend import (
        exp_gradients,
        fused_projection,
        row_objective,
        tile_statistics,
    )

    modules = (
        tile_statistics,
        exp_gradients,
        row_objective,
    )
    others = [case for module in modules for case in module.compile_cases()]
    return fused_projection.compile_cases(architecture) + others
