"""What the public functions promise beyond the loss's values, each promise as one check.

Figures are errors over what is allowed: 1 and less passes, `BROKEN` is a promise not kept.
"""

import math
import threading
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bench.gpu.checks import (
    BFLOAT16,
    BROKEN,
    DTYPES,
    FLOAT16,
    FLOAT32,
    Check,
    Figures,
    allowed_error,
    dtype_name,
    on_device,
)
from bench.gpu.section import Bench
from care_kernels import (
    VocabShard,
    care_loss,
    head_parameters,
    linear_log_probs,
    linear_policy_loss,
    rationale_distance,
    token_advantages,
)
from tests.kernels.cases import Case, error, head_case, policy_case, run_ours, run_reference
from tests.kernels.tolerances import FLOOR, SAME_MATHS, VALUE_FLOOR

# The largest error of a bfloat16 or float16 gradient relative to its largest entry.
_GRADIENT = {FLOAT32: 2e-5, BFLOAT16: 1e-2, FLOAT16: 3e-3}


def promises(dry: bool) -> list[Check]:
    """One check for each; a dry run leaves out what needs CUDA itself."""
    shape = (9, 32, 67) if dry else (96, 128, 2003)
    anywhere: tuple[Callable[[Bench, tuple[int, int, int]], Figures], ...] = (
        log_probs_and_entropies,
        weight_grad_buffers,
        skipped_rows_change_no_bit,
        frozen_parts_and_no_grad,
        any_layout,
        float32_head_under_bfloat16,
        small_float16_gradients,
        backward_scaled,
        anchored_exponentials,
        large_logits,
        head_of_a_module,
        care_loss_of_a_batch,
        spans_and_distances,
    )
    on_cuda = (
        target_outside_the_vocabulary,
        other_streams_and_threads,
        one_rank_shard,
        autocast,
        many_rows,
    )
    return [
        Check(function.__name__.replace("_", " "), function.__name__, _bound(function, shape))
        for function in (*anywhere, *(() if dry else on_cuda))
    ]


def _bound(
    function: Callable[[Bench, tuple[int, int, int]], Figures], shape: tuple[int, int, int]
) -> Callable[[Bench], Figures]:
    return lambda bench: function(bench, shape)


def _kept(promise: bool) -> float:
    return 0.0 if promise else BROKEN


def _gradient_error(got: Tensor, want: Tensor, dtype: torch.dtype) -> float:
    return error(got, want) / _GRADIENT[dtype]


def log_probs_and_entropies(bench: Bench, shape: tuple[int, int, int]) -> Figures:
    """`linear_log_probs` with entropies and the gradients of both; rows without gradient get 0."""
    figures: Figures = {}
    for dtype in DTYPES:
        case = on_device(head_case(*shape, dtype, bias=True), bench)
        generator = torch.Generator().manual_seed(5)
        upstream = torch.randn(2, shape[0], generator=generator).to(bench.device)
        upstream[:, ::3] = 0
        outcomes = []
        for kind in (dtype, torch.float64, FLOAT32):
            leaves = {
                name: case[name].detach().to(kind, copy=True).requires_grad_()
                for name in ("hidden", "head_weight", "bias")
            }
            if kind == dtype and not outcomes:
                log_probs, entropy = linear_log_probs(
                    **(case | leaves), return_entropy=True, temperature=0.9, chunk_rows=40
                )
            else:
                z = (leaves["hidden"] @ leaves["head_weight"].T + leaves["bias"]) / 0.9
                all_log_probs = z.log_softmax(-1)
                log_probs = all_log_probs.gather(1, case["target_ids"][:, None])[:, 0]
                entropy = -(all_log_probs.exp() * all_log_probs).sum(-1)
            (upstream[0] * log_probs + upstream[1] * entropy).sum().backward()
            outcomes.append((log_probs, entropy, leaves))
        ours, truth, eager = outcomes
        for index, what in enumerate(("log-probs", "entropy")):
            figures[f"{what} {dtype_name(dtype)}"] = allowed_error(
                ours[index], truth[index], eager[index], is_gradient=False
            )
        for name, leaf in ours[2].items():
            key = f"d {name} {dtype_name(dtype)}"
            figures[key] = _gradient_error(leaf.grad, truth[2][name].grad, dtype)
        figures[f"rows without gradient {dtype_name(dtype)}"] = _kept(
            not bool(ours[2]["hidden"].grad[::3].any())
        )
    return figures


