"""Checks of the configuration against itself and the number of ranks."""

import torch

from care_train.doctor.finding import Finding, Subject
from care_train.planning.architecture import describe
from care_train.planning.hardware import GIB, Accelerator
from care_train.planning.memory import plan_memory
from care_train.planning.workload import Scenario, training_of, workload_of

_NAME = "batches"


def check_batches(subject: Subject) -> Finding:
    """Prompts divide over ranks and mini-batches, and there are enough of them."""
    config, ranks = subject.config, subject.ranks
    train, group = config.train, config.rollout.group_size
    unit = train.mini_batches * ranks
    if train.prompts_per_step % unit:
        nearest = max(1, round(train.prompts_per_step / unit)) * unit
        return Finding(
            "error",
            _NAME,
            f"train.prompts_per_step = {train.prompts_per_step} does not divide over "
            f"{train.mini_batches} mini-batches x {ranks} ranks",
            f"set train.prompts_per_step={nearest}",
        )
    if subject.samples and len(subject.samples) < train.prompts_per_step:
        return Finding(
            "warning",
            _NAME,
            f"{len(subject.samples)} rows for {train.prompts_per_step} prompts per step: a step "
            "repeats rows",
            "lower train.prompts_per_step or add rows",
        )
    size = config.rollout.vllm.tensor_parallel_size
    if config.rollout.engine == "vllm" and ranks % size:
        return Finding(
            "error",
            _NAME,
            f"rollout.vllm.tensor_parallel_size = {size} does not divide {ranks} ranks",
            "set it to a divisor",
        )
    prompts = train.prompts_per_step // ranks
    return Finding(
        "ok",
        _NAME,
        f"{prompts} prompts x {group} responses per rank and step, {train.micro_batch_size} "
        "sequences at a time",
    )


def check_memory(subject: Subject) -> Finding:
    """The planned peak against this machine's device."""
    scenario = Scenario(gpus=subject.ranks)
    architecture = describe(subject.model.model, "model")
    training = training_of(subject.config, subject.ranks)
    work = workload_of(subject.config, architecture, scenario)
    plan = plan_memory(architecture, training, work, this_device())
    text = (
        f"a peak of {plan.peak / GIB:.1f} GiB is predicted, in {plan.peak_phase}; there are "
        f"{plan.limit / GIB:.1f} GiB"
    )
    if plan.fits:
        return Finding("ok", "memory", text)
    return Finding("warning", "memory", text, "see `care-train plan` for what to change")


def this_device() -> Accelerator:
    """The device here as the plan sees it; rates are not known."""
    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        return Accelerator(torch.cuda.get_device_name(), total, 1, 1, 1, 1)
    import psutil

    total = psutil.virtual_memory().total
    return Accelerator("CPU", total, 1, 1, 1, 1, kind="cpu")


def check_prompt(subject: Subject) -> Finding:
    """The policy is told, or was taught, to write the tags that the verifier reads."""
    prompt = subject.config.prompt
    tags = [f"<{prompt.think_tag}>", f"<{prompt.answer_tag}>"]
    texts = [prompt.system or "", *(sample.prompt for sample in subject.rows[:1])]
    lacking = [tag for tag in tags if not any(tag in text for text in texts)]
    if lacking:
        return Finding(
            "warning",
            "prompt",
            f"neither prompt.system nor the first row names {' and '.join(lacking)}",
            "name the tags in prompt.system, unless a cold start has taught them",
        )
    return Finding("ok", "prompt", f"names {' and '.join(tags)}")
