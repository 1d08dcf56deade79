"""Checks of the model: tokenizer, processor, template and ids, and log-probs against the engine."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from PIL import Image

from care_train.algorithm.spans import parse_spans, token_spans
from care_train.data import Sample
from care_train.doctor import Finding, Subject, error, ok, spread, warning
from care_train.models.batch import ModelBatch, TokenSequence, collate
from care_train.models.lora import add_adapters, has_adapters
from care_train.models.policy import Policy
from care_train.models.prompts import EncodedPrompt, PromptEncoder, TokenText
from care_train.rollout.engine import (
    Completion,
    Request,
    RolloutEngine,
    SamplingSettings,
    banned_token_ids,
    request_seed,
)

_OVERRIDDEN = {
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "num_beams": 1,
}
"""What the rollout engine sets for every generation, whatever the model's file says."""

_LEAKING = """
bad_words_ids begin_suppress_tokens encoder_no_repeat_ngram_size epsilon_cutoff eta_cutoff
exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id guidance_scale min_length
min_new_tokens min_p sequence_bias stop_strings suppress_tokens typical_p
""".split()
"""What it does not set: transformers fills it in from the model's generation_config.json."""


def check_tags(subject: Subject) -> Finding:
    """A response's tags survive tokenising, decode to text, and give the spans' tokens."""
    loaded, prompt = subject.model, subject.config.prompt
    think, answer = prompt.think_tag, prompt.answer_tag
    text = f"<{think}>so 4</{think}>\n<{answer}>4</{answer}>"
    ids = loaded.tokenizer(text, add_special_tokens=False)["input_ids"]
    decoded, ends = TokenText(loaded.tokenizer).decode(ids)
    if decoded != text:
        return error(
            f"{text!r} decodes to {decoded!r}: a tag is a special token, which has no text",
            "set prompt.tags to names that are no special tokens "
            "(`reasoning` for models whose <think> is one)",
        )
    spans = token_spans(parse_spans(decoded, think, answer), ends)
    if spans.answer_content is None or spans.think_content is None:
        return error(f"no spans are found in {text!r}", "set other tag names")
    banned = set(ids) & set(banned_token_ids(loaded))
    if banned:
        tokens = loaded.tokenizer.convert_ids_to_tokens(sorted(banned))
        return error(f"{tokens} may never be sampled", "set other tag names")
    return ok(f"<{think}> and <{answer}> tokenise: {len(ids)} tokens in a short response")


def check_special_ids(subject: Subject) -> Finding:
    """EOS, pad and image ids exist, agree over configuration and tokenizer, and do not collide."""
    loaded = subject.model
    rows, eos = loaded.model.get_input_embeddings().num_embeddings, loaded.eos_token_ids
    if any(i is None or not 0 <= i < rows for i in eos):
        fix = "set eos_token_id in generation_config.json"
        return error(f"EOS ids {eos} are not below {rows}", fix)
    if loaded.tokenizer.eos_token_id not in eos:
        return warning(
            f"generation ends at {eos}, the tokenizer's EOS is {loaded.tokenizer.eos_token_id}",
            "make generation_config.json and the tokenizer agree",
        )
    image = loaded.image_token_id
    if loaded.processor is not None:
        fix = "correct image_token_id in the model's config.json"
        token = loaded.processor.image_token
        wanted = loaded.tokenizer.convert_tokens_to_ids(token)
        if wanted != image:
            found = f"the processor writes {token} = {wanted}, the model looks for image_token_id"
            return error(f"{found} {image}", fix)
        if image in (*eos, loaded.pad_token_id):
            return error(f"the image token {wanted} is also EOS or padding", fix)
    return ok(f"EOS {eos}, pad {loaded.pad_token_id}, image {image}")