def weight_grad_buffers(bench: Bench, shape: tuple[int, int, int]) -> Figures:
    """dW added to a buffer of any dtype, in one chunk and in several."""
    figures: Figures = {}
    for dtype in DTYPES:
        case = on_device(policy_case(*shape, dtype), bench)
        _, gradients = run_reference(case)
        want = 0.5 + gradients["head_weight"]
        for kind in DTYPES:
            for rows in (None, 20):
                buffer = torch.full_like(case["head_weight"], 0.5, dtype=kind)
                leaf = case["hidden"].clone().requires_grad_()
                changed = {"hidden": leaf, "weight_grad": buffer, "chunk_rows": rows}
                linear_policy_loss(**(case | changed)).loss.backward()
                # Each chunk rounds the buffer once.
                allowed = max(_GRADIENT[dtype], _GRADIENT[kind])
                key = f"{dtype_name(dtype)} into {dtype_name(kind)}, chunks of {rows}"
                figures[key] = error(buffer, want) / allowed
    return figures


def skipped_rows_change_no_bit(bench: Bench, shape: tuple[int, int, int]) -> Figures:
    """Rows without an advantage, whatever their targets, against a batch without them."""
    figures: Figures = {}
    for dtype in (BFLOAT16, FLOAT32):
        case = on_device(policy_case(*shape, dtype), bench)
        keep = case["advantages"] != 0
        wild = case | {"target_ids": torch.where(keep, case["target_ids"], -100)}
        rows = ("hidden", "target_ids", "advantages", "old_log_probs")
        alone = case | {name: case[name][keep] for name in rows}
        first, first_grads = run_ours(wild)
        second, second_grads = run_ours(alone)
        same = torch.equal(first.loss, second.loss)
        same &= torch.equal(first_grads["hidden"][keep], second_grads["hidden"])
        same &= torch.equal(first_grads["head_weight"], second_grads["head_weight"])
        figures[dtype_name(dtype)] = _kept(same and not bool(first_grads["hidden"][~keep].any()))
    return figures


def frozen_parts_and_no_grad(bench: Bench, shape: tuple[int, int, int]) -> Figures:
    """Only what requires a gradient gets one; without grad mode the loss is the same number."""
    case = on_device(policy_case(*shape, BFLOAT16), bench)
    whole, _ = run_ours(case)
    figures: Figures = {}
    for frozen in ("hidden", "head_weight"):
        _, gradients = run_ours(case, frozen=(frozen,))
        figures[f"{frozen} frozen"] = _kept(frozen not in gradients and len(gradients) == 1)
    with torch.no_grad():
        loss = linear_policy_loss(**case).loss
    figures["no_grad"] = error(loss, whole.loss, 1.0) / SAME_MATHS[FLOAT32]
    figures["no graph"] = _kept(not loss.requires_grad)
    return figures


def any_layout(bench: Bench, shape: tuple[int, int, int]) -> Figures:
    """Rows at odd addresses, a transposed weight, transposed hidden states."""
    figures: Figures = {}
    for dtype in (BFLOAT16, FLOAT32):
        case = on_device(policy_case(*shape, dtype), bench)
        hidden, weight = case["hidden"], case["head_weight"]
        wide = weight.new_full((weight.shape[0] + 1, weight.shape[1] + 3), math.nan)
        odd = wide[1:, 1 : weight.shape[1] + 1]
        odd.copy_(weight)
        layouts = {
            "odd addresses": {"head_weight": odd},
            "transposed weight": {"head_weight": weight.T.contiguous().T},
            "transposed hidden": {"hidden": hidden.T.contiguous().T},
        }
        oracle, wanted = run_reference(case)
        for name, layout in layouts.items():
            ours, gradients = run_ours(case | layout)
            key = f"{name} {dtype_name(dtype)}"
            figures[f"{key}, loss"] = error(ours.loss, oracle.loss, 1.0) / 1e-5
            for leaf, gradient in gradients.items():
                figures[f"{key}, d {leaf}"] = _gradient_error(gradient, wanted[leaf], dtype)
    return figures


