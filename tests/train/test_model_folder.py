"""A model's folder that is incomplete, damaged or another model's is refused by name."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel

from care_train.models.folder import check_tokenizer
from care_train.models.load import auto_class
from tests.train.builders import encoder_of, load


def _without(*names):
    return lambda folder: [(folder / name).unlink() for name in names]


def _halved(name):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-200])


def _pointer(name):
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:0b51\nsize 4096\n"
    return lambda folder: (folder / name).write_text(text)


def _config(**changes):
    def change(folder):
        values = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(values | changes))
        (folder / "code.py").write_text("raise SystemExit('code of the folder was run')\n")

    return change


def _weights(change):
    """`change(name, weight)` gives the pair to keep, or None."""

    def rewrite(folder):
        path = folder / "model.safetensors"
        changed = (change(*item) for item in load_file(path).items())
        save_file(dict(pair for pair in changed if pair), path, {"format": "pt"})

    return rewrite


def _sharded(folder):
    """Two shards, of which the second was never fetched."""
    names = list(load_file(folder / "model.safetensors"))
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    shards = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(names)}
    index = {"metadata": {}, "weight_map": shards}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _adapter_alone(folder):
    _without("config.json", "model.safetensors")(folder)
    (folder / "adapter_config.json").write_text("{}")


DAMAGED = {
    "wrapped": (_weights(lambda n, w: (f"engine.{n}", w)), r"\d+ weights .* prefix 'engine\.'"),
    "a layer is missing": (
        _weights(lambda n, w: None if "layers.0.self_attn.q_proj" in n else (n, w)),
        r"weights of the model are not in the folder: .*layers\.0\.self_attn\.q_proj",
    ),
    "a layer has another name": (
        _weights(lambda n, w: (n.replace("layers.1.mlp.up_proj", "layers.1.mlp.up"), w)),
        r"not in .*up_proj.*; 1 in the folder .*up\.weight",
    ),
    "a value head": (
        _weights(lambda n, w: (n.replace("lm_head", "value_head"), w)),
        r"1 in the folder .*value_head\.weight",
    ),
    "another width": (
        _weights(lambda n, w: (n, w[:, :3].contiguous() if "layers.0.mlp.gate_proj" in n else w)),
        r"another shape: .*gate_proj.* \[192, 3\] instead of \[192, 64\]",
    ),
    "no weights": (_without("model.safetensors"), "no weights there"),
    "weights cut short": (_halved("model.safetensors"), r"model\.safetensors cannot be read"),
    "a shard is missing": (_sharded, r"lists model-00002-of-00002\.safetensors, not there"),
    "a pointer": (_pointer("model.safetensors"), "model.safetensors: a Git LFS pointer"),
    "config cut short": (_halved("config.json"), r"config\.json cannot be read"),
    "tokenizer cut short": (_halved("tokenizer.json"), "cannot be read"),
    "generation config cut short": (
        lambda folder: (folder / "generation_config.json").write_text("{"),
        r"generation_config\.json cannot be read",
    ),
    "no tokenizer": (_without("tokenizer.json", "tokenizer_config.json"), "token"),
    "no vocabulary": (_without("tokenizer.json"), "loses text: .*tokenizer.json"),
    "code of its own": (
        _config(model_type="own", auto_map={"AutoConfig": "code.Config"}),
        "model_type 'own' needs the code in the folder, which is never run",
    ),
    "unknown to transformers": (_config(model_type="own"), "config.json cannot be read.*'?own"),
    "quantised": (_config(quantization_config={"quant_method": "awq"}), "quantised"),
    "an adapter alone": (_adapter_alone, "an adapter alone; merge it"),
}


# A model that reads images needs its processor.
PROCESSOR = "processor_config.json"
NO_PROCESSOR = {
    "no processor": (_without(PROCESSOR), r"processor_config\.json"),
    "processor cut short": (_halved(PROCESSOR), r"processor_config\.json"),
}
CASES = [("tiny-qwen2", *case) for case in DAMAGED.values()]
CASES += [("tiny-qwen2.5-vl", *case) for case in NO_PROCESSOR.values()]


@pytest.mark.parametrize(("kind", "damage", "message"), CASES, ids=[*DAMAGED, *NO_PROCESSOR])
def test_a_folder_that_is_not_whole_is_refused(kind, damage, message, tiny_folder, tmp_path):
    """Nothing is filled with random weights or an empty vocabulary, no code is run or asked about:
    the error names `model.path`, the folder and what is wrong in it."""
    folder = shutil.copytree(tiny_folder(kind), tmp_path / "model")
    damage(folder)
    with pytest.raises(ValueError, match=rf"^model\.path: {folder}: .*{message}"):
        load(folder)


def test_a_tokenizer_of_another_size_is_refused(tiny_folder):
    """More tokens than embeddings, or a vocabulary that lost its larger part."""
    tokenizer = load(tiny_folder()).tokenizer
    for embeddings in (len(tokenizer) - 1, 2 * len(tokenizer)):
        with pytest.raises(ValueError, match=f"{embeddings} embeddings: it is another model's"):
            check_tokenizer(tiny_folder(), tokenizer, embeddings)
    check_tokenizer(tiny_folder(), tokenizer, len(tokenizer) + 8)


@pytest.mark.parametrize(
    ("template", "message"),
    [(None, "chat template"), ("{% if %}", "chat template"), ("{{ raise_exception('no') }}", "no")],
)
def test_a_chat_template_that_makes_no_prompt_is_refused(template, message, tiny_folder, tmp_path):
    """None, a damaged one, and one that refuses such messages."""
    folder = shutil.copytree(tiny_folder("tiny-qwen2"), tmp_path / "model")
    path = folder / "chat_template.jinja"
    path.unlink() if template is None else path.write_text(template)
    with pytest.raises(ValueError, match=rf"^model\.path: {folder}: .*{message}.*system=null"):
        encoder_of(load(folder))


def test_a_text_checkpoint_may_carry_a_vision_config(tiny_folder, tmp_path):
    """What a model is, its `architectures` say: no processor is asked for."""
    config = load(tiny_folder("tiny-qwen2")).model.config
    config.vision_config = {"depth": 2}
    assert auto_class(config) is AutoModelForCausalLM
    vision = load(tiny_folder("tiny-qwen3-vl")).model.config
    assert auto_class(vision) is AutoModelForImageTextToText


def test_a_model_that_drops_encoded_images_is_refused(tiny_folder, monkeypatch):
    """As all do before transformers 5.18: it would learn and answer without seeing any."""
    monkeypatch.setattr(Qwen2_5_VLModel, "forward", lambda self, input_ids=None, **kwargs: None)
    with pytest.raises(ValueError, match="takes no encoded images"):
        load(tiny_folder("tiny-qwen2.5-vl"))
