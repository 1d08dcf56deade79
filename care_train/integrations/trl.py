"""CARE inside TRL: a `GRPOTrainer` that trains Algorithm 1's subgroups instead of whole groups.

    from trl import GRPOConfig

    from care_train.integrations.trl import CareGRPOTrainer

    trainer = CareGRPOTrainer(
        model="Qwen/Qwen2.5-VL-3B-Instruct",
        reward_funcs=accuracy,  # 1.0 where the completion's answer is right, else 0.0
        args=GRPOConfig(epsilon_high=0.28, num_generations=8),
        train_dataset=dataset,
    )
    trainer.train()

TRL samples the groups, calls the reward functions, logs, saves, shards and evaluates as it always
does. This class takes over between its sampling and its loss: anchor, hard negatives and rescue
(lines 3-10, 21-25), reflection through TRL's own generation (lines 11-20), token advantages (lines
26-41). The loss (lines 42-43) is `care_kernels.linear_policy_loss` inside the model's forward.

A batch keeps TRL's shape, B sequences a process: the reflected rollout takes the row of a rollout
of its group that is not trained. Rows outside S* have no advantage, and the fused loss skips them.
"""

from typing import Any

import torch
from torch import Tensor
from trl import GRPOTrainer

from care_kernels.integrations.trl import (
    PolicyLossCall,
    check_version,
    unfusable_option,
    use_care_kernels,
)
from care_train.algorithm import care as algorithm
from care_train.algorithm.baselines import without_truncated
from care_train.algorithm.selection import repair_prefix
from care_train.algorithm.types import GroupUpdate, Rollout, Subgroup
from care_train.config import CareSettings
from care_train.integrations import check_settings
from care_train.integrations.trl_batch import policy_terms, training_batch
from care_train.integrations.trl_rollouts import (
    care_metrics,
    mend_vllm,
    own_rows,
    reflect,
    rollout_groups,
    rollout_of,
)
from care_train.models.prompts import TokenText, encode_text


class CareGRPOTrainer(GRPOTrainer):
    """TRL 1.16's `GRPOTrainer` with CARE's credit assignment; everything else is TRL's.

    `loss_type` chooses the surrogate (`cispo`, `sapo`, else the clip of `epsilon`, `epsilon_high`
    and `delta`); the average is Eq. 12's, over S* of one optimiser step. TRL's metrics keep their
    names; CARE's shares of groups and sequences stand beside them as `care/...`.
    """

    def __init__(
        self,
        *args: Any,
        care: CareSettings | None = None,
        accuracy: str | None = None,
        think_tag: str = "think",
        answer_tag: str = "answer",
        **kwargs: Any,
    ) -> None:
        """
        Args:
            args: as for `GRPOTrainer`.
            care: K, s, the anchor and so on; None: the paper's settings.
            accuracy: the reward function whose value in [0, 1] says whether a response is right (1)
                or wrong (0), by its `__name__`. None: the first one.
            think_tag: name of the tags around the rationale.
            answer_tag: name of the tags around the answer.
            kwargs: as for `GRPOTrainer`.

        Raises:
            ValueError: an option of TRL's or of CARE's that the two cannot have together.
        """
        check_version()
        super().__init__(*args, **kwargs)
        self.care = CareSettings() if care is None else care
        self.tags = (think_tag, answer_tag)
        names = list(self.reward_func_names)
        if accuracy is not None and accuracy not in names:
            raise ValueError(
                f"accuracy: got {accuracy!r}, wanted one of the reward functions {names}"
            )
        self.accuracy_index = 0 if accuracy is None else names.index(accuracy)
        trainer: Any = self
        self.token_text = TokenText(trainer._tokenizer)
        check(self)
        use_care_kernels(self, "log_probs")
        if self.use_vllm and trainer._is_vlm:
            mend_vllm(self)
        if trainer._dist.fsdp_version == 2:
            # generate() then runs until the last process is done: each forward gathers weights.
            # transformers 5.19 sets it where it shards a model itself, accelerate 1.15 does not.
            trainer.model._is_fsdp_managed_module = True

    def _generate(self, prompts: list) -> Any:
        generated = super()._generate(prompts)
        self.sampled_prompt_ids, self.sampled_ids = generated[:2]
        return generated

    def _calculate_rewards(
        self, inputs: list, prompts: list, completions: list, completion_ids_list: list
    ) -> Tensor:
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        self.rewarded = inputs, prompts, own_rows(self, rewards, len(prompts))
        return rewards

    def rewards_of_reflections(
        self, inputs: list, prompts: list, completions: list, completion_ids: list
    ) -> Tensor:
        """[B, F] of this process's reflected completions, one column per reward function."""
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids)
        # What the functions logged of them belongs to no row of TRL's table of completions.
        self._pending_extra_logs.clear()
        return own_rows(self, rewards, len(prompts))

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """TRL's batch; in training with S* in its rows and Eq. 11 in `advantages` [B, T]."""
        batch = super()._generate_and_score_completions(inputs)
        model: Any = self.model
        if not model.training:
            return batch
        sampled = zip(self.sampled_prompt_ids, self.sampled_ids, self.rewarded[2], strict=True)
        rollouts = [rollout_of(self, *row) for row in sampled]
        groups = rollout_groups(self, batch, rollouts)
        subgroups = [
            algorithm.select_subgroup(group, self.care, self._generator(place))
            for place, group in enumerate(groups)
        ]
        reflected, sampling_log_probs = reflect(self, subgroups)
        updates = [
            self._update_of(subgroup, repair)
            for subgroup, repair in zip(subgroups, reflected, strict=True)
        ]
        for name, value in care_metrics(self, reflected, updates).items():
            self._metrics["train"][name].append(value)
        return training_batch(self, batch, groups, updates, sampling_log_probs)

    def _update_of(self, subgroup: Subgroup | str, repair: Rollout | None) -> GroupUpdate:
        """Lines 15-19 and 26-41, without what `mask_truncated_completions` leaves out."""
        if isinstance(subgroup, str):
            return algorithm.skipped_update(subgroup)
        update = algorithm.subgroup_update(subgroup, self.care, repair)
        if not self.mask_truncated_completions:
            return update
        return without_truncated(update, [sequence.rollout for sequence in update.sequences])

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        """Eqs. 12-13 over S*; TRL's own method runs on the same log-probs, for its metrics."""
        if not torch.is_grad_enabled():
            return super()._compute_loss(model, inputs)
        call = PolicyLossCall(model, policy_terms(self, inputs))
        super()._compute_loss(call, inputs)
        return call.loss

    def _generator(self, group: int) -> torch.Generator:
        """For random selectors: a stream of its own for each step, process and group."""
        parts = (self.args.seed, self.state.global_step, self.accelerator.process_index, group)
        return torch.Generator().manual_seed(hash(parts) % 2**63)


