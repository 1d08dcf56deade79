"""What TRL sampled as Algorithm 1's rollouts, and reflections through TRL's own generation.

`trainer` is a `care_train.integrations.trl.CareGRPOTrainer` in the middle of making a batch.
Shape letters: B sequences of this process, P prompt positions, T completion tokens, D hidden.
"""

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from trl import GRPOTrainer
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import use_adapter

from care_kernels import pool_rationale
from care_kernels.integrations.trl import base_model
from care_train.algorithm.selection import pairwise_distances, reflection_prefix
from care_train.algorithm.spans import parse_spans, rationale_span, token_spans
from care_train.algorithm.types import GroupUpdate, Rollout, RolloutGroup, Subgroup
from care_train.models.prompts import encode_text
from care_train.verifier import format_score

MODEL_INPUTS = tuple(inspect.signature(GRPOTrainer._get_per_token_logps_and_entropies).parameters)
"""Names of TRL's arguments for log-probs: those that a batch has are the model's inputs beside ids
and masks."""


def mend_vllm(trainer: Any) -> None:
    """Let TRL's vLLM see images as the trainer does, where TRL 1.16 has three faults.

    A colocated vLLM gets prompts whose image tokens are expanded, and expands them again:
    https://github.com/huggingface/trl/issues/6294. After a sync vLLM goes on with what the vision
    tower made of an image before it: https://github.com/huggingface/trl/issues/7198. And it may
    sample image tokens, for which there is no image; TRL bans them from transformers' generation.
    """
    vllm = trainer.vllm_generation
    image_id = trainer.processing_class.image_token_id
    generate, sync_weights = vllm.generate, vllm.sync_weights
    bias = {image_id: -100.0} | (vllm.generation_kwargs.get("logit_bias") or {})
    vllm.generation_kwargs = vllm.generation_kwargs | {"logit_bias": bias}

    def generate_unexpanded(prompts: list[list[int]], **others: Any) -> Any:
        short = [
            [i for i, before in zip(ids, [None, *ids], strict=False) if not i == before == image_id]
            for ids in prompts
        ]
        generated = generate(short, **others)
        pairs = zip(prompts, generated[0], strict=True)
        wrong = [f"{len(got)} tokens for {len(ids)}" for ids, got in pairs if list(got) != ids]
        # On all processes: those without a wrong one would wait for the others.
        if largest(trainer, len(wrong)):
            raise ValueError(
                "vLLM expanded a prompt otherwise than the trainer "
                f"({(*wrong, 'in another process')[0]}): wanted the processor of the model's "
                "folder as processing_class"
            )
        return generated

    def sync_and_forget_images() -> None:
        sync_weights()
        if vllm.mode == "colocate":
            vllm.llm.llm_engine.reset_encoder_cache()
        elif trainer.accelerator.is_main_process:
            # Not TRL's _post, which wants a body in the answer.
            client = vllm.vllm_client
            client.session.post(f"{client.base_url}/reset_encoder_cache").raise_for_status()

    if vllm.mode == "colocate":
        vllm.generate = generate_unexpanded
    vllm.sync_weights = sync_and_forget_images


def rollout_of(
    trainer: Any,
    prompt_ids: Sequence[int],
    token_ids: Sequence[int],
    rewards: Tensor,
    prefix_ids: Sequence[int] = (),
) -> Rollout:
    """One completion with its spans and rewards; a reflection's prefix was forced before it.

    Its text begins with a think tag that the prompt opened. `rewards` [F] are a number per reward
    function, NaN where it does not apply. A completion whose accuracy is NaN is neither right nor
    wrong: it takes no part.

    Raises:
        ValueError: an accuracy outside [0, 1].
    """
    accuracy = float(rewards[trainer.accuracy_index])
    if not 0 <= accuracy <= 1 and accuracy == accuracy:
        name = trainer.reward_func_names[trainer.accuracy_index]
        raise ValueError(
            f"reward function {name}: got {accuracy}, wanted a number in [0, 1], as it says which "
            "responses are right; name another one with accuracy=..."
        )
    finished = bool(token_ids) and token_ids[-1] in trainer.eos_token_ids
    text, ends = trainer.token_text.decode_response(
        prompt_ids, (*prefix_ids, *token_ids), trainer.tags[0]
    )
    if finished:
        ends = ends[:-1]
    return Rollout(
        token_ids=tuple(token_ids),
        text=text,
        spans=token_spans(parse_spans(text, *trainer.tags), ends, len(prefix_ids)),
        accuracy=accuracy,
        format_score=format_score(text, *trainer.tags),
        reward=float((rewards * trainer.reward_weights.to(rewards.device)).nansum()),
        finished=finished,
        prefix_ids=tuple(prefix_ids),
        reflected=bool(prefix_ids),
    )


