"""vLLM against transformers and the training forward: tokens, log-probs, bans, seeds, prompts."""

import json
import os
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from care_train import commands
from care_train.config import VllmSettings, load_config
from care_train.models.lora import add_adapters
from care_train.rollout import vllm_engine, vllm_process
from care_train.rollout.engine import SamplingSettings, WeightParts, banned_token_ids
from care_train.rollout.transformers_engine import TransformersEngine
from care_train.rollout.vllm_process import VllmProcess, VllmSetup
from care_train.training.session import Given
from tests.rollout.conftest import GREEDY, KINDS, LORA, largest_gap, tokens
from tests.train.builders import load


def check_without_adapter(plain):
    """A vLLM that holds an adapter samples from a model without one."""
    requests = plain.requests(2)
    completions = plain.engine.generate(requests, GREEDY)
    assert plain.engine.wanted is WeightParts.MERGED
    assert largest_gap(plain, requests, completions) < 1e-3


def check_greedy_outputs(model, rounds, scale=0.02):
    """Tokens are transformers', log-probs the trainer's, after every change of all weights; half
    of the requests have a forced prefix, as a reflection has."""
    transformers = TransformersEngine(model.loaded, 64)
    first, seen = model.requests(), set()
    requests = [*first, *(replace(r, prefix_ids=(20, 21, 22)) for r in first)]
    for seed in range(rounds):
        completions = model.engine.generate(requests, GREEDY)
        assert tokens(completions) == tokens(transformers.generate(requests, GREEDY))
        assert largest_gap(model, requests, completions) < 1e-3
        seen.add(tuple(tokens(completions)))
        model.change_weights(seed, scale)
        model.sync()
    assert len(seen) == rounds, "the changes of weights were too small to see"


@pytest.mark.parametrize(
    ("where", "kind"),
    [
        *(("pair", kind) for kind in KINDS),
        ("served", KINDS[0]),
        pytest.param("served", KINDS[1], marks=pytest.mark.slow),
    ],
)
def test_greedy_outputs_equal_transformers_after_every_sync(where, kind, request):
    """Images and text, before and after two changes of all weights; log-probs agree too."""
    check_greedy_outputs(request.getfixturevalue(where)(kind), rounds=3)


@pytest.mark.parametrize("kind", KINDS)
def test_log_probs_are_those_of_the_sampled_distribution(kind, pair):
    """At any temperature they match the training forward's at that temperature; with top-k 1 there
    is one choice, of log-prob 0."""
    model = pair(kind)
    requests = model.requests()
    for temperature in (1.0, 0.7):
        completions = model.engine.generate(requests, SamplingSettings(16, temperature))
        assert largest_gap(model, requests, completions, temperature) < 1e-3
    completions = model.engine.generate(requests, SamplingSettings(8, top_k=1))
    assert {value for c in completions for value in c.log_probs} == {0.0}


def test_an_image_seen_before_a_sync_is_seen_anew(either):
    """Only the vision tower changes: cached image features or prefixes would give old outputs.
    Outputs follow the change once it is sent, and not before."""
    model = either()
    requests = [r for r in model.requests() if r.prompt.images]
    model.engine.generate(requests, GREEDY)
    with torch.no_grad():
        for parameter in model.loaded.model.base_model.visual.parameters():
            parameter.mul_(1.5)
    assert largest_gap(model, requests, model.engine.generate(requests, GREEDY)) > 1e-3
    model.sync()
    assert largest_gap(model, requests, model.engine.generate(requests, GREEDY)) < 1e-3


