"""Checks of the model's tokenizer, processor, template and ids against what training needs."""

from typing import Any

from PIL import Image

from care_train.algorithm.spans import parse_spans, token_spans
from care_train.data import Sample
from care_train.doctor import Finding, Subject, error, ok, warning
from care_train.models.load import LoadedModel
from care_train.models.prompts import PromptEncoder, TokenText
from care_train.rollout.engine import banned_token_ids

# Set by the rollout engine for every generation, so the model's own value does nothing there.
_OVERRIDDEN = {
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "num_beams": 1,
}
# Not set by it: transformers fills them in from the model's generation_config.
_LEAKING = (
    "bad_words_ids",
    "begin_suppress_tokens",
    "encoder_no_repeat_ngram_size",
    "epsilon_cutoff",
    "eta_cutoff",
    "exponential_decay_length_penalty",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "guidance_scale",
    "min_length",
    "min_new_tokens",
    "min_p",
    "sequence_bias",
    "stop_strings",
    "suppress_tokens",
    "typical_p",
)


def check_tags(subject: Subject) -> Finding:
    """A response's tags survive tokenising, decode to text, and give the spans' tokens."""
    loaded, prompt = subject.model, subject.config.prompt
    think, answer = prompt.think_tag, prompt.answer_tag
    if think == answer:
        return error(f"rationale and answer share the tag <{think}>", "rename one of them")
    text = f"<{think}>so 4</{think}>\n<{answer}>4</{answer}>"
    ids = loaded.tokenizer(text, add_special_tokens=False)["input_ids"]
    decoded, ends = TokenText(loaded.tokenizer).decode(ids)
    if decoded != text:
        return error(
            f"{text!r} decodes to {decoded!r}: a tag is a special token, which has no text",
            "set prompt.think_tag and prompt.answer_tag to names that are no special tokens "
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
    problem = _image_id_problem(loaded)
    if problem:
        return error(problem, "correct image_token_id in the model's config.json")
    return ok(f"EOS {eos}, pad {loaded.pad_token_id}, image {loaded.image_token_id}")


def _image_id_problem(loaded: LoadedModel) -> str:
    """Why images would not be found in a prompt; empty where they are."""
    if loaded.processor is None:
        return ""
    token = loaded.processor.image_token
    wanted = loaded.tokenizer.convert_tokens_to_ids(token)
    if wanted != loaded.image_token_id:
        return (
            f"the processor writes {token} = {wanted}, the model looks for "
            f"image_token_id {loaded.image_token_id}"
        )
    if loaded.image_token_id in (*loaded.eos_token_ids, loaded.pad_token_id):
        return f"the image token {wanted} is also EOS or padding"
    return ""


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
    (encoded,) = PromptEncoder(loaded, subject.config.prompt).encode([sample])
    content = [{"type": "image"}, {"type": "text", "text": sample.prompt}]
    rendered = _render(subject, content, opens_turn=True)
    assert encoded.image_grid_thw is not None
    count = int(encoded.image_grid_thw.prod()) // images.merge_size**2
    ids = loaded.tokenizer(rendered, add_special_tokens=False)["input_ids"]
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
    tag = f"<{subject.config.prompt.think_tag}>"
    if tag in tail:
        return error(
            f"it ends with {tail!r}: responses would start inside {tag}, and lack it",
            "remove the tag from the template's generation prompt, or rename prompt.think_tag",
        )
    if not tail.strip():
        return warning("it opens no turn for the answer", "correct the generation prompt")
    return ok(f"prompts end with {tail!r}")


def check_generation_config(subject: Subject) -> Finding:
    """What the model's generation_config.json would change in rollouts, unasked."""
    own = subject.model.model.generation_config
    leaking = {
        key: value
        for key in _LEAKING
        if (value := getattr(own, key, None)) not in (None, 0, 1.0, [], {})
    }
    if leaking:
        return warning(
            f"generation_config.json changes how rollouts are sampled: {_listed(leaking)}",
            "remove these keys from the model's generation_config.json",
        )
    ignored = {
        key: value
        for key, plain in _OVERRIDDEN.items()
        if (value := getattr(own, key, None)) not in (None, plain)
    }
    return ok(f"ignored in rollouts: {_listed(ignored)}" if ignored else "changes no sampling")


def _listed(values: dict[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in values.items())


def _render(subject: Subject, content: Any, *, opens_turn: bool) -> str:
    """The chat template's text of a question, with the run's system message."""
    template: Any = subject.model.processor or subject.model.tokenizer
    system = subject.config.prompt.system
    messages = [] if system is None else [{"role": "system", "content": system}]
    messages.append({"role": "user", "content": content})
    return template.apply_chat_template(messages, tokenize=False, add_generation_prompt=opens_turn)