def rollout_groups(
    trainer: Any, batch: Mapping[str, Any], rollouts: Sequence[Rollout]
) -> list[RolloutGroup]:
    """Each prompt's rollouts, with rationale distances and log-probs by the old policy.

    One forward of all B sequences, whichever need it: with sharded parameters it is a collective
    call.
    """
    # Whole ones: `mask_truncated_completions` hides those that were cut from attention.
    lengths = torch.tensor([[len(rollout.token_ids)] for rollout in rollouts])
    mask = torch.arange(batch["completion_ids"].shape[1]) < lengths
    batch = {**batch, "completion_mask": mask.to(batch["completion_mask"])}
    spans = torch.tensor([rationale_span(rollout) for rollout in rollouts])
    spans = spans + batch["prompt_ids"].shape[1]
    pooled: list[Tensor] = []

    def pool(module: Any, args: Any, output: Any) -> None:
        start, hidden = sum(map(len, pooled)), output.last_hidden_state
        rows = spans[start : start + len(hidden)]
        pooled.append(pool_rationale(hidden, rows.to(hidden.device)))

    handle = base_model(trainer, trainer.model).base_model.register_forward_hook(pool)
    try:
        log_probs = completion_log_probs(trainer, trainer.model, batch)
    finally:
        handle.remove()
    size = trainer.num_generations
    parts = (
        [tuple(rollouts[i : i + size]) for i in range(0, len(rollouts), size)],
        map(pairwise_distances, torch.cat(pooled).cpu().split(size)),
        log_probs.sum(1).float().cpu().split(size),
    )
    return [RolloutGroup(*fields) for fields in zip(*parts, strict=True)]


def reflect(
    trainer: Any, subgroups: Sequence[Subgroup | str]
) -> tuple[list[Rollout | None], dict[int, Sequence[float | None]]]:
    """Lines 12-14: the repair of each group that reflects, and vLLM's log-probs of it.

    Generation and rewards are collective calls: a process with fewer repairs than another adds its
    first prompt, and drops what comes of it.
    """
    wanted: dict[int, list[int]] = {}
    longest = longest_context(trainer) - trainer.max_completion_length
    for place, subgroup in enumerate(subgroups):
        if isinstance(subgroup, str) or subgroup.reflect_on is None:
            continue
        # With `anchor=all` a whole group may train: then no row is free for the repair.
        if len(subgroup.members) < trainer.num_generations:
            negative = subgroup.others[subgroup.reflect_on].rollout
            prompt = trainer.sampled_prompt_ids[place * trainer.num_generations]
            text = reflection_prefix(negative, trainer.care.reflection.cue, *trainer.tags)
            if trainer.token_text.opening(prompt, trainer.tags[0]):
                text = text.removeprefix(f"<{trainer.tags[0]}>")
            prefix = list(encode_text(trainer._tokenizer, text))
            if len(prompt) + len(prefix) <= longest:
                wanted[place] = prefix
    reflected: list[Rollout | None] = [None] * len(subgroups)
    count = largest(trainer, len(wanted))
    if count == 0:
        return reflected, {}
    prefixes = [*wanted.values(), *[[]] * (count - len(wanted))]
    rows = [place * trainer.num_generations for place in (*wanted, *[0] * (count - len(wanted)))]
    inputs, prompts, _ = trainer.rewarded
    inputs, prompts = [inputs[row] for row in rows], [prompts[row] for row in rows]
    prompt_ids, images, fields = trainer._tokenize_prompts(prompts)
    completion_ids, sampling_log_probs = trainer._generate_single_turn(
        [[*ids, *prefix] for ids, prefix in zip(prompt_ids, prefixes, strict=True)],
        images,
        {name: _with_prefixes(field, prefixes) for name, field in fields.items()},
        1,
    )
    texts = [
        trainer.token_text.decode((*prefix, *ids))[0]
        for prefix, ids in zip(prefixes, completion_ids, strict=True)
    ]
    is_chat = isinstance(prompts[0], list)
    rewards = trainer.rewards_of_reflections(
        inputs,
        prompts,
        [[{"role": "assistant", "content": text}] if is_chat else text for text in texts],
        completion_ids,
    )
    for i, (place, prefix) in enumerate(wanted.items()):
        reflected[place] = rollout_of(trainer, prompt_ids[i], completion_ids[i], rewards[i], prefix)
    if sampling_log_probs is None:
        return reflected, {}
    return reflected, {place: sampling_log_probs[i] for i, place in enumerate(wanted)}