def float32_head_under_bfloat16(bench: Bench, shape: tuple[int, int, int]) -> Figures:
    """Hidden states in bfloat16, the head in float32: nothing is rounded but dX."""
    case = on_device(policy_case(*shape, BFLOAT16), bench)
    case |= {"head_weight": case["head_weight"].float()}
    oracle, wanted = run_reference(case)
    ours, gradients = run_ours(case)
    return {
        "loss": error(ours.loss, oracle.loss, 1.0) / 1e-5,
        "d hidden": _gradient_error(gradients["hidden"], wanted["hidden"], BFLOAT16),
        "d head_weight": _gradient_error(gradients["head_weight"], wanted["head_weight"], BFLOAT16),
        "dtype of dW": _kept(gradients["head_weight"].dtype == FLOAT32),
    }


def small_float16_gradients(bench: Bench, shape: tuple[int, int, int]) -> Figures:
    """Advantages over a million tokens under a loss scale: dL/dz below 6e-8 must not vanish."""
    figures: Figures = {}
    for scale in (1e-3, 1e-6):
        case = on_device(policy_case(*shape, FLOAT16), bench)
        case |= {"advantages": case["advantages"] * scale}
        upstream = 65536.0 * 1e-3 / scale
        _, gradients = run_ours(case, upstream=upstream)
        _, wanted = run_reference(case)
        for name, gradient in gradients.items():
            figures[f"d {name}, advantages x {scale}"] = _gradient_error(
                gradient.double() / upstream, wanted[name], FLOAT16
            )
    return figures


def backward_scaled(bench: Bench, shape: tuple[int, int, int]) -> Figures:
    """With twice the upstream gradient: the same bits, doubled."""
    case = on_device(policy_case(*shape, BFLOAT16), bench)
    _, first = run_ours(case)
    _, doubled = run_ours(case, upstream=2.0)
    return {name: _kept(torch.equal(2 * first[name], doubled[name])) for name in first}


def anchored_exponentials(bench: Bench, shape: tuple[int, int, int]) -> Figures:
    """Exponentials relative to a log-normaliser up to 3 nats away: the same values and, but for one
    rounding more, the same gradients; NaN where it is over 60 away."""
    case = on_device(policy_case(*shape, BFLOAT16), bench)
    head = {name: case[name] for name in ("hidden", "head_weight", "target_ids")}
    _, now = linear_log_probs(**head, return_log_normalizer=True, backend=case.get("backend"))
    anchor = now + torch.linspace(-3, 3, len(now), device=now.device)
    plain, _ = run_ours(case)
    ours, gradients = run_ours(case | {"old_log_normalizer": anchor})
    _, wanted = run_reference(case)
    far, _ = run_ours(case | {"old_log_normalizer": now + 100})
    counted = case["advantages"] != 0
    figures = {
        "log-probs": error(ours.log_probs, plain.log_probs, 1.0) / SAME_MATHS[FLOAT32],
        "NaN beyond 60": _kept(bool(far.log_probs[counted].isnan().all())),
    }
    for name, gradient in gradients.items():
        figures[f"d {name}"] = _gradient_error(gradient, wanted[name], BFLOAT16)
    return figures


def large_logits(bench: Bench, shape: tuple[int, int, int]) -> Figures:
    """Logits of hundreds: log-probs as exact as float32 sums of such products are."""
    figures: Figures = {}
    for dtype in (BFLOAT16, FLOAT32):
        case = on_device(policy_case(*shape, dtype), bench)
        case |= {"hidden": case["hidden"] * 200}
        case.pop("old_log_probs")
        ours, gradients = run_ours(case | {"report_all_rows": True})
        logits = case["hidden"].double() @ case["head_weight"].double().T
        truth = logits.log_softmax(-1).gather(1, case["target_ids"][:, None])[:, 0]
        rounding = float(logits.abs().max()) * 2**-23
        off = float((ours.log_probs - truth).abs().max())
        figures[f"log-probs {dtype_name(dtype)}"] = off / (40 * rounding)
        finite = all(bool(gradient.isfinite().all()) for gradient in gradients.values())
        figures[f"finite gradients {dtype_name(dtype)}"] = _kept(finite)
    return figures


