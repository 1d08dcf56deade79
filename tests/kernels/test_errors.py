"""Wrong arguments: ValueError that names the argument, what came and what was wanted."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from care_kernels import (
    CareLoss,
    Cispo,
    Clip,
    Sapo,
    VocabShard,
    care_loss,
    linear_log_probs,
    linear_policy_loss,
    rationale_distance,
    token_advantages,
)
from tests.kernels.cases import batch_case, policy_case

CASE = policy_case() | {"advantages": torch.ones(63)}
HEAD_CASE = {name: CASE[name] for name in ("hidden", "head_weight", "target_ids")}
ROWS = torch.zeros(63)
EMPTY_ROWS = torch.zeros(5, 14)
FALSE = EMPTY_ROWS.bool()
SPANS = torch.tensor([[0, 1], [2, 5]])


def ints(*shape: int) -> torch.Tensor:
    return torch.zeros(*shape, dtype=torch.int64)


def shard_of(start: int, vocab_size: int) -> VocabShard:
    """A part that is refused before its group is asked anything."""
    return VocabShard(None, start, vocab_size)  # pyright: ignore[reportArgumentType]


class Shards(torch.Tensor):
    """As a DTensor of FSDP2, which other operations would refuse to mix with plain tensors."""

    full_tensor = None


def row(message: str, **arguments: Any) -> tuple[dict[str, Any], str]:
    """Arguments and the error they bring."""
    return arguments, message


HEAD = (
    row("head_weight: got shape (211, 15); wanted (V, 16)", head_weight=torch.zeros(211, 15)),
    row("head_weight: got shape (0, 16); wanted V >= 1", head_weight=torch.zeros(0, 16)),
    row("head_weight: got a DTensor; wanted", head_weight=torch.zeros(211, 16).as_subclass(Shards)),
    row("target_ids: got ids from 211 to 211; wanted 0 to 210", target_ids=ints(63) + 211),
    row("bias: got -inf at 0; wanted finite numbers", bias=torch.full((211,), -torch.inf)),
    row("vocab_shard: got rows -1 to 210; wanted them within", vocab_shard=shard_of(-1, 300)),
    row("vocab_shard: got rows 100 to 311; wanted", vocab_shard=shard_of(100, 300)),
)
TRANSFORM = (
    row("temperature: got 0.0; wanted a Python number above 0", temperature=0.0),
    row("temperature: got a Tensor; wanted a Python number above 0", temperature=torch.ones(())),
    row("logit_softcap: got -1.0; wanted None or a number above 0", logit_softcap=-1.0),
    row("logit_scale: got nan; wanted a finite number", logit_scale=float("nan")),
    row("chunk_rows: got 2.5; wanted None or an int of at least 1", chunk_rows=2.5),
    row("backend: got 'cuda'; wanted None, 'triton' or 'torch'", backend="cuda"),
)
LOSS = (
    row("surrogate: got 0.2; wanted a Clip, a Cispo or a Sapo", surrogate=0.2),
    row("ratio_level: got 'word'; wanted one of", ratio_level="word"),
    row("kl_estimator: got 'k4'; wanted one of", kl_estimator="k4"),
)
KL = {"kl_weights": ROWS}
EXACT = KL | {"kl_estimator": "exact"}
WEIGHT, REF = torch.zeros(211, 16), torch.zeros(63, 12)
GRAD_WEIGHT = WEIGHT.clone().requires_grad_()
POLICY = (
    row("backend: got 'triton' for tensors on cpu", backend="triton"),
    row("advantages: got shape (63, 1); wanted (63,)", advantages=torch.zeros(63, 1)),
    row("importance_weights: got a minimum of -1.0; wanted 0", importance_weights=ROWS - 1),
    row("sequence_ids: got None; wanted [N] ids", ratio_level="sequence"),
    row("kl_weights: got None; wanted [N] weights", ref_log_probs=ROWS),
    row("ref_log_probs: got neither of ref_log_probs and ref_hidden", **KL),
    row("ref_log_probs: got both of", **KL, ref_log_probs=ROWS, ref_hidden=torch.zeros(63, 16)),
    row("ref_log_probs: got a tensor; wanted None", **EXACT, ref_hidden=REF, ref_log_probs=ROWS),
    row("ref_hidden: got None; wanted [N, D], for kl_estimator 'exact'", **EXACT),
    row("ref_hidden: got None; wanted [N, D], as ref_head_weight", **KL, ref_head_weight=WEIGHT),
    row("ref_hidden: got shape (63, 12); wanted (63, 16)", **KL, ref_hidden=REF),
    row("ref_head_weight: got shape (5, 12)", **KL, ref_hidden=REF, ref_head_weight=REF[:5]),
    row("weight_grad: got shape (16, 211); wanted (211, 16)", weight_grad=WEIGHT.T),
    row("weight_grad: got a tensor that requires grad", weight_grad=GRAD_WEIGHT),
)

CLIP = (
    row("Clip.low: got -0.1; wanted 0 or more", low=-0.1),
    row("Clip.high: got nan; wanted 0 or more", high=float("nan")),
    row("Clip.dual: got 1.0; wanted None or more than 1", dual=1.0),
)
CISPO = (row("Cispo.min_ratio, max_ratio: got 0.8, 0.5; wanted", max_ratio=0.5, min_ratio=0.8),)
SAPO = (row("Sapo.positive_temperature: got 0.0; wanted more than 0", positive_temperature=0.0),)

MISSPELT = row("options: got 'kl_coeff'; wanted some of temperature", kl_coeff=0.1)
CARE_OPTIONS = (
    row("kl_coef: got -0.1; wanted 0 or more", kl_coef=-0.1),
    row("think_weight: got -1.0", think_weight=-1.0),
    row("weight_eps: got 0.0", weight_eps=0.0),
)
CARE_KL, CARE_REF = {"kl_coef": 0.1}, torch.zeros(5, 14, 8)
CARE = (
    row("token_ids: got 23 at token 3 of row 0; wanted 0 to 22", token_ids=ints(5, 14) + 23),
    row("answer_spans: got [15, 15] at row 0; wanted", answer_spans=ints(5, 2) + 15),
    row("response_mask: got token 0 of row 0; wanted token 1 or later", response_mask=~FALSE),
    row("response_mask: got False at token 4 of row 0; wanted True", response_mask=FALSE),
    row(
        "think_spans, answer_spans: got token 0 of row 0; wanted token 1 or later",
        response_mask=None,
        answer_spans=torch.tensor([[0, 3]] * 5),
    ),
    row("response_mask: got None; wanted [B, T]", response_mask=None, entropy_coef=0.1),
    row("response_mask: got None; wanted", response_mask=None, ratio_level="sequence"),
    row("ref_log_probs: got neither of ref_log_probs and ref_hidden; wanted", **CARE_KL),
    row("ref_log_probs: got both", **CARE_KL, ref_log_probs=EMPTY_ROWS, ref_hidden=CARE_REF),
    row("kl_coef: got 0.0; wanted more than 0, as a reference", ref_log_probs=EMPTY_ROWS),
    row("ref_hidden: got None; wanted", **CARE_KL, kl_estimator="exact", ref_log_probs=EMPTY_ROWS),
    row("ref_hidden: got None; wanted", ref_head_weight=torch.zeros(23, 8)),
    row("ref_hidden: got shape (5, 14, 7)", **CARE_KL, ref_hidden=CARE_REF[..., 1:]),
    row("num_sequences: got -1.0; wanted more than 0", num_sequences=torch.tensor(-1.0)),
    row("num_sequences: got shape (1,); wanted ()", num_sequences=torch.ones(1)),
    row("num_sequences: got device meta; wanted cpu", num_sequences=torch.ones((), device="meta")),
)

BATCH = {
    "advantages": torch.ones(2),
    "think_spans": SPANS,
    "answer_spans": SPANS,
    "is_positive": torch.tensor([True, False]),
    "seq_len": 5,
}


def packed(*ends: int) -> dict[str, Any]:
    return {"seq_len": None, "cu_seqlens": torch.tensor(ends)}


TOKEN_ADVANTAGES = (
    row("think_spans: got [3, 6] at row 1; wanted 0 <= start <= end <= 5", think_spans=SPANS + 1),
    row("think_spans: got [1, 0] at row 0; wanted 0 <= start <= end", think_spans=SPANS.flip(1)),
    row("answer_spans: got [-1, 0] at row 0", answer_spans=SPANS - 1),
    row("think_spans: got [2, 5] at row 1; wanted 0 <= start <= end <= 4", **packed(0, 5, 9)),
    row("seq_len: got neither of seq_len and cu_seqlens; wanted exactly one", seq_len=None),
    row("seq_len: got both of", **packed(0, 5, 10) | {"seq_len": 5}),
    row("seq_len: got 2.5; wanted None or an int of at least 0", seq_len=2.5),
    row("total_tokens: got 24.0; wanted None or an int", **packed(0, 5, 10), total_tokens=24.0),
    row("total_tokens: got 24; wanted None without cu_seqlens", total_tokens=24),
    row("cu_seqlens: got 10 at row 2; wanted at most 9", **packed(0, 5, 10), total_tokens=9),
    row("cu_seqlens: got shape (2,); wanted (3,)", **packed(0, 5)),
    row("cu_seqlens: got 1 at row 0; wanted 0", **packed(1, 5, 10)),
    row("cu_seqlens: got 4 at row 2; wanted at least 5", **packed(0, 5, 4)),
)

STATES = {"hidden": torch.zeros(2, 5, 4), "think_spans": SPANS, "anchors": ints(2)}
PACKED_STATES = {"hidden": torch.zeros(10, 4), "cu_seqlens": torch.tensor([0, 4, 10])}
DISTANCE = (
    row("hidden: got shape (10, 4); wanted (B, T, D)", hidden=torch.zeros(10, 4)),
    row("hidden: got shape (2, 5, 4); wanted (N, D)", cu_seqlens=torch.tensor([0, 4, 10])),
    row("hidden: got a meta tensor", hidden=torch.zeros(2, 5, 4, device="meta")),
    row("think_spans: got [3, 6] at row 1; wanted 0 <= start <= end <= 5", think_spans=SPANS + 1),
    row(
        "think_spans: got [1, 5] at row 0; wanted 0 <= start <= end <= 4",
        **PACKED_STATES,
        think_spans=torch.tensor([[1, 5], [0, 1]]),
    ),
    row("anchors: got 2 at row 0; wanted 0 to 1", anchors=ints(2) + 2),
    row("cu_seqlens: got shape (0,)", **PACKED_STATES | {"cu_seqlens": ints(0)}),
    row("cu_seqlens: got 11 at row 2", **PACKED_STATES | {"cu_seqlens": torch.tensor([0, 4, 11])}),
    row("backend: got 'cuda'", backend="cuda"),
)


def refuses(function: Callable[..., Any], arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as refusal:
        function(**arguments)
    assert message in str(refusal.value)


TENSORS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "policy loss": (
        linear_policy_loss,
        CASE
        | {name: ROWS for name in ("importance_weights", "entropy_weights", "kl_weights")}
        | {"ref_log_probs": ROWS, "sequence_ids": ints(63), "weight_grad": WEIGHT},
    ),
    "log-probs": (linear_log_probs, HEAD_CASE | {"bias": torch.zeros(211)}),
    "care_loss": (care_loss, batch_case() | {"importance_weights": EMPTY_ROWS}),
    "token_advantages": (token_advantages, BATCH),
    "rationale_distance": (rationale_distance, STATES),
}


@pytest.mark.parametrize(
    ("of", "name"),
    [(of, n) for of, (_, case) in TENSORS.items() for n in case if torch.is_tensor(case[n])],
)
def test_every_tensor(of: str, name: str) -> None:
    """Of another rank or dtype, on another device than the first one, or no tensor at all."""
    function, case = TENSORS[of]
    for value, got in (
        (torch.zeros(1, 1, 1, 1), "shape (1, 1, 1, 1)"),
        (case[name].to(torch.complex64), "dtype torch.complex64"),
        ([0], "a list; wanted a tensor"),
    ):
        refuses(function, case | {name: value}, f"{name}: got {got}")
    if name not in ("hidden", "advantages"):
        refuses(function, case | {name: case[name].to("meta")}, f"{name}: got device meta")


TABLES: dict[str, tuple[Callable[..., Any], dict[str, Any], tuple[Any, ...]]] = {
    "linear_policy_loss": (linear_policy_loss, CASE, (*HEAD, *TRANSFORM, *LOSS, *POLICY)),
    "linear_log_probs": (linear_log_probs, HEAD_CASE, (*HEAD, *TRANSFORM)),
    "care_loss": (care_loss, batch_case(), (*CARE_OPTIONS, *TRANSFORM, *LOSS, *CARE)),
    # A wrong option is refused where it is set, not at the first step; a misspelt one too.
    "CareLoss": (CareLoss, {}, (*CARE_OPTIONS, *TRANSFORM, *LOSS, MISSPELT)),
    "token_advantages": (token_advantages, BATCH, TOKEN_ADVANTAGES),
    "rationale_distance": (rationale_distance, STATES, DISTANCE),
    "Clip": (Clip, {}, CLIP),
    "Cispo": (Cispo, {}, CISPO),
    "Sapo": (Sapo, {}, SAPO),
}


@pytest.mark.parametrize("name", TABLES)
def test_refused(name: str) -> None:
    """Every argument that does not fit is refused by name, with the token and the row."""
    function, right, table = TABLES[name]
    for wrong, message in table:
        refuses(function, right | wrong, message)


def test_meta_tensors() -> None:
    """A tensor without numbers has no loss: an error, not a tensor of nothing."""
    meta = {name: value.to("meta") for name, value in HEAD_CASE.items()}
    message = "hidden: got a meta tensor, which holds no numbers"
    refuses(linear_log_probs, meta, message)
    refuses(linear_policy_loss, meta | {"advantages": ROWS.to("meta")}, message)


def test_second_derivatives() -> None:
    """The backward is not differentiable: asking for it is an error, not a zero."""
    hidden = CASE["hidden"].clone().requires_grad_()
    for loss in (
        linear_policy_loss(**(CASE | {"hidden": hidden})).loss,
        linear_log_probs(**(HEAD_CASE | {"hidden": hidden})).sum(),
    ):
        with pytest.raises(ValueError, match="got create_graph=True; wanted False"):
            torch.autograd.grad(loss, hidden, create_graph=True)