def longest_context(trainer: Any) -> float:
    """Tokens of prompt and response that vLLM takes; it fails on more, or cuts the response."""
    if not trainer.use_vllm:
        return math.inf
    positions = trainer.model.config.get_text_config().max_position_embeddings
    return trainer.args.vllm_max_model_length or positions


def _with_prefixes(field: Any, prefixes: Sequence[Sequence[int]]) -> Any:
    """A processor's field for prompts with tokens forced behind: token types gain zeros."""
    if isinstance(field, list) and field and isinstance(field[0], list):
        return [[*row, *[0] * len(p)] for row, p in zip(field, prefixes, strict=True)]
    return field


def completion_log_probs(trainer: Any, model: Any, batch: Mapping[str, Any]) -> Tensor:
    """[B, T] log-probs of the completions by `model`, 0 behind their ends; no gradient."""
    prompt, completion = batch["prompt_ids"], batch["completion_ids"]
    args = trainer.args
    with (
        torch.no_grad(),
        disable_gradient_checkpointing(trainer.model, args.gradient_checkpointing_kwargs),
    ):
        log_probs, _, _ = trainer._get_per_token_logps_and_entropies(
            model,
            torch.cat([prompt, completion], 1),
            torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1),
            completion.shape[1],
            batch_size=args.per_device_train_batch_size,
            **{name: batch[name] for name in MODEL_INPUTS if name in batch},
        )
    return log_probs


def reference_log_probs(trainer: Any, batch: Mapping[str, Any]) -> Tensor:
    """[B, T] by the reference: a model of its own, or the policy without its adapters."""
    if trainer.ref_model is not None:
        return completion_log_probs(trainer, trainer.ref_model, batch)
    model = trainer.accelerator.unwrap_model(trainer.model)
    with use_adapter(model, adapter_name="ref" if "ref" in model.peft_config else None):
        return completion_log_probs(trainer, trainer.model, batch)


def care_metrics(
    trainer: Any, reflected: Sequence[Rollout | None], updates: Sequence[GroupUpdate]
) -> dict[str, float]:
    """Over all processes: the shares of groups that train, are rescued and reflect, of sequences
    that train, and of reflections that succeed."""
    repairs = [rollout for rollout in reflected if rollout is not None]
    counts = torch.tensor(
        [
            len(updates),
            sum(update.skipped is None for update in updates),
            sum(update.rescued and update.skipped is None for update in updates),
            sum(update.num_sequences for update in updates),
            len(repairs),
            sum(rollout.accuracy == 1 for rollout in repairs),
        ],
        dtype=torch.float32,
        device=trainer.accelerator.device,
    )
    totals = trainer.accelerator.gather(counts).view(-1, len(counts)).sum(0).tolist()
    groups, trained, rescued, sequences, tried, repaired = totals
    metrics = {
        "care/trained_groups": trained / groups,
        "care/rescued_groups": rescued / groups,
        "care/trained_sequences": sequences / (groups * trainer.num_generations),
        "care/reflected_groups": tried / groups,
    }
    return metrics | ({"care/reflection_success": repaired / tried} if tried else {})


def own_rows(trainer: Any, gathered: Tensor, count: int) -> Tensor:
    """This process's `count` rows of what was gathered from all."""
    start = trainer.accelerator.process_index * count
    return gathered[start : start + count]


def largest(trainer: Any, count: int) -> int:
    """The largest of the processes' counts."""
    own = torch.tensor(count, device=trainer.accelerator.device)
    return int(trainer.accelerator.gather(own).max())