def head_of_a_module(bench: Bench, shape: tuple[int, int, int]) -> Figures:
    """`head_parameters` of a module: the log-probs of its own logits, gradients in its weight."""
    torch.manual_seed(0)
    module = nn.Linear(shape[1], shape[2], bias=True, device=bench.device, dtype=FLOAT32)
    hidden = torch.randn(shape[0], shape[1], device=bench.device)
    targets = torch.arange(shape[0], device=bench.device) % shape[2]
    weight, bias = head_parameters(module)
    ours = linear_log_probs(hidden, weight, targets, bias=bias, backend="triton")
    (ours_grad,) = torch.autograd.grad(ours.sum(), [module.weight])
    with torch.no_grad():
        logits = hidden.double() @ module.weight.double().T + module.bias.double()
    chosen = logits.log_softmax(-1)
    want = chosen.gather(1, targets[:, None])[:, 0]
    grad_logits = -chosen.exp()
    grad_logits[torch.arange(shape[0], device=bench.device), targets] += 1
    return {
        "log-probs": error(ours, want, 1.0) / (10 * VALUE_FLOOR[FLOAT32]),
        "d weight": _gradient_error(ours_grad, grad_logits.T @ hidden.double(), FLOAT32),
    }


def _batch(dry: bool) -> Case:
    generator = torch.Generator().manual_seed(2)
    num, length, width, vocab = (3, 10, 16, 40) if dry else (6, 50, 64, 1003)
    mask = (torch.arange(length) >= 2).expand(num, length)
    return {
        "hidden": torch.randn(num, length, width, generator=generator).to(BFLOAT16),
        "head_weight": (torch.randn(vocab, width, generator=generator) / 4).to(BFLOAT16),
        "token_ids": torch.randint(vocab, (num, length), generator=generator),
        "advantages": torch.randn(num, generator=generator) * (torch.arange(num) != 1),
        "think_spans": torch.tensor([[2, 5]]).repeat(num, 1),
        "answer_spans": torch.tensor([[5, 9]]).repeat(num, 1),
        "is_positive": torch.arange(num) % 2 == 0,
        "response_mask": mask,
        "ref_log_probs": torch.full((num, length), -3.0),
        "old_log_probs": torch.full((num, length), -3.1),
    }


def care_loss_of_a_batch(bench: Bench, shape: tuple[int, int, int]) -> Figures:
    """Eqs. 11-13 in one call against the torch code in float64."""
    batch = _batch(bench.dry)
    options = {"kl_coef": 0.1, "entropy_coef": 0.05, "think_weight": 0.3}
    results = []
    for device, dtype, backend in ((bench.device, BFLOAT16, "triton"), ("cpu", None, "torch")):
        case = {name: value.to(device) for name, value in batch.items()}
        leaves = [
            case[name].to(dtype or torch.float64, copy=True).requires_grad_()
            for name in ("hidden", "head_weight")
        ]
        rest = {name: value for name, value in case.items() if name not in _BATCH_LEAVES}
        out = care_loss(*leaves, **rest, **options, ratio_level="sequence", backend=backend)
        out.loss.backward()
        results.append((out, leaves))
    (ours, our_leaves), (truth, true_leaves) = results
    figures = {
        "loss": error(ours.loss.cpu(), truth.loss, 1.0) / 1e-4,
        "token advantages": error(ours.token_advantages.cpu(), truth.token_advantages) / 1e-6,
    }
    for name, ours_leaf, leaf in zip(_BATCH_LEAVES, our_leaves, true_leaves, strict=True):
        assert ours_leaf.grad is not None and leaf.grad is not None
        figures[f"d {name}"] = _gradient_error(ours_leaf.grad.cpu(), leaf.grad, BFLOAT16)
    return figures


_BATCH_LEAVES = ("hidden", "head_weight")


