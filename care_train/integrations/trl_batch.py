"""S* in the rows of TRL's generation batch, and a micro-batch of it as rows of Eqs. 12-13.

A batch is the dict that `GRPOTrainer._generate_and_score_completions` returns in TRL 1.16: prompts
[B, P] padded on the left, completions [B, T] padded on the right, model inputs beside them.
`trainer` is a `care_train.integrations.trl.CareGRPOTrainer`.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from trl.trainer.utils import split_pixel_values_by_grid, unsplit_pixel_values_by_grid

from care_kernels.integrations.trl import PolicyTerms, terms_of
from care_train.algorithm.region_weights import spread_advantages
from care_train.algorithm.types import GroupUpdate, Rollout, RolloutGroup, TrainSequence
from care_train.integrations.trl_rollouts import completion_log_probs, largest, reference_log_probs

_TYPE_IDS = ("token_type_ids", "mm_token_type_ids")


def training_batch(
    trainer: Any,
    batch: dict[str, Any],
    groups: Sequence[RolloutGroup],
    updates: Sequence[GroupUpdate],
    sampling_log_probs: Mapping[int, Sequence[float | None]],
) -> dict[str, Any]:
    """TRL's `batch` with the reflections in it, and what `policy_terms` reads.

    `advantages` [B, T] are Eq. 11's a_it, `kl_shares` [B] one over a trained sequence's length, 0
    elsewhere, and `num_trained` |S*| of all processes. `groups` are in the order of the rows;
    `sampling_log_probs` are vLLM's of a group's reflection, by the group's place.
    """
    size = trainer.num_generations
    trained = [
        (place * size + row, sequence)
        for place, (group, update) in enumerate(zip(groups, updates, strict=True))
        for row, sequence in placed(group, update)
    ]
    batch = _with_reflections(trainer, dict(batch), trained, sampling_log_probs)
    advantages = torch.zeros(batch["completion_ids"].shape, dtype=torch.float32)
    shares, sampled = torch.zeros(2, len(advantages), dtype=torch.float32)
    for row, sequence in trained:
        length = len(sequence.rollout.token_ids)
        advantages[row, :length] = spread_advantages([sequence])
        shares[row] = 1 / length
        if not sequence.rollout.reflected:
            sampled[row] = sequence.advantage
    device = batch["completion_ids"].device
    # TRL's table of completions shows these in place of GRPO's: it keeps a generation batch.
    trainer._logs["advantages"].extend(trainer.accelerator.gather(sampled.to(device)).tolist())
    count = torch.tensor(len(trained), device=device)
    return batch | {
        "advantages": advantages.to(device),
        "kl_shares": shares.to(device),
        "num_trained": trainer.accelerator.gather(count).sum(),
    }


def policy_terms(trainer: Any, inputs: Mapping[str, Any]) -> PolicyTerms:
    """One micro-batch's rows of Eqs. 12-13, divided by |S*| of the optimiser step."""
    mask = inputs["completion_mask"]
    # |S*| counts a generation batch of all processes. An optimiser step is a part of it, and the
    # processes' gradients are averaged, not summed: as TRL has it for its token mean.
    windows = trainer.args.steps_per_generation / trainer.current_gradient_accumulation_steps
    scale = windows * trainer.accelerator.num_processes / inputs["num_trained"].clamp(min=1)
    advantages = inputs["advantages"] * mask * scale
    if "importance_sampling_ratio" in inputs:
        advantages = advantages * inputs["importance_sampling_ratio"]
    shares = inputs["kl_shares"][:, None] * mask * scale
    return terms_of(trainer, inputs, mask, advantages, shares, trainer.entropy_coef * shares)


