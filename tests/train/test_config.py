"""Configuration: layers, presets, clear errors."""

import re
from pathlib import Path

import pytest
import yaml

from care_train.config import (
    TABLE_5,
    BuildSettings,
    Role,
    build_config,
    config_to_dict,
    config_to_yaml,
    find_key,
    list_keys,
    load_config,
    role_of,
)
from care_train.config.hints import FOREIGN

ZERO_FILES = Path(__file__).parents[2] / "configs" / "deepspeed"


def test_overrides_win_over_the_file_and_the_file_over_the_algorithm(tmp_path):
    """defaults < algorithm's Table 5 < preset < YAML < a.b=c."""
    path = tmp_path / "c.yaml"
    path.write_text("algorithm: grpo\nloss: {kl_coef: 0.5}\ntrain: {steps: 7}\n")
    config = load_config(path, ["train.steps=9", "rollout.top_p=0.9"])
    assert (config.loss.clip_eps_high, config.loss.kl_coef) == (0.2, 0.5)
    assert (config.train.steps, config.rollout.top_p) == (9, 0.9)


def test_a_file_extends_another(tmp_path):
    """`extends` lays a file over the one it names, relative to itself."""
    (tmp_path / "base.yaml").write_text("train: {steps: 7, learning_rate: 1e-4}\nseed: 3\n")
    (tmp_path / "top.yaml").write_text("extends: base.yaml\ntrain: {steps: 9}\n")
    config = load_config(tmp_path / "top.yaml")
    assert (config.train.steps, config.train.learning_rate, config.seed) == (9, 1e-4, 3)


ZERO = "deepspeed.config.zero_optimization"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.step=3", r"unknown key 'train\.step'; did you mean 'train\.steps'"),
        ("care.reflection.cues=x", r"unknown key 'care\.reflection\.cues'; did you mean"),
        ("train.steps=many", r"train\.steps: got 'many'.*integer"),
        ("algorithm=ppo", r"algorithm: got 'ppo', wanted care \| grpo \| dapo"),
        ("reward.format_weight=0.5", r"format_weight: got 0\.5, wanted a number in \[0, 0\.5\)"),
        ("care.neg_scale=0", r"care\.neg_scale: got 0, wanted a number in \(0, 1\]"),
        ("care.reflection.reflect_scale=0.9", r"reflect_scale: got 0\.9, wanted in \(0, neg_scale"),
        ("rollout.temperature=0", r"rollout\.temperature: got 0, wanted a number, above 0"),
        ("train.mini_batches=5", r"train\.mini_batches: got 5, wanted a divisor"),
        (
            "rollout.vllm.lora=adapter",
            r"vllm\.lora: got 'adapter', wanted 'merged' without",
        ),
        (
            "model.lora.vision=true rollout.vllm.lora=adapter",
            r"vllm\.lora: got 'adapter', wanted 'merged' with model\.lora\.vision",
        ),
        (
            "model.lora.modules_to_save=[merger] rollout.vllm.lora=adapter",
            r"vllm\.lora: got 'adapter', wanted 'merged' with model\.lora\.modules_to_save",
        ),
        ("preset=literal loss.aggregation=token", r"loss\.aggregation: got 'token', wanted 'seq"),
        ("care.rescue=-1", r"care\.rescue: got -1, wanted a number, at least 0"),
        ("steps", r"override 'steps': wanted the form section\.key=value"),
        ("model.lora.rank=0", r"model\.lora\.rank: got 0, wanted an integer, at least 1"),
        ("model.lora.target_modules=all", r"target_modules: got 'all', wanted all-linear or a"),
        ("model.lora.ranks=4", r"unknown key 'model\.lora\.ranks'; did you mean"),
        (
            "model.lora.vision=true train.freeze_vision=true",
            r"train\.freeze_vision: got True, wanted false with model\.lora\.vision",
        ),
        (f"deepspeed.zero_stage=3 {ZERO}.stage=2", rf"{ZERO}\.stage: got 2, wanted 3"),
        (f"{ZERO}.stage=2", rf"{ZERO}\.stage: got 2, wanted 0, which is deepspeed.zero_stage"),
        ("deepspeed.config.bf16.enabled=true", r"bf16\.enabled: got True, wanted false with"),
        (
            "model.dtype=bfloat16 deepspeed.config.bf16.enabled=false",
            r"bf16\.enabled: got False, wanted true with model.dtype = bfloat16",
        ),
        ("deepspeed.config.fp16.enabled=true", r"fp16: .* wanted no such key: model.dtype"),
        ("deepspeed.config.gradient_clipping=1", r"gradient_clipping: .* train.max_grad_norm"),
        ("deepspeed.config.train_batch_size=8", r"train_batch_size: .* train.prompts_per_step"),
        (f"{ZERO}.offload_optimizer.device=cpu", r"offload_optimizer: .*zero_stage 1, got stage"),
        (
            f"deepspeed=zero2 {ZERO}.offload_param.device=cpu",
            r"offload_param: .*zero_stage 3, got stage 2",
        ),
        ("deepspeed=zero4", r"deepspeed: got 'zero4', wanted one of zero1, zero2, z"),
        ("reward.functions.g.weight=2", r"functions\.g: got .*functions\.g=file\.py:function"),
        ("reward.functions.g=3", r"functions\.g: got .*functions\.g=file\.py:function"),
    ],
)
def test_bad_settings_say_key_got_and_wanted(override, message):
    """An unknown key, a wrong value, or what DeepSpeed or LoRA is told against other settings is
    an error naming key, got and wanted."""
    with pytest.raises(ValueError, match=message):
        load_config(None, override.split())