def check_image_tokens(subject: Subject) -> Finding:
    """The encoder's prompt, the processor's and our own expansion of placeholders agree."""
    loaded = subject.model
    if loaded.processor is None:
        return ok("a text model")
    images = loaded.processor.image_processor
    vision = loaded.model.config.vision_config
    for key, own in (("spatial_merge_size", "merge_size"), ("patch_size", "patch_size")):
        if getattr(vision, key, None) != getattr(images, own):
            return error(
                f"the model's vision {key} is {getattr(vision, key, None)}, the image processor's "
                f"{own} {getattr(images, own)}",
                "use the processor that belongs to the model",
            )
    drawn = Image.new("RGB", (96, 64), "red")
    sample = Sample(
        id="doctor", prompt="what is it?", answer="red", images=(drawn,), location="a drawn image"
    )
    encoder = PromptEncoder(loaded, subject.config.prompt)
    (encoded,) = encoder.encode([sample])
    assert encoded.image_grid_thw is not None
    count = int(encoded.image_grid_thw.prod()) // images.merge_size**2
    ids = loaded.tokenizer(encoder.render(sample), add_special_tokens=False)["input_ids"]
    expanded = tuple(x for i in ids for x in ([i] * count if i == loaded.image_token_id else [i]))
    if expanded != encoded.token_ids:
        return error(
            f"an image becomes {len(encoded.token_ids)} prompt tokens in the processor and "
            f"{len(expanded)} by its grid of {count}",
            "use the processor that belongs to the model, and one transformers version",
        )
    return ok(f"an image of 96 x 64 pixels is {count} tokens, however expanded")


def check_template(subject: Subject) -> Finding:
    """The chat template keeps the question and the system message, and opens the answer's turn."""
    text, system = "doctor's question?", subject.config.prompt.system
    rendered = _render(subject, text, opens_turn=True)
    closed = _render(subject, text, opens_turn=False)
    lost = [part for part in (text, system) if part and part.strip() not in rendered]
    if lost:
        return error(f"it drops {lost[0]!r}", "correct chat_template in the model's folder")
    tail = rendered[len(closed) :] if rendered.startswith(closed) else rendered[-40:]
    if not tail.strip():
        return warning("it opens no turn for the answer", "correct the generation prompt")
    # It refuses a template that opens a rationale with another tag, and leaves one to the response.
    PromptEncoder(subject.model, subject.config.prompt)
    tag = f"<{subject.config.prompt.think_tag}>"
    left = f"; {tag} is left to the responses" if tag in tail else ""
    return ok(f"prompts end with {tail!r}{left}")


def check_generation_config(subject: Subject) -> Finding:
    """What the model's generation_config.json would change in rollouts, unasked."""
    own = subject.model.model.generation_config
    does_nothing = (None, 0, 1.0, [], {})
    leaking = [f"{k}={v}" for k in _LEAKING if (v := getattr(own, k, None)) not in does_nothing]
    if leaking:
        return warning(
            f"generation_config.json changes how rollouts are sampled: {', '.join(leaking)}",
            "remove these keys from the model's generation_config.json",
        )
    ignored = [
        f"{key}={value}"
        for key, plain in _OVERRIDDEN.items()
        if (value := getattr(own, key, None)) not in (None, plain)
    ]
    return ok(f"ignored in rollouts: {', '.join(ignored)}" if ignored else "changes no sampling")


def _render(subject: Subject, content: str, *, opens_turn: bool) -> str:
    """The chat template's text of a question, with the run's system message."""
    template: Any = subject.model.processor or subject.model.tokenizer
    system = subject.config.prompt.system
    messages = [] if system is None else [{"role": "system", "content": system}]
    messages.append({"role": "user", "content": content})
    return template.apply_chat_template(messages, tokenize=False, add_generation_prompt=opens_turn)


_NUM_PROMPTS = 4
_NUM_TOKENS = 16
_ERROR_GAP = 0.5
"""Mean gap in nats beyond which the engine samples from another policy."""
_WARNING_GAP = {"float32": 0.01, "bfloat16": 0.05}