def test_seeds_reproduce_whatever_the_batch(either):
    """Same seed, same response: alone, reversed, again, with prefixes and several requests of a
    prompt; other seeds give others."""
    model, sampling = either(), SamplingSettings(12, temperature=0.9, top_p=0.95)
    first = model.requests()
    requests = [*first, *(replace(r, seed=r.seed + 1, prefix_ids=(20, 21)) for r in first)]
    completions = model.engine.generate(requests, sampling)
    assert model.engine.generate(requests, sampling) == completions
    together = tokens(completions)
    assert tokens(model.engine.generate(requests[::-1], sampling)) == together[::-1]
    assert [tokens(model.engine.generate([r], sampling))[0] for r in requests] == together
    assert tokens(model.engine.generate(model.requests(step=1), sampling)) != together[:6]


def test_prompts_split_over_steps_change_nothing(pair):
    """More prompt tokens than vLLM takes in one step: some wait half-read, seeds still hold."""
    model, sampling = pair(), SamplingSettings(4)
    requests = [replace(model.requests(1)[0], prefix_ids=tuple(range(20, 320)), seed=3)]
    alone = tokens(model.engine.generate(requests, sampling))[0]
    many = [replace(requests[0], prefix_ids=(i, *requests[0].prefix_ids)) for i in range(40)]
    together = tokens(model.engine.generate([*many, *requests], sampling))
    assert together[-1] == alone
    assert together[0] == tokens(model.engine.generate(many[:1], sampling))[0]
    assert together[17] == tokens(model.engine.generate(many[17:18], sampling))[0]


def test_sampling_follows_the_distribution(pair):
    """Frequencies of the first token over many seeds are its probabilities."""
    model = pair()
    with torch.no_grad():
        model.loaded.model.get_output_embeddings().weight.mul_(8)
    model.sync()
    request = model.requests(1)[0]
    requests = [replace(request, seed=seed) for seed in range(2000)]
    completions = model.engine.generate(requests, SamplingSettings(1))
    counts = torch.bincount(torch.tensor([c.token_ids[0] for c in completions]), minlength=400)
    ids = counts.argsort(descending=True)[:5]
    wanted = {c.token_ids[0]: c.log_probs[0] for c in completions}
    for token in ids.tolist():
        share = torch.tensor(wanted[token]).exp()
        error = (share * (1 - share) / 2000).sqrt()
        assert abs(counts[token] / 2000 - share) < 4 * error


def test_special_and_image_tokens_are_never_sampled(in_process):
    """The head's rows of image tokens and EOS swap scale: a policy that wants them cannot. Global
    generators and thread settings are left as the trainer has them."""
    model = in_process()
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    torch.set_num_threads(2)
    head = model.loaded.model.get_output_embeddings().weight
    banned = banned_token_ids(model.loaded)
    assert model.loaded.image_token_id in banned
    with torch.no_grad():
        # Whatever the state, some banned id has by far the largest logit.
        head[banned[0]], head[banned[1]] = 100 * head[7], -100 * head[7]
    model.sync()
    for sampling in (SamplingSettings(16), GREEDY):
        completions = model.engine.generate(model.requests(), sampling)
        sampled = {token for c in completions for token in c.token_ids}
        assert sampled and not sampled & set(banned)
        assert all(torch.tensor(c.log_probs or ()).isfinite().all() for c in completions)
    assert torch.get_num_threads() == 2 and torch.equal(torch.get_rng_state(), state)
    torch.set_num_threads(threads)
    assert torch.get_num_threads() == threads


def test_the_model_runner_of_gpus_takes_the_ban():
    """It has an interface of its own for logits processors, and drops what they allocate on its
    device when they are made, among the weights, as soon as it sleeps."""
    from vllm.v1.worker.gpu.sample.logits_processor import build_custom_logits_processors

    config = SimpleNamespace(
        additional_config={"care_banned_token_ids": [1, 3, 9]},
        model_config=SimpleNamespace(get_vocab_size=lambda: 5),
    )
    names = ("max_num_reqs", "vocab_size", "all_token_ids", "prompt_len", "prefill_len")
    state = SimpleNamespace(**dict.fromkeys((*names, "total_len")), device=torch.device("meta"))
    name = "care_train.rollout.vllm_worker:BannedTokens"
    (processor,) = build_custom_logits_processors(config, state, False, [name])
    assert processor.add_request(0, None)
    logits = processor.apply(torch.zeros(2, 5), SimpleNamespace())
    assert logits.tolist() == [[0, -torch.inf, 0, -torch.inf, 0]] * 2