def test_no_number_is_negative_or_not_a_number():
    """-1 where numbers start at 0 or above, and .nan, are refused by key; seeds may be anything."""
    numbers = [key.name for key in list_keys() if re.match(r"-?[0-9.]+(e|$)", key.default)]
    assert {"train", "sft", "rollout", "loss", "care", "reward", "eval", "limits"} <= {
        name.split(".")[0] for name in numbers
    }
    for name in numbers:
        for wrong in (".nan",) if name == "seed" else (".nan", "-1"):
            with pytest.raises(ValueError, match=re.escape(name.split(".")[-1])):
                load_config(None, [f"{name}={wrong}"])


def test_a_missing_or_broken_file_is_named(tmp_path):
    """A config file that is not there, or not a mapping, is named."""
    with pytest.raises(ValueError, match=r"nowhere\.yaml: not found"):
        load_config(tmp_path / "nowhere.yaml")
    (tmp_path / "list.yaml").write_text("- a\n- b\n")
    with pytest.raises(ValueError, match=r"list\.yaml: got list, wanted key: value lines"):
        load_config(tmp_path / "list.yaml")


def test_the_resolved_config_reads_back_equal():
    """config.yaml of a run is the run: loading it gives the same configuration."""
    config = build_config({"algorithm": "gspo", "preset": "official", "train": {"steps": 3}})
    assert build_config(yaml.safe_load(config_to_yaml(config))) == config


def test_presets_change_what_they_name():
    """`official` brings the token-mean loss; a user's own value still wins."""
    assert build_config({"preset": "official"}).loss.aggregation == "token"
    own = build_config({"preset": "official", "loss": {"aggregation": "sequence"}})
    assert own.loss.aggregation == "sequence"
    assert build_config({"preset": "literal"}).care.decisions.proxy_score == "sum"


def test_every_algorithm_has_its_table_5_row():
    """Each algorithm brings its clip range and KL coefficient (Table 5)."""
    for name, layer in TABLE_5.items():
        loss = build_config({"algorithm": name}).loss
        for key, value in layer["loss"].items():
            assert getattr(loss, key) == value


def test_every_key_is_described():
    """--help explains every setting."""
    assert all(key.meaning for key in list_keys())


@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3", "zero3_offload"])
def test_a_deepspeed_name_brings_the_whole_section(name, tmp_path):
    """`deepspeed=NAME` replaces what a file below says, and can be changed after it."""
    path = tmp_path / "c.yaml"
    path.write_text("deepspeed: {zero_stage: 1, config: {zero_optimization: {stage: 1}}}\n")
    config = load_config(path, [f"deepspeed={name}", "deepspeed.config.wall_clock_breakdown=true"])
    section = yaml.safe_load((ZERO_FILES / f"{name}.yaml").read_text())
    assert config.deepspeed.zero_stage == int(name[4]) == section["zero_stage"]
    assert config.deepspeed.config == section["config"] | {"wall_clock_breakdown": True}
    assert config.deepspeed.offloads_optimizer == name.endswith("offload")
    # In a file the same.
    path.write_text(f"deepspeed: {name}\n")
    assert load_config(path).deepspeed.zero == config.deepspeed.zero


def test_an_own_deepspeed_file(tmp_path):
    """A path is taken as it is."""
    path = tmp_path / "mine.yaml"
    path.write_text("zero_stage: 2\n")
    assert load_config(None, [f"deepspeed={path}"]).deepspeed.zero_stage == 2