def check_parity(subject: Subject) -> Finding:
    """Log-probs of a few sampled tokens: rollout engine against the trainer's forward.

    An engine that keeps no log-probs samples greedily instead, where the trainer must find no
    token likelier than the engine's.
    """
    encoder = PromptEncoder(subject.model, subject.config.prompt)
    rows = spread(subject.rows, _NUM_PROMPTS)
    prompts = encoder.encode(rows)
    engine = _rollout_engine(subject, encoder)
    rollout = subject.config.rollout
    length = min(_NUM_TOKENS, rollout.max_new_tokens)
    requests = [
        Request(prompt, request_seed(subject.config.seed, 0, row.id, 0))
        for prompt, row in zip(prompts, rows, strict=True)
    ]
    completions = engine.generate(requests, SamplingSettings(length, rollout.temperature))
    if any(completion.log_probs is None for completion in completions):
        completions = engine.generate(requests, SamplingSettings(length, greedy=True))
    gaps, batch = _gaps(subject, prompts, completions)
    mean, worst = float(gaps.mean()), int(gaps.argmax())
    token = subject.model.tokenizer.convert_ids_to_tokens(int(batch.target_ids[worst]))
    row = rows[int(batch.sequence_ids[worst])]
    text = (
        f"over {len(gaps)} tokens, rollouts and trainer differ by {mean:.2g} nats on average, "
        f"{float(gaps[worst]):.2g} at most ({token!r} in {row.where})"
    )
    if not mean <= _ERROR_GAP:  # A NaN is an error too.
        return error(
            text,
            "the engine does not sample the policy that is trained: check its version, "
            "model.attention and the processor; try rollout.engine=transformers",
        )
    if mean > _WARNING_GAP[subject.config.model.dtype]:
        return warning(text, "try model.dtype=float32 or another model.attention")
    return ok(text)


@torch.no_grad()
def _gaps(
    subject: Subject, prompts: Sequence[EncodedPrompt], completions: Sequence[Completion]
) -> tuple[torch.Tensor, ModelBatch]:
    """[N] nats of each sampled token, and the batch that they are rows of: |engine - trainer|, or
    below the trainer's best token where the engine keeps no log-probs."""
    loaded, temperature = subject.model, subject.config.rollout.temperature
    sequences = [
        TokenSequence(prompt, (), completion.token_ids)
        for prompt, completion in zip(prompts, completions, strict=True)
    ]
    batch = collate(sequences, loaded.pad_token_id, loaded.image_token_id)
    batch = batch.to(loaded.model.device)
    was_training = loaded.model.training
    loaded.model.eval()
    policy = Policy(loaded.model)
    logits = policy.head.logits(policy.hidden_states(batch).flatten(0, 1)[batch.rows])
    loaded.model.train(was_training)
    # The engine's distribution is the one after bans.
    banned = torch.tensor(banned_token_ids(loaded), dtype=torch.int64, device=logits.device)
    logits.index_fill_(1, banned, -torch.inf)
    kept = [completion.log_probs for completion in completions]
    chosen = batch.target_ids[:, None]
    if any(row is None for row in kept):
        return logits.max(1).values - logits.gather(1, chosen)[:, 0], batch
    own = (logits / temperature).log_softmax(1).gather(1, chosen)[:, 0]
    theirs = torch.tensor([x for row in kept if row is not None for x in row])
    return (theirs.to(own) - own).abs(), batch


def _rollout_engine(subject: Subject, encoder: PromptEncoder) -> RolloutEngine:
    # Imported here: DeepSpeed comes with it, and where that is broken this one check is.
    from care_train.distributed import initialize_process_group
    from care_train.training.groups import RolloutScorer
    from care_train.training.session import Session
    from care_train.verifier import Verifier

    # vLLM joins the process group that a run has.
    initialize_process_group()
    config = subject.config
    verifier = Verifier(config.prompt, config.reward)
    scorer = RolloutScorer(TokenText(subject.model.tokenizer), verifier, config.prompt)
    lora = config.model.adapters
    if config.rollout.vllm.lora == "adapter" and lora and not has_adapters(subject.model.model):
        # As the run will send them; untrained they change nothing.
        add_adapters(subject.model.model, lora, config.seed)
    # Here is one process, and so one worker.
    vllm = replace(config.rollout.vllm, tensor_parallel_size=1)
    config = replace(config, rollout=replace(config.rollout, vllm=vllm))
    return Session(config, subject.model, encoder, scorer).rollout_engine()
