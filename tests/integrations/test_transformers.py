"""A transformers model on these kernels has the loss, the gradients and the training of its own."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertLMHeadModel,
    Cohere2Config,
    Cohere2VisionConfig,
    Cohere2VisionForConditionalGeneration,
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
    TrOCRConfig,
    TrOCRForCausalLM,
)

from care_kernels.integrations.transformers import use_care_kernels

CLOSE = {"rtol": 2e-5, "atol": 2e-6}

_SIZES = {
    "vocab_size": 211,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    "qwen3": {},
    "phi": {"num_key_value_heads": 2},  # a bias on the head
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2},  # its backbone is called transformer
    "gemma2": {"final_logit_softcapping": 3.0},
    "cohere": {"logit_scale": 0.3},
    "granite": {"logits_scaling": 4.0},
    "recurrent_gemma": {"logits_soft_cap": 3.0, "lru_width": 32, "attention_window_size": 8},
}


def _text_model(family: str) -> Any:
    sizes = _SIZES if family != "gpt2" else {"vocab_size": 211}
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **(sizes | FAMILIES[family]))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        # Larger weights than a fresh model's, so that softcap and scale show.
        if isinstance(module, nn.Linear) and module.out_features == 211:
            nn.init.normal_(module.weight, std=1.0)
    return model


def _text_batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(3, 211, (3, 9), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, 6:] = 0
    labels = input_ids.masked_fill(attention_mask == 0, -100)
    labels[0, :4] = -100
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def _image_batch(folder: Path) -> dict[str, torch.Tensor]:
    content = [{"type": "image"}, {"type": "text", "text": "what color is the image?"}]
    processor = AutoProcessor.from_pretrained(folder)
    text = processor.apply_chat_template([{"role": "user", "content": content}])
    images = [Image.new("RGB", (56, 56), "red"), Image.new("RGB", (56, 84), "blue")]
    batch = dict(processor(text=[text, text], images=images, padding=True, return_tensors="pt"))
    special = batch["input_ids"] == processor.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    batch["labels"] = batch["input_ids"].masked_fill(special | (batch["attention_mask"] == 0), -100)
    return batch


def _gradients(model: Any, batch: dict[str, Any]) -> tuple[Any, dict[str, torch.Tensor]]:
    model.zero_grad()
    outputs = model(**batch)
    outputs.loss.backward()
    return outputs, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def _assert_same_with_ours(model: Any, batch: dict[str, Any]) -> None:
    own, own_gradients = _gradients(model, batch)
    assert own.logits is not None
    use_care_kernels(model)
    ours, gradients = _gradients(model, batch)
    assert ours.logits is None
    torch.testing.assert_close(ours.loss, own.loss, **CLOSE)
    torch.testing.assert_close(gradients, own_gradients, **CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients(family):
    """The loss and every gradient of the model's own forward, softcap, scale and bias included."""
    _assert_same_with_ours(_text_model(family), _text_batch())


@pytest.mark.parametrize("kind", ("tiny-qwen2.5-vl", "tiny-qwen3-vl"))
def test_loss_and_gradients_with_images(kind, tiny_folder):
    """The same for a vision-language model, vision tower included."""
    model = AutoModelForImageTextToText.from_pretrained(tiny_folder(kind)).train()
    _assert_same_with_ours(model, _image_batch(tiny_folder(kind)))


def test_what_trainers_and_callers_pass():
    """Counts of labels, what sequence parallelism passes, another ignore index, and positions."""
    batch = _text_batch()
    shifted = nn.functional.pad(batch["labels"], (0, 1), value=-100)[:, 1:].contiguous()
    ignoring = batch["labels"].masked_fill(batch["labels"] == -100, 7)
    for more in (
        {"num_items_in_batch": 31},
        {"num_items_in_batch": torch.tensor(31)},
        {"shift_labels": shifted},
        {"labels": ignoring, "ignore_index": 7},
    ):
        _assert_same_with_ours(_text_model("llama"), batch | more)
    model = _text_model("llama")
    own = model(batch["input_ids"], batch["attention_mask"], labels=batch["labels"]).loss
    use_care_kernels(model)
    ours = model(batch["input_ids"], batch["attention_mask"], labels=batch["labels"])
    assert ours.logits is None
    torch.testing.assert_close(ours.loss, own, **CLOSE)


def test_no_labels_count_is_not_a_number():
    """With every label ignored the mean is 0/0, as the model's own; a given count makes it 0."""
    model = _text_model("llama")
    batch = _text_batch()
    batch["labels"] = torch.full_like(batch["labels"], -100)
    assert model(**batch).loss.isnan()
    use_care_kernels(model)
    assert model(**batch).loss.isnan()
    outputs, gradients = _gradients(model, batch | {"num_items_in_batch": 5})
    assert outputs.loss == 0 and not any(gradient.any() for gradient in gradients.values())


def test_everything_else_is_the_models_own():
    """Evaluation, generation, forwards without labels or gradients and tuples keep the logits."""
    batch = _text_batch()
    model, plain = _text_model("llama"), _text_model("llama")
    use_care_kernels(model)
    unlabelled = {name: value for name, value in batch.items() if name != "labels"}
    for training, arguments in ((False, batch), (True, unlabelled)):
        model.train(training)
        plain.train(training)
        assert torch.equal(model(**arguments).logits, plain(**arguments).logits)
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, plain(**batch).logits)
    assert torch.equal(model(**batch, return_dict=False)[1], plain(**batch, return_dict=False)[1])
    prompt = batch["input_ids"][:1]
    options = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.generate(prompt, **options), plain.generate(prompt, **options))