def test_lora_is_off_until_a_key_of_it_is_set():
    """`model.lora.rank=8` alone turns it on, and a run's config.yaml says so."""
    assert build_config({}).model.lora is None
    config = load_config(None, ["model.lora.rank=8"])
    assert config.model.lora is not None and config.model.lora.rank == 8
    assert build_config(yaml.safe_load(config_to_yaml(config))) == config
    assert "model.lora.rank" in {key.name for key in list_keys()}


class TestFiles:
    """A YAML file is read as meant, or refused with the lines."""

    @staticmethod
    def load(tmp_path, text, *overrides):
        (tmp_path / "c.yaml").write_text(text)
        return load_config(tmp_path / "c.yaml", overrides)

    @pytest.mark.parametrize(
        ("text", "key", "lines"),
        [
            ("seed: 1\nname: a\nseed: 2\n", "seed", (1, 3)),
            ("train:\n  steps: 2\n  warmup_steps: 1\n  steps: 3\n", "train.steps", (2, 4)),
            ("train: {steps: 1}\nseed: 1\ntrain: {seed: 2}\n", "train", (1, 3)),
            ("train.steps: 2\ntrain: {steps: 1}\n", "train.steps", (1, 2)),
            ("train: {steps: 1}\ntrain.steps: 2\n", "train.steps", (1, 2)),
            ("train.steps: 2\ntrain: 5\n", "train", (1, 2)),
            ("deepspeed:\n  config:\n    a: 1\n    b: 1\n    a: 2\n", "deepspeed.config.a", (3, 5)),
        ],
    )
    def test_a_key_given_twice(self, tmp_path, text, key, lines):
        """Both lines are named, whichever way the key is written."""
        first, second = lines
        message = rf"{re.escape(key)} is given twice, in lines {first} and {second}: remove one"
        with pytest.raises(ValueError, match=message):
            self.load(tmp_path, text)

    def test_dotted_keys(self, tmp_path):
        """`train.steps: 7` is that key; a free mapping's keys keep their dots."""
        text = "train.steps: 7\ntrain: {warmup_steps: 3}\ndeepspeed.config: {a.b: 1e-3}\n"
        config = self.load(tmp_path, text)
        assert (config.train.steps, config.train.warmup_steps) == (7, 3)
        assert config.deepspeed.config == {"a.b": 0.001}

    def test_a_merged_anchor_is_not_given_twice(self, tmp_path):
        """A mapping's own keys replace those that `<<` brings."""
        config = self.load(tmp_path, "train:\n  <<: {steps: 3, warmup_steps: 4}\n  steps: 5\n")
        assert (config.train.steps, config.train.warmup_steps) == (5, 4)

    def test_a_file_that_is_no_yaml(self, tmp_path):
        """The parser's own message, with the file."""
        with pytest.raises(ValueError, match=r"c\.yaml: not YAML: while parsing a flow mapping"):
            self.load(tmp_path, "train: {steps: 1\n")


@pytest.mark.parametrize("null", ["null", "~", "None", "none"])
def test_every_spelling_of_null(null, tmp_path):
    """Where null is allowed, on the command line and in files; elsewhere it is an error or text."""
    overrides = [f"prompt.system={null}", f"train.micro_batch_tokens={null}"]
    config = load_config(None, [*overrides, f"deepspeed.config.x={null}"])
    assert config.prompt.system is config.train.micro_batch_tokens is None
    assert config.deepspeed.config == {"x": None}
    path = tmp_path / "c.yaml"
    path.write_text(f"prompt: {{system: {null}}}\n")
    assert load_config(path).prompt.system is None
    with pytest.raises(ValueError, match=r"train\.steps: got .*, wanted an integer, at least 1"):
        load_config(None, [f"train.steps={null}"])


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("name=7", "7"),
        ("name=1e-3", "1e-3"),
        ("prompt.answer_tag=no", "no"),
        ("care.reflection.cue=look again:", "look again:"),
        ("prompt.system='quoted: text'", "quoted: text"),
    ],
)
def test_text_is_text(override, value):
    """A setting that is text takes what is typed, number or mapping as YAML may find it."""
    config = config_to_dict(load_config(None, [override]))
    for part in override.partition("=")[0].split("."):
        config = config[part]
    assert config == value


def test_numbers_in_scientific_notation():
    """YAML 1.1 reads 1e-3 as text; here it is a number, in free mappings too."""
    free = ["deepspeed.config.a.b=1e-3", "deepspeed.config.c={d: -2E+5}"]
    config = load_config(None, ["train.learning_rate=2e-4", *free])
    assert config.train.learning_rate == 2e-4
    assert config.deepspeed.config == {"a": {"b": 0.001}, "c": {"d": -200000.0}}


