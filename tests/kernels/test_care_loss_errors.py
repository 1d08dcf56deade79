"""What `care_loss` and `CareLoss` refuse, by name."""

import pytest
import torch

from care_kernels.care_loss import CareLoss, care_loss
from tests.kernels.care_cases import B, Case, D, T, V, make_case

WRONG_OPTIONS: tuple[tuple[Case, str], ...] = (
    ({"kl_coef": -0.1}, "kl_coef: got -0.1; wanted 0 or more"),
    ({"kl_estimator": "k4"}, "kl_estimator: got 'k4'; wanted"),
    ({"ratio_level": "word"}, "ratio_level: got 'word'; wanted"),
    ({"think_weight": -1.0}, "think_weight: got -1.0"),
    ({"weight_eps": 0.0}, "weight_eps: got 0.0"),
    ({"surrogate": (0.2, 0.28)}, r"surrogate: got \(0.2, 0.28\); wanted a Clip"),
    ({"temperature": 0.0}, "temperature: got 0.0"),
    ({"logit_softcap": 0.0}, "logit_softcap: got 0.0"),
    ({"chunk_rows": 0}, "chunk_rows: got 0"),
    ({"kl_coef": float("nan")}, "kl_coef: got nan"),
    ({"backend": "cuda"}, "backend: got 'cuda'"),
)

FALSE = torch.zeros(B, T, dtype=torch.bool)

WRONG: tuple[tuple[Case, str], ...] = (
    *WRONG_OPTIONS,
    ({"hidden": torch.zeros(B * T, D)}, r"hidden: got .*; wanted \(any, any, any\)"),
    ({"head_weight": torch.zeros(V, D + 1)}, r"head_weight: got .*; wanted \(any, 8\)"),
    ({"token_ids": torch.zeros(B, T - 1, dtype=torch.int64)}, r"token_ids: .*; wanted \(5, 14\)"),
    ({"token_ids": torch.zeros(B, T)}, "token_ids: got dtype torch.float32"),
    (
        {"token_ids": torch.full((B, T), V)},
        "token_ids: got 23 at token 3 of row 0; wanted 0 to 22",
    ),
    ({"advantages": torch.zeros(B, T)}, r"advantages: got shape \(5, 14\); wanted \(5,\)"),
    ({"think_spans": torch.zeros(B, 3, dtype=torch.int64)}, r"think_spans: .*; wanted \(5, 2\)"),
    ({"answer_spans": torch.full((B, 2), 15)}, r"answer_spans: got \[15, 15\] at row 0; wanted"),
    ({"is_positive": torch.zeros(B)}, "is_positive: got dtype torch.float32"),
    ({"response_mask": FALSE[:, 1:]}, r"response_mask: got .*; wanted \(5, 14\)"),
    ({"response_mask": FALSE.float()}, "response_mask: got dtype torch.float32"),
    ({"response_mask": ~FALSE}, "response_mask: got token 0 of row 0; wanted token 1 or later"),
    (
        {"response_mask": FALSE},
        "response_mask: got False at token 4 of row 0; wanted True, as a span",
    ),
    (
        {"response_mask": None, "answer_spans": torch.tensor([[0, 3]] * B)},
        "think_spans, answer_spans: got token 0 of row 0; wanted token 1 or later",
    ),
    ({"response_mask": None, "entropy_coef": 0.1}, r"response_mask: got None; wanted \[B, T\]"),
    ({"response_mask": None, "ratio_level": "sequence"}, "response_mask: got None"),
    ({"old_log_probs": torch.zeros(B * T)}, r"old_log_probs: got .*; wanted \(5, 14\)"),
    ({"old_log_probs": FALSE}, "old_log_probs: got dtype torch.bool"),
    ({"importance_weights": torch.zeros(B)}, r"importance_weights: got .*; wanted \(5, 14\)"),
    ({"importance_weights": FALSE.float() - 1}, "importance_weights: got a minimum of -1.0"),
    ({"kl_coef": 0.1}, "ref_log_probs: got neither of ref_log_probs and ref_hidden; wanted"),
    (
        {"kl_coef": 0.1, "ref_log_probs": FALSE.float(), "ref_hidden": torch.zeros(B, T, D)},
        "ref_log_probs: got both of ref_log_probs and ref_hidden; wanted exactly one",
    ),
    ({"ref_log_probs": FALSE.float()}, "kl_coef: got 0.0; wanted more than 0, as a reference"),
    (
        {"kl_coef": 0.1, "kl_estimator": "exact", "ref_log_probs": FALSE.float()},
        "ref_hidden: got None; wanted .* for kl_estimator 'exact'",
    ),
    ({"ref_head_weight": torch.zeros(V, D)}, "ref_hidden: got None; wanted"),
    (
        {"kl_coef": 0.1, "ref_hidden": torch.zeros(B, T, D + 1)},
        r"ref_hidden: got .*; wanted \(5, 14, 8\)",
    ),
    (
        {"kl_coef": 0.1, "ref_head_weight": torch.zeros(V - 1, D), "ref_hidden": FALSE},
        r"ref_head_weight: got .*; wanted \(23, any\)",
    ),
    ({"num_sequences": 0}, "num_sequences: got 0.0; wanted more than 0"),
    ({"num_sequences": torch.tensor(-1.0)}, "num_sequences: got -1.0; wanted more than 0"),
    ({"num_sequences": torch.ones(1)}, r"num_sequences: got shape \(1,\); wanted \(\)"),
)


@pytest.mark.parametrize(("wrong", "message"), WRONG)
def test_refuses(wrong: Case, message: str) -> None:
    """Every argument that does not fit is refused by name."""
    with pytest.raises(ValueError, match=message):
        care_loss(**(make_case() | wrong))


@pytest.mark.parametrize(("wrong", "message"), WRONG_OPTIONS)
def test_module_refuses(wrong: Case, message: str) -> None:
    """A wrong option is refused where it is set, not at the first step."""
    with pytest.raises(ValueError, match=message):
        CareLoss(**wrong)


def test_module_knows_its_options() -> None:
    """A misspelt option is refused too."""
    with pytest.raises(ValueError, match="options: got 'kl_coeff'; wanted some of temperature"):
        CareLoss(kl_coeff=0.1)