def _with_reflections(
    trainer: Any,
    batch: dict[str, Any],
    trained: Sequence[tuple[int, TrainSequence]],
    sampling_log_probs: Mapping[int, Sequence[float | None]],
) -> dict[str, Any]:
    """Put the reflected rollouts into their rows, with what the loss needs of them."""
    reflected = [(row, s.rollout) for row, s in trained if s.rollout.reflected]
    count = largest(trainer, len(reflected))
    if count == 0:
        return batch
    prompt_ids, filler = trainer.sampled_prompt_ids, trainer._tokenizer.pad_token_id
    contexts = [len(prompt_ids[row]) + len(rollout.prefix_ids) for row, rollout in reflected]
    lengths = [len(rollout.token_ids) for _, rollout in reflected]
    batch = widened(batch, max(contexts, default=0), max(lengths, default=0), filler)
    for row, rollout in reflected:
        sampling = sampling_log_probs.get(row // trainer.num_generations)
        put(batch, row, prompt_ids[row], rollout, filler, sampling)
    rows = [row for row, _ in reflected]
    # A forward is a collective call where parameters are sharded: all processes run as many rows.
    some = picked(batch, [*rows, *[0] * (count - len(rows))])
    if "old_per_token_logps" in batch:
        old = completion_log_probs(trainer, trainer.model, some)
        batch["old_per_token_logps"][rows] = old[: len(rows)]
        if "importance_sampling_ratio" in batch:
            gap = (old - some["sampling_per_token_logps"]) * some["completion_mask"]
            ratio = _bounded_ratio(trainer, torch.nan_to_num(gap, nan=0.0))
            batch["importance_sampling_ratio"][rows] = ratio[: len(rows)]
    if "ref_per_token_logps" in batch:
        reference = reference_log_probs(trainer, some)
        batch["ref_per_token_logps"][rows] = reference[: len(rows)]
    return batch


def _bounded_ratio(trainer: Any, gap: Tensor) -> Tensor:
    """pi_trainer / pi_vllm from log-prob differences [B, T], bounded as TRL's setting says.

    [B, T], or [B, 1] of whole sequences. Source: `vllm_importance_sampling_mode` in TRL 1.16's
    `_generate_and_score_completions`.
    """
    mode = trainer.vllm_importance_sampling_mode
    low = trainer.vllm_importance_sampling_clip_min or 0.0
    high = trainer.vllm_importance_sampling_clip_max or math.inf
    if mode.startswith("sequence"):
        gap = gap.sum(-1, keepdim=True)
    ratio = gap.exp()
    bounded = ratio.clamp(min=low, max=high)
    return bounded if mode.endswith("truncate") else ratio.where(bounded == ratio, 0.0)


def placed(group: RolloutGroup, update: GroupUpdate) -> list[tuple[int, TrainSequence]]:
    """Each trained sequence's row in its group: its own, or for the reflected one a free one."""
    index = {rollout: i for i, rollout in enumerate(group.rollouts)}
    own = [(index[s.rollout], s) for s in update.sequences if not s.rollout.reflected]
    taken = {i for i, _ in own}
    free = (i for i in reversed(range(len(group.rollouts))) if i not in taken)
    return own + [(next(free), s) for s in update.sequences if s.rollout.reflected]


def widened(batch: dict[str, Any], prompt: int, completion: int, filler: int) -> dict[str, Any]:
    """The batch with at least `prompt` columns before the completions and `completion` behind."""
    more_prompt = max(prompt - batch["prompt_ids"].shape[1], 0)
    more_completion = max(completion - batch["completion_ids"].shape[1], 0)
    left, right = (more_prompt, 0), (0, more_completion)
    paddings: dict[str, tuple[tuple[int, int], float]] = {
        "prompt_ids": (left, filler),
        "prompt_mask": (left, 0),
        "completion_ids": (right, filler),
        "completion_mask": (right, 0),
        "old_per_token_logps": (right, 0),
        "ref_per_token_logps": (right, 0),
        "sampling_per_token_logps": (right, 0),
        **dict.fromkeys(_TYPE_IDS, ((more_prompt, more_completion), 0)),
    }
    ratio = batch.get("importance_sampling_ratio")
    if ratio is not None and ratio.shape[1] > 1:
        paddings["importance_sampling_ratio"] = (right, 1)
    return batch | {
        name: pad(batch[name], sides, value=value)
        for name, (sides, value) in paddings.items()
        if name in batch
    }


def put(
    batch: dict[str, Any],
    row: int,
    prompt_ids: Sequence[int],
    rollout: Rollout,
    filler: int,
    sampling_log_probs: Sequence[float | None] | None = None,
) -> None:
    """Overwrite, in place, a row of a rollout of the same prompt, whose images stay.

    `prompt_ids` and the rollout's prefix stand before its tokens; `filler` pads a row that is wide
    enough.
    """
    context = [*prompt_ids, *rollout.prefix_ids]
    width, start = batch["prompt_ids"].shape[1], batch["prompt_ids"].shape[1] - len(context)
    for name in _TYPE_IDS:
        if name in batch:
            # The images' places in the prompt move with it; what is forced behind it is text.
            kinds = batch[name][row, width - len(prompt_ids) : width].clone()
            batch[name][row] = 0
            batch[name][row, start : start + len(prompt_ids)] = kinds
    length = len(rollout.token_ids)
    for side, ids, inside in (
        ("prompt", context, slice(start, None)),
        ("completion", rollout.token_ids, slice(0, length)),
    ):
        batch[f"{side}_ids"][row] = filler
        batch[f"{side}_ids"][row, inside] = torch.tensor(ids, device=batch["prompt_ids"].device)
        batch[f"{side}_mask"][row] = 0
        batch[f"{side}_mask"][row, inside] = 1
    if sampling_log_probs is not None:
        known = [float("nan") if value is None else value for value in sampling_log_probs]
        into = batch["sampling_per_token_logps"]
        into[row] = 0
        into[row, :length] = torch.tensor(known, device=into.device)


def picked(batch: Mapping[str, Any], rows: list[int]) -> dict[str, Any]:
    """Some rows of a batch, with their images."""
    chosen = {}
    for name, value in split_pixel_values_by_grid(dict(batch)).items():
        if isinstance(value, Tensor):
            chosen[name] = value[rows] if value.ndim else value
        elif value is not None:
            chosen[name] = [value[row] for row in rows]
    return unsplit_pixel_values_by_grid(chosen)