def test_reward_functions_by_name(tmp_path):
    """NAME=file.py:function adds one, NAME.key=value changes it, also one of a file."""
    path = tmp_path / "c.yaml"
    path.write_text("reward: {functions: [{function: a.py:f}]}\n")
    overrides = ["reward.functions.g=a.py:g", "reward.functions.g.weight=2"]
    functions = load_config(path, [*overrides, "reward.functions.f.weight=0.5"]).reward.functions
    assert [(one.function, one.weight) for one in functions] == [("a.py:f", 0.5), ("a.py:g", 2)]


@pytest.mark.parametrize("name", sorted(FOREIGN))
def test_names_of_other_trainers(name):
    """TRL's, verl's and EasyR1's names get the name here, which exists."""
    for section in ("", "trainer."):
        with pytest.raises(ValueError, match=f"'{section}{name}'; here it is {FOREIGN[name][:20]}"):
            load_config(None, [f"{section}{name}=1"])
    target = re.match(r"[a-z_.NAME]+", FOREIGN[name])
    assert target is not None and find_key(target[0]) is not None, FOREIGN[name]


def test_roles():
    """A key has its own role or its section's; one below a free mapping has the mapping's."""
    roles = {
        "train.steps": Role.DECIDES,
        "train.save_every": Role.FREE,
        "eval.data": Role.FREE,
        "model.lora.rank": Role.FIXED,
        "model.lora.alpha": Role.DECIDES,
        "deepspeed.config.zero_optimization.stage": Role.DECIDES,
        "rollout.vllm.enforce_eager": Role.SPEED,
        "care.decisions.partial": Role.DECIDES,
    }
    assert {key: role_of(key) for key in roles} == roles
    assert role_of("workers", BuildSettings) is Role.FREE
    with pytest.raises(ValueError, match=r"nothing\.here: no such setting"):
        role_of("nothing.here")


@pytest.mark.parametrize(
    "override",
    [
        "care.clamp_anchor=true",
        "eval.data.split=test",
        "limits.other=3600",
        "logging.wandb=false",
        "loss.importance_cap=2",
        "preset=official care.reflection.temperature=0.6",
        "algorithm=cispo loss.surrogate=cispo",
        "train.adam_betas=[0.9,0.999]",
    ],
)
def test_what_an_older_version_wrote_is_read(override):
    """An older run's config.yaml names every setting: one that is gone may say what it is now."""
    settings = [word for word in override.split() if word.startswith(("preset", "algorithm"))]
    assert load_config(None, override.split()) == load_config(None, settings)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("care.clamp_anchor=false", "care.clamp_anchor: got False, but this setting is gone"),
        ("care.robust=true", "care.robust: got True, but this setting is gone: mean and standard"),
        ("care.rescue.scale=0.3", "care.rescue.scale: got 0.3, .* gone: care.rescue is its scale"),
        ("care.reflection.top_p=0.5", "care.reflection.top_p: got 0.5, .* gone: the preset"),
        ("care.decisions.partial=literal", "care.decisions: .* wanted no such key: preset sets"),
        ("data.split=dev", "data.split: got 'dev', .* gone: append @SPLIT"),
        ("eval.data.path=x", "eval.data.path: got 'x', .* gone: eval.data is the path itself"),
        ("limits.generate=60", "limits.generate: got 60, .* gone: limits.step bounds"),
        ("logging.wandb=true", "logging.wandb: got True, .* gone: logging.report_to lists"),
        ("loss.surrogate=sapo", "loss.surrogate: got 'sapo', .* gone: algorithm=cispo and"),
        ("loss.importance_floor=0.5", "gone: it is the first number of loss.importance_range"),
        ("rollout.vllm.sleep_level=0", "sleep_level: got 0, .* gone: it is 1 under rollout.vllm"),
        ("train.adam_betas=[0.9,0.95]", "train.adam_betas: got .* this setting is gone: AdamW"),
    ],
)
def test_a_setting_that_is_gone_says_what_takes_its_place(override, message):
    """Never ignored where it would have made a difference."""
    with pytest.raises(ValueError, match=message):
        load_config(None, [override])


def test_the_table_of_other_trainers_names_is_true():
    """docs/coming_from.md: every name is recognised, and what it is here is a key."""
    text = (Path(__file__).parents[2] / "docs" / "coming_from.md").read_text()
    table = text.partition("| TRL | verl | EasyR1 | here |")[2].partition("\n\n")[0]
    rows = [re.findall(r"`([^`]+)`", line) for line in table.splitlines() if "`" in line]
    assert len(rows) > 30
    for *foreign, here in rows:
        assert find_key(here) is not None, here
        for name in foreign:
            assert re.match(rf"{re.escape(here)}\b", FOREIGN[name]), (name, FOREIGN[name])