def test_workers_of_a_server_are_no_forks(monkeypatch):
    """CUDA cannot be used in a fork of a process that has counted GPUs, as ours does at its start;
    vLLM forks unless CUDA is initialised. Its engine is in our process whatever was exported."""
    monkeypatch.delenv("VLLM_WORKER_MULTIPROC_METHOD", raising=False)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    vllm_process._set_environment()
    assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    from vllm.utils.system_utils import get_mp_context

    assert get_mp_context().get_start_method() == "spawn"


def test_threads_are_those_of_whoever_runs(monkeypatch):
    """On GPUs vLLM sets torch to one thread for its own code: not for the trainer's."""
    monkeypatch.setattr(vllm_process, "_num_threads", None)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with vllm_process.untouched_process():
            torch.set_num_threads(1)
        assert torch.get_num_threads() == 3
        with vllm_process.untouched_process():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_the_stream_is_that_of_whoever_runs(monkeypatch):
    """vLLM's first collective moves its thread to a stream of its own, where DeepSpeed's ZeRO-3
    would read whether gradients overflowed before that is known. vLLM goes on there: it keeps the
    stream, and copies sampled tokens once that one is done."""
    waited, own, foreign = [], SimpleNamespace(), SimpleNamespace()
    own.wait_stream = foreign.wait_stream = waited.append
    now = [own]
    monkeypatch.setattr(vllm_process, "_stream", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: now[-1])
    monkeypatch.setattr(torch.cuda, "set_stream", now.append)
    with vllm_process.untouched_process():
        torch.cuda.set_stream(foreign)
    assert now[-1] is own and waited == [foreign]
    with vllm_process.untouched_process():
        assert now[-1] is foreign and waited == [foreign, own]
    assert now[-1] is own and waited == [foreign, own, foreign]


def test_a_response_ends_at_eos_and_keeps_it(in_process):
    """EOS is the last token of finished responses and of no others."""
    model = in_process()
    head = model.loaded.model.get_output_embeddings().weight
    eos = model.loaded.eos_token_ids[0]
    with torch.no_grad():
        head[eos] *= 20
    model.sync()
    completions = model.engine.generate(model.requests(24), SamplingSettings(8))
    assert {c.finished for c in completions} == {True, False}
    for completion in completions:
        assert completion.finished == (completion.token_ids[-1] == eos)
        assert eos not in completion.token_ids[:-1]
        assert completion.finished or len(completion.token_ids) == 8


def test_a_prompt_that_does_not_fit_is_an_error(either):
    """Expanded otherwise by vLLM: named are the sample, both lengths and the first position. Over
    the limit: responses are never cut short silently."""
    model = either()
    request = model.requests(1)[0]
    other = replace(request.prompt, images=(Image.new("RGB", (112, 112)),))
    with pytest.raises(ValueError, match=r"rows.jsonl: row 1: .* to \d+ tokens.*position \d+"):
        model.engine.generate([replace(request, prompt=other)], GREEDY)
    with pytest.raises(ValueError, match=r"row 1: a context of"):
        model.engine.generate([request], SamplingSettings(400))
    assert model.engine.generate([request], GREEDY)


