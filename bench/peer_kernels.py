"""Liger's and cut-cross-entropy's Triton kernels at our shapes, for ahead-of-time compilation.

Constants are those their launchers use on an H100: Liger's defaults; the first entries of
cut-cross-entropy's autotune list that its pruning keeps for bfloat16. The vocabulary is split into
the same [4096, 152064] problem as ours.
"""

from typing import Any

from bench.compile_cases import (
    NUM_ROWS,
    VOCAB_SIZE,
    WIDTH,
    CompileCase,
    compile_case,
)

_GEMM_FLOPS = 2 * NUM_ROWS * WIDTH * VOCAB_SIZE
_LOGIT_BYTES = 2 * NUM_ROWS * VOCAB_SIZE
_OPERAND_BYTES = 2 * WIDTH * (NUM_ROWS + VOCAB_SIZE)
_WEIGHT_BYTES = 2 * WIDTH * VOCAB_SIZE


def peer_cases() -> list[CompileCase]:
    """Kernels that a training step of each peer launches besides library GEMMs.

    Raises:
        ImportError: a peer is not installed.
    """
    return [*_liger_cases(), *_cut_cross_entropy_cases()]


def _liger_cases() -> list[CompileCase]:
    from liger_kernel.ops import cross_entropy, grpo_loss

    grpo = {
        "TEMPERATURE": 1.0,
        "BETA": 0.02,
        "EPS_LOW": 0.2,
        "EPS_HIGH": 0.28,
        "LOSS_TYPE": 0,
        "SAPO_TEMP_POS": 1.0,
        "SAPO_TEMP_NEG": 1.05,
        "DELTA": 0.0,
        "USE_BIAS_CORRECTION_KL": False,
        "L": 1024,
        "N": VOCAB_SIZE,
        "BLOCK_N": 4096,
        "COMPLETION_MASK": None,
        "VLLM_IS_RATIO": None,
        "PHI_SEQ": None,
    }
    types = {"LOGITS": "*bf16", "DLOGITS": "*bf16", "INPUT_IDS": "*i64"}
    flags = ("HAS_WEIGHT", "HAS_SOFTCAPPING", "RETURN_Z_LOSS", "RETURN_TOKEN_ACCURACY")
    absent = ("weight_ptr", "z_loss_ptr", "token_accuracy_ptr", "predicted_tokens_ptr", "softcap")
    cross = dict.fromkeys((*flags, "RETURN_PREDICTED_TOKENS"), False) | dict.fromkeys(absent)
    cross |= {"BLOCK_SIZE": 32768, "HAS_GRADIENTS": True, "reduction": "mean"}
    cross |= {"lse_square_scale": 0.0, "label_smoothing": 0.0}
    rows = f"{NUM_ROWS} rows"
    return [
        _case("Liger grpo forward", grpo_loss._grpo_loss_fwd_kernel, types, grpo, 4, 1, rows),
        _case("Liger grpo backward", grpo_loss._grpo_loss_bwd_kernel, types, grpo, 4, 2, rows),
        _case(
            "Liger cross-entropy",
            cross_entropy.liger_cross_entropy_kernel,
            {"X_ptr": "*bf16", "Y_ptr": "*i64", "sum_non_ignore_weight": "fp32"}
            | {"weight_sum": "fp32"},
            cross,
            32,
            3,
            rows,
        ),
    ]


def _case(
    name: str,
    kernel: Any,
    types: dict[str, str],
    constants: dict[str, Any],
    num_warps: int,
    passes: int,
    grid: str,
) -> CompileCase:
    """A row kernel that goes over the bfloat16 logits `passes` times, reads and writes counted."""
    integers = ("stride", "n_cols", "n_non_ignore", "ignore_index", "STRIDE")
    pointers = {
        argument: "*fp32"
        for argument in kernel.arg_names
        if not any(word in argument for word in integers)
    }
    return compile_case(
        name,
        kernel,
        pointers | types,
        {key: value for key, value in constants.items() if key in kernel.arg_names},
        num_warps=num_warps,
        num_stages=3,
        grid=grid,
        hbm_bytes=passes * _LOGIT_BYTES,
    )


def _cut_cross_entropy_cases() -> list[CompileCase]:
    from cut_cross_entropy import cce_backward, cce_lse_forward

    forward = _undecorated(cce_lse_forward._cce_lse_forward_kernel)
    backward = _undecorated(cce_backward._cce_backward_kernel)
    shared = {"HAS_VALIDS": False, "HAS_SOFTCAP": False, "EVEN_D": True, "GROUP_B": 8}
    shared |= {"Valids": None, "softcap": None, "stride_ed": 1, "stride_cd": 1}
    forward_constants = shared | {"HAS_LA": False, "LA": None, "DOT_PRECISION": "ieee"}
    forward_constants |= {"BLOCK_B": 128, "BLOCK_V": 256, "BLOCK_D": 32, "stride_lse_b": 1}
    backward_constants = shared | {
        "BLOCK_B": 128,
        "BLOCK_V": 128,
        "BLOCK_D": 32,
        "MM_BACK_BLOCK_D": 64,
        "MM_BACK_EVEN_D": True,
        "ITEM_DO": False,
        "HAS_VOCAB_ORDERING": True,
        "FILTER_GRAD": True,
        "HAS_TARGETS": True,
        "SHIFT": False,
        "REQUIRES_GRAD": True,
    }
    types = dict.fromkeys(("E", "C", "dE", "dC"), "*bf16") | {"Targets": "*i64"}
    types |= dict.fromkeys(("LSE", "dOut"), "*fp32") | {"VocabOrdering": "*i64", "Locks": "*u32"}
    types |= {"dELocks": "*i32", "dCLocks": "*i32", "filter_eps": "fp32", "grad_scale": "fp32"}
    blocks = f"{NUM_ROWS // 128} x {VOCAB_SIZE // 128} tiles"
    return [
        compile_case(
            "CCE forward",
            forward,
            types,
            forward_constants,
            num_warps=8,
            num_stages=3,
            grid=blocks,
            flops=_GEMM_FLOPS,
            hbm_bytes=_OPERAND_BYTES,
        ),
        compile_case(
            "CCE backward",
            backward,
            types,
            backward_constants,
            num_warps=8,
            num_stages=4,
            grid=blocks,
            flops=3 * _GEMM_FLOPS,
            hbm_bytes=2 * _OPERAND_BYTES,
        ),
    ]


def _undecorated(kernel: Any) -> Any:
    """The `triton.jit` function under heuristics and autotuning."""
    while hasattr(kernel, "fn") and not hasattr(kernel, "params"):
        kernel = kernel.fn
    return kernel
