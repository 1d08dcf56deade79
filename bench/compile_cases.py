"""Every kernel at the shapes of a real model, for ahead-of-time compilation without a GPU.

Compile in a process that does not set TRITON_INTERPRET: an interpreted kernel cannot be compiled.
A launch specialises on pointers aligned to 16 bytes and on integers divisible by 16, so that loads
become vectors; the sources here make the same assumptions, which hold for the head of Qwen2.5-VL-7B
(D 3,584, V 152,064) at 4,096 rows.
"""

from dataclasses import KW_ONLY, dataclass
from importlib import import_module
from typing import Any

from triton.compiler import ASTSource

from care_kernels.triton import projection, softmax

# By module name: the package's attribute of the first name is the function.
rationale_distance = import_module("care_kernels.rationale_distance")
region_weights = import_module("care_kernels.region_weights")

ALIGNMENT = 16


@dataclass(frozen=True)
class CompileCase:
    """One kernel, with everything that decides its machine code."""

    name: str
    fn: Any
    """The function that `@triton.jit` made."""
    types: dict[str, str]
    """Of its arguments, such as "*bf16", "i32" or "fp32"; i32 where not named."""
    constexprs: dict[str, Any]
    """Values of "constexpr" arguments; None stands for an absent pointer."""
    _: KW_ONLY
    num_warps: int
    num_stages: int = 1
    odd: tuple[str, ...] = ()
    """The integers, sizes and row strides, that 16 does not divide."""

    def source(self) -> ASTSource:
        """What `triton.compile` takes."""
        signature = {
            name: "constexpr" if name in self.constexprs else self.types.get(name, "i32")
            for name in self.fn.arg_names
        }
        aligned = {
            (index,): [["tt.divisibility", ALIGNMENT]]
            for index, parameter in enumerate(self.fn.params)
            if signature[parameter.name].startswith(("*", "i"))
            and not parameter.do_not_specialize
            and parameter.name not in self.odd
        }
        return ASTSource(self.fn, signature, self.constexprs, aligned)

    def options(self) -> dict[str, int]:
        """Launch options of `triton.compile`."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


def compile_cases(architecture: str = "9") -> list[CompileCase]:
    """Every kernel of the package, in the variants that a training run launches.

    `architecture` is "hip" or CUDA's major version, "8", "9" or "10": the GEMM's tile depends on
    it.
    """
    return [
        *_project_cases(architecture),
        *_exp_gradients_cases(architecture),
        _token_advantages_case(),
        _span_means_case(),
    ]


def _project_cases(architecture: str) -> list[CompileCase]:
    """The GEMM for log-probs alone and for training, with and without every option."""
    plain = ("bias_ptr", "anchor_ptr", "tile_moment_ptr")
    return [
        _project_case(architecture, f"project_{name}", absent, form, dtype)
        for name, absent, form, dtype in (
            ("log_probs", (*plain, "exps"), "plain", "bf16"),
            ("log_probs_entropy", ("bias_ptr", "anchor_ptr", "exps"), "entropy", "bf16"),
            ("training", plain, "plain", "bf16"),
            ("training_fp16", plain, "plain", "fp16"),
            ("training_bias", plain[1:], "plain", "bf16"),
            ("training_entropy", ("bias_ptr", "anchor_ptr"), "entropy", "bf16"),
            ("training_entropy_bias", ("anchor_ptr",), "entropy", "bf16"),
            ("anchored", ("bias_ptr", "tile_max_ptr", "tile_moment_ptr"), "anchored", "bf16"),
            ("anchored_entropy_bias", ("tile_max_ptr",), "anchored", "bf16"),
            ("entropy_softcap_bias", ("anchor_ptr",), "softcap", "bf16"),
            ("entropy_odd_vocabulary", ("bias_ptr", "anchor_ptr"), "entropy", "bf16"),
            ("anchored_odd_vocabulary", ("bias_ptr", "tile_max_ptr"), "anchored", "bf16"),
            ("entropy_softcap_bias_odd_vocabulary", ("anchor_ptr",), "softcap", "bf16"),
            ("entropy_bias_unaligned", ("anchor_ptr",), "unaligned", "bf16"),
            ("anchored_entropy_bias_unaligned", ("tile_max_ptr",), "unaligned", "bf16"),
            ("entropy_softcap_bias_unaligned", ("anchor_ptr",), "softcap_unaligned", "bf16"),
        )
    ]


def _project_case(
    architecture: str, name: str, absent: tuple[str, ...], form: str, dtype: str
) -> CompileCase:
    kernel = projection._project_kernel
    is_aligned = not form.endswith("unaligned")
    tile = projection.gemm_tile(architecture, form if is_aligned else "unaligned")
    options = tile._asdict()
    num_warps, num_stages = options.pop("num_warps"), options.pop("num_stages")
    blocks = {
        "hidden": (tile.BLOCK_C, tile.BLOCK_D),
        "weight": (tile.BLOCK_V, tile.BLOCK_D),
        "exps": (tile.BLOCK_C, tile.BLOCK_V // 2),
    }
    types = _pointers(kernel) | {"bias_ptr": f"*{dtype}", "inner": "fp32", "outer": "fp32"}
    for matrix, block in blocks.items():
        types[matrix] = f"tensordesc<{dtype}{list(block)}>" if tile.USE_TMA else f"*{dtype}"
    constants = {"HAS_SOFTCAP": form.startswith("softcap"), "EVEN_D": is_aligned, "UPCAST": False}
    odd = () if is_aligned else ("vocab_size", "width", "stride_hidden", "stride_weight")
    if name.endswith("odd_vocabulary"):
        odd = ("vocab_size",)
    return CompileCase(
        name,
        kernel,
        types,
        constants | options | dict.fromkeys(absent),
        num_warps=num_warps,
        num_stages=num_stages,
        odd=odd,
    )


def _exp_gradients_cases(architecture: str) -> list[CompileCase]:
    """Plain, and with entropy and softcap, for the tiles that `project` leaves."""
    kernel = softmax._exp_gradients_kernel
    types = _pointers(kernel) | {"exps_ptr": "*bf16", "inner": "fp32", "outer": "fp32"}
    cases = []
    for suffix, absent, form in (
        ("", ("entropy_ptr", "d_entropy_ptr"), "plain"),
        ("_entropy_softcap", (), "softcap"),
    ):
        tile_size = projection.gemm_tile(architecture, form).BLOCK_V // 2
        constants = {
            "HAS_SOFTCAP": form == "softcap",
            "TILE_V": tile_size,
            "BLOCK_T": softmax.BLOCK_V // tile_size,
        }
        cases.append(
            CompileCase(
                f"exp_gradients{suffix}",
                kernel,
                types,
                constants | dict.fromkeys(absent),
                num_warps=softmax.NUM_WARPS,
            )
        )
    return cases


def _token_advantages_case() -> CompileCase:
    """The paper's two regions and four of a trainer's."""
    kernel, block = region_weights._paint_kernel, region_weights.BLOCK
    return CompileCase(
        "token_advantages",
        kernel,
        _pointers(kernel) | dict.fromkeys(("spans_ptr", "ends_ptr"), "*i64"),
        {"BLOCK": block, "NUM_REGIONS": 6},
        num_warps=region_weights.NUM_WARPS,
    )


def _span_means_case() -> CompileCase:
    """Columns side by side; padded and packed states differ in a stride alone."""
    block_t, block_d = rationale_distance.BLOCK_T, rationale_distance.BLOCK_D
    indices = dict.fromkeys(("starts_ptr", "spans_ptr"), "*i64")
    return CompileCase(
        "span_means",
        rationale_distance._span_means_kernel,
        {"means_ptr": "*fp32", "hidden_ptr": "*bf16"} | indices,
        {"stride_column": 1, "BLOCK_T": block_t, "BLOCK_D": block_d},
        num_warps=rationale_distance.NUM_WARPS,
    )


def _pointers(kernel: Any) -> dict[str, str]:
    """Every pointer of a kernel as float32, token ids as int64."""
    types = {name: "*fp32" for name in kernel.arg_names if name.endswith("_ptr")}
    return types | ({"target_ids_ptr": "*i64"} if "target_ids_ptr" in types else {})