def test_evaluations_beside_training_leave_the_device_to_it(tmp_path, monkeypatch):
    """The engine rests between the evaluation before and the optimiser's allocations; the trained
    model's memory is free before the evaluation after loads it anew."""
    told = []
    model = torch.nn.Linear(2, 2)
    engine = SimpleNamespace(rest=lambda: told.append("rest"))
    config = load_config(None, ["model.lora.rank=4", "train.steps=2"])
    session = SimpleNamespace(
        config=config,
        given=Given(),
        loaded=SimpleNamespace(model=model),
        rollout_engine=lambda *_: engine,
    )
    scores = {"num_questions": 4.0}
    stand_ins = {
        "evaluate_both": lambda *_, **__: told.append("evaluate") or scores,
        "open_session": lambda *_: told.append(f"load beside {model.weight.numel()}") or session,
        "RlLoop": lambda *_: SimpleNamespace(
            train=lambda *_: told.append("train") or {"steps": 2.0}
        ),
    }
    for name, function in stand_ins.items():
        monkeypatch.setattr(commands, name, function)
    run = SimpleNamespace(path=tmp_path, started=lambda: None)
    metrics = SimpleNamespace(log=lambda *_, **__: None)
    commands._train_from(session, run, [], [1], metrics, None, torch.device("cpu"), None)
    before = ["evaluate", "rest", "train"]
    assert told == [*before, "load beside 0", "evaluate", "rest"]


@pytest.mark.parametrize(("lora", "level"), [("adapter", 1), ("merged", 2)])
def test_what_a_sleeping_engine_keeps(lora, level, tiny_folder, monkeypatch):
    """Base weights are kept, so only an adapter is sent after it; merged weights come anew. Each
    wake counts as a start."""
    told = []
    llm = SimpleNamespace(
        sleep=lambda level: told.append(f"sleep {level}"), wake_up=lambda: told.append("wake up")
    )
    process = VllmProcess(llm, None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(vllm_engine, "vllm_process", lambda *_: process)
    monkeypatch.setattr(vllm_engine, "send_weights", lambda *_: 0)
    monkeypatch.setattr(vllm_engine, "has_adapters", lambda _: True)
    monkeypatch.setattr(vllm_engine, "adapter_request", object)
    is_merged = lora == "merged"
    setup = VllmSetup(VllmSettings(lora=lora), 100, 1, None if is_merged else 4)
    engine = vllm_engine.VllmEngine(load(tiny_folder()), setup)
    assert engine.wanted is (WeightParts.MERGED if is_merged else WeightParts.BASE_AND_ADAPTER)
    assert engine.num_starts == 1
    engine.sync(())
    for _ in range(2):
        engine.rest()
    assert told == [f"sleep {level}"] and (process.owner is None) == is_merged
    assert engine.wanted is (WeightParts.MERGED if is_merged else WeightParts.ADAPTER)
    engine.sync(())
    assert told[1:] == ["wake up"] and engine.num_starts == 2


def test_one_vllm_serves_a_policy_before_with_and_after_its_adapters(
    tiny_folder, monkeypatch, tmp_path
):
    """On GPUs vLLM's sleep mode allows one in a process: another model's is an error there."""
    starts = []
    monkeypatch.setattr(vllm_process, "_running", {})
    monkeypatch.setattr(vllm_process, "start_vllm", lambda *given: starts.append(given))

    def reversed_keys(pairs):
        return dict(reversed(pairs))

    def wanted(loaded, size=1):
        setup = VllmSetup(VllmSettings(lora="adapter"), 100, size, LORA.rank)
        return vllm_engine.VllmEngine(loaded, setup).wanted

    loaded = load(tiny_folder())
    assert wanted(loaded) is WeightParts.MERGED
    add_adapters(loaded.model, LORA, seed=0)
    assert wanted(loaded) is WeightParts.BASE_AND_ADAPTER
    hub = shutil.copytree(tiny_folder(), tmp_path / "hub")  # other order of keys than a saved one's
    config = json.loads((hub / "config.json").read_text(), object_pairs_hook=reversed_keys)
    (hub / "config.json").write_text(json.dumps(config))
    assert wanted(load(hub)) is WeightParts.MERGED and len(starts) == 1
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match="another model or other settings already"):
        wanted(loaded, size=2)