def _losses(model: Any, output_dir: Path, rows: list[dict[str, Any]], **settings: Any) -> list[Any]:
    arguments = TrainingArguments(
        str(output_dir),
        use_cpu=True,
        max_steps=3,
        logging_steps=1,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=0.1,
        optim="sgd",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **settings,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    history = trainer.state.log_history
    return [(e["loss"], e["grad_norm"]) for e in history if "grad_norm" in e]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_trainer_steps(smoothing, tmp_path):
    """Trainer's losses and gradient norms, accumulation over uneven label counts included."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for index in range(12):
        input_ids = torch.randint(3, 211, (10,), generator=generator)
        labels = input_ids.clone()
        labels[: index % 7] = -100
        rows.append({"input_ids": input_ids, "labels": labels})
    model, plain = _text_model("qwen3"), _text_model("qwen3")
    own = _losses(plain, tmp_path, rows, label_smoothing_factor=smoothing)
    use_care_kernels(model)
    ours = _losses(model, tmp_path, rows, label_smoothing_factor=smoothing)
    assert len(own) == 3 and own[0][0] != own[2][0]
    for got, wanted in zip(ours, own, strict=True):
        assert got == pytest.approx(wanted, rel=1e-5)
    torch.testing.assert_close(model.state_dict(), plain.state_dict(), rtol=1e-4, atol=1e-6)


def test_a_frozen_head_and_lora_on_the_head():
    """Without a gradient of its own, or with an adapter that is part of the matrix."""
    model: Any = _text_model("qwen3")
    model.lm_head.requires_grad_(False)
    _assert_same_with_ours(model, _text_batch())
    assert model.lm_head.weight.grad is None
    config = LoraConfig(r=4, target_modules=["lm_head", "q_proj"], init_lora_weights=False)
    model = get_peft_model(_text_model("qwen3"), config)
    _assert_same_with_ours(model, _text_batch())
    assert any("lm_head.lora_A" in n for n, p in model.named_parameters() if p.grad is not None)


def test_a_copy_of_a_patched_model_has_weights_of_its_own():
    """A deep copy evaluates and trains by its own weights, patched forwards included. What another
    library put before the forward cannot follow it: an error says so."""
    model = _text_model("llama")
    use_care_kernels(model)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.mul_(0.5)
    fresh = _text_model("llama")
    fresh.load_state_dict(copied.state_dict())
    batch = _text_batch()
    torch.testing.assert_close(copied.eval()(**batch).logits, fresh.eval()(**batch).logits)
    _, gradients = _gradients(copied.train(), batch)
    _, want = _gradients(fresh.train(), batch)
    torch.testing.assert_close(gradients, want, **CLOSE)
    wrapped = _text_model("llama")
    inner = wrapped.forward
    wrapped.forward = lambda *args, **kwargs: inner(*args, **kwargs)
    use_care_kernels(wrapped)
    assert wrapped.eval()(**batch).logits is not None
    with pytest.raises(RuntimeError, match="a copy of a model whose forward another library"):
        copy.deepcopy(wrapped)(**batch)


def test_errors_name_what_came():
    """Other models, losses and heads are refused when the call is made, not in the run."""
    with pytest.raises(ValueError, match="got Linear; wanted a transformers PreTrainedModel"):
        use_care_kernels(nn.Linear(2, 2))
    bart = BartConfig(vocab_size=30, d_model=16, encoder_layers=1, decoder_layers=1)
    bart.encoder_attention_heads = bart.decoder_attention_heads = 2
    with pytest.raises(ValueError, match="an encoder-decoder"):
        use_care_kernels(BartForConditionalGeneration(bart))
    model = _text_model("llama")
    model.loss_function = nn.functional.cross_entropy
    with pytest.raises(ValueError, match="cross_entropy; wanted ForCausalLMLoss"):
        use_care_kernels(model)
    model = _text_model("llama")
    use_care_kernels(model)
    with pytest.raises(ValueError, match="output_router_logits: got True"):
        model(**_text_batch(), output_router_logits=True)


class _EmbedsItself(LlamaForCausalLM):
    """As Qwen2.5-Omni's thinker, whose images its backbone never gets."""

    def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        return super().forward(inputs_embeds=self.get_input_embeddings()(input_ids), **kwargs)


_TOWERS = {"text_config": Cohere2Config(**_SIZES), "vision_config": _SIZES | {"image_size": 28}}
_OTHER = "whose forward makes other logits or another loss"
REFUSED: dict[str, tuple[Any, Any, str]] = {
    "dense layer and norm before the matrix": (
        BertLMHeadModel,
        BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, is_decoder=True),
        _OTHER,
    ),
    "the text config's scale left out": (
        Cohere2VisionForConditionalGeneration,
        Cohere2VisionConfig(**_TOWERS),
        _OTHER,
    ),
    "labels that are not shifted": (
        TrOCRForCausalLM,
        TrOCRConfig(vocab_size=30, d_model=16, decoder_layers=1, decoder_attention_heads=2),
        _OTHER,
    ),
    "embeddings of its own": (_EmbedsItself, LlamaConfig(**_SIZES), "whose forward embeds"),
    "no backbone under its prefix": (
        Llama4ForCausalLM,
        Llama4TextConfig(**_SIZES, num_local_experts=2),
        "without a backbone of its own",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_forward_that_is_more_than_backbone_and_head_is_refused(case):
    """Its loss would silently be another one: the model is named, and left as it was."""
    kind, config, message = REFUSED[case]
    model = kind(config).train()
    modules = dict(model.named_modules())
    with pytest.raises(ValueError, match=f"got {kind.__name__},? {message}"):
        use_care_kernels(model)
    assert dict(model.named_modules()) == modules
    assert model.training and "forward" not in vars(model)