def spans_and_distances(bench: Bench, shape: tuple[int, int, int]) -> Figures:
    """Eq. 11 to the bit of the torch code; Eq. 4 in three dtypes."""
    batch = {name: value.to(bench.device) for name, value in _batch(bench.dry).items()}
    names = ("advantages", "think_spans", "answer_spans", "is_positive")
    spans, length = [batch[name] for name in names], batch["token_ids"].shape[1]
    ours, portable = (
        token_advantages(*spans, seq_len=length, backend=backend) for backend in ("triton", "torch")
    )
    figures = {"token advantages": _kept(torch.equal(ours, portable))}
    anchors = torch.zeros(len(batch["advantages"]), dtype=torch.long, device=bench.device)
    for dtype in DTYPES:
        hidden = batch["hidden"].to(dtype)
        got = rationale_distance(hidden, batch["think_spans"], anchors, backend="triton")
        means = hidden[:, 2:5].double().mean(1)
        want = 1 - nn.functional.cosine_similarity(means, means[:1].expand_as(means), dim=-1)
        figures[f"distance {dtype_name(dtype)}"] = error(got, want, 1.0) / 2e-6
    return figures


def target_outside_the_vocabulary(bench: Bench, shape: tuple[int, int, int]) -> Figures:
    """A wrong target shows: a NaN loss, or a ValueError, never another word's log-prob."""
    case = on_device(policy_case(*shape, BFLOAT16), bench)
    case["target_ids"][0], case["advantages"][0] = shape[2], 1.0
    try:
        return {"loss": _kept(bool(linear_policy_loss(**case).loss.isnan()))}
    except ValueError:
        return {"loss": 0.0}


def other_streams_and_threads(bench: Bench, shape: tuple[int, int, int]) -> Figures:
    """The same bits on a stream of its own and in another thread."""
    case = on_device(policy_case(*shape, BFLOAT16), bench)
    _, first = run_ours(case)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        _, streamed = run_ours(case)
    stream.synchronize()
    threaded: list[dict[str, Tensor]] = []
    thread = threading.Thread(target=lambda: threaded.append(run_ours(case)[1]))
    thread.start()
    thread.join()
    torch.cuda.synchronize()
    others = {"stream": streamed, "thread": threaded[0]}
    return {
        where: _kept(all(torch.equal(first[name], got[name]) for name in first))
        for where, got in others.items()
    }


def one_rank_shard(bench: Bench, shape: tuple[int, int, int]) -> Figures:
    """A vocabulary shard that is the whole vocabulary, over NCCL."""
    case = on_device(policy_case(*shape, BFLOAT16), bench)
    whole, wanted = run_ours(case)
    device = torch.device("cuda", 0)
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1, device_id=device)
    try:
        group = dist.group.WORLD
        assert group is not None
        ours, gradients = run_ours(case | {"vocab_shard": VocabShard(group, 0, shape[2])})
        figures = {"loss": error(ours.loss, whole.loss, 1.0) / SAME_MATHS[FLOAT32]}
        for name, gradient in gradients.items():
            figures[f"d {name}"] = error(gradient, wanted[name]) / SAME_MATHS[BFLOAT16]
    finally:
        dist.destroy_process_group()
    return figures


def autocast(bench: Bench, shape: tuple[int, int, int]) -> Figures:
    """Float32 weights under bfloat16 autocast, TRL's default: finite, near the exact gradients."""
    case = on_device(policy_case(*shape, FLOAT32), bench)
    _, wanted = run_reference(case)
    with torch.autocast("cuda", BFLOAT16):
        ours, gradients = run_ours(case)
    figures = {"finite": _kept(bool(ours.loss.isfinite()))}
    for name, gradient in gradients.items():
        figures[f"d {name}"] = error(gradient, wanted[name]) / (4 * _GRADIENT[BFLOAT16])
    return figures


def many_rows(bench: Bench, shape: tuple[int, int, int]) -> Figures:
    """More rows than a grid's second axis holds, int32 targets."""
    case = on_device(head_case(70_001, 16, 50, BFLOAT16), bench)
    case |= {"target_ids": case["target_ids"].int(), "chunk_rows": 70_001}
    ours = linear_log_probs(**case)
    logits = case["hidden"].double() @ case["head_weight"].double().T
    want = logits.log_softmax(-1).gather(1, case["target_ids"].long()[:, None])[:, 0]
    return {"log-probs": error(ours, want, 1.0) / (10 * FLOOR[FLOAT32])}