def check(trainer: Any) -> None:
    """Refuse what CARE and TRL cannot have together, before the first step."""
    check_settings(trainer.care)
    args, reflection = trainer.args, trainer.care.reflection
    local = args.per_device_train_batch_size * args.steps_per_generation
    least = trainer.care.max_negatives + 2
    side = trainer._tokenizer.padding_side
    fsdp = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    cue = encode_text(trainer._tokenizer, repair_prefix("", reflection.cue, trainer.tags[0]))
    context, length = 2 * trainer.max_completion_length + len(cue), args.vllm_max_model_length
    structure = args.vllm_structured_outputs_regex or (args.generation_kwargs or {}).get(
        "structured_outputs"
    )
    unfusable, aggregation = unfusable_option(trainer), trainer.multi_objective_aggregation
    tags = "".join(f"<{tag}>x</{tag}>" for tag in trainer.tags)
    seen, _ = trainer.token_text.decode(
        trainer._tokenizer(tags, add_special_tokens=False)["input_ids"]
    )
    is_loaded_once = fsdp is not None and fsdp.fsdp_version == 2 and fsdp.cpu_ram_efficient_loading
    refused = {
        "FSDP2 with fsdp_cpu_ram_efficient_loading=true and beta > 0; wanted it false (`accelerate "
        "launch --fsdp_cpu_ram_efficient_loading false`): TRL reads the reference's weights on the "
        "first process alone and shares them with none": (
            is_loaded_once and trainer.ref_model is not None
        ),
        f"{unfusable}; wanted what `linear_policy_loss` has": unfusable is not None,
        f"scale_rewards={args.scale_rewards!r}; wanted 'group', as Eqs. 5-6 divide by the "
        "subgroup's deviation": args.scale_rewards != "group",
        f"multi_objective_aggregation={aggregation!r}; wanted 'sum_then_normalize', as in Eq. 1": (
            aggregation != "sum_then_normalize"
        ),
        f"a tokenizer that reads {tags!r} as {seen!r}; wanted tags that are no special tokens, as "
        "those have no text: name others with think_tag and answer_tag": tags not in seen,
        f"a processing_class with padding_side={side!r}; wanted 'left', as TRL pads its prompts: "
        "the image tokens' positions would be others": (trainer._is_vlm and side != "left"),
        "tools, environments or a rollout_func; wanted none: responses have one turn": bool(
            trainer.tools or trainer.environment_factories or trainer.rollout_func
        ),
        f"per_device_train_batch_size x steps_per_generation = {local}; wanted a multiple of "
        f"num_generations = {trainer.num_generations}: a group stays on one process": (
            local % trainer.num_generations != 0
        ),
        f"num_generations={trainer.num_generations}; wanted at least {least} with reflection, "
        "which takes the row of a rollout that is not trained": (
            reflection.enabled and trainer.num_generations < least
        ),
        f"vllm_max_model_length={length}; wanted more than {context} with reflection: it comes "
        "behind the prompt, a response that failed and the cue, and may be as long as a response": (
            reflection.enabled and trainer.use_vllm and length is not None and length <= context
        ),
        f"structured outputs ({structure!r}) with reflection; wanted none: it goes on inside a "
        "response, where vLLM would begin a new one": reflection.enabled and bool(structure),
    }
    for message, is_refused in refused.items():
        if is_refused:
            raise ValueError(f"CareGRPOTrainer: got {message}")
