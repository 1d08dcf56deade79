"""Configuration: layers, presets, clear errors."""

import re
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from care_train.config import (
    PRESETS,
    TABLE_5,
    BuildSettings,
    CareSettings,
    Role,
    build_config,
    config_to_dict,
    config_to_yaml,
    dotted,
    find_key,
    list_keys,
    load_config,
    role_of,
)
from care_train.config.hints import FOREIGN

ROOT = Path(__file__).parents[2]


def load_text(folder: Path, text: str, *overrides: str):
    (folder / "c.yaml").write_text(text)
    return load_config(folder / "c.yaml", overrides)


def test_layers_lie_over_each_other(tmp_path):
    """defaults < the algorithm's Table 5 < preset < `extends` < YAML < a.b=c."""
    (tmp_path / "base.yaml").write_text("train: {steps: 7, learning_rate: 1e-4}\nseed: 3\n")
    text = "extends: base.yaml\nalgorithm: grpo\nloss: {kl_coef: 0.5}\ntrain: {steps: 8}\n"
    config = load_text(tmp_path, text, "train.steps=9", "rollout.top_p=0.9")
    assert (config.loss.clip_eps_high, config.loss.kl_coef) == (0.2, 0.5)
    assert (config.train.steps, config.rollout.top_p) == (9, 0.9)
    assert (config.train.learning_rate, config.seed) == (1e-4, 3)
    for name, layer in TABLE_5.items():
        loss = build_config({"algorithm": name}).loss
        assert {key: getattr(loss, key) for key in layer["loss"]} == layer["loss"]


OFFICIAL = {
    "care.reflection.cue": "\n<repair>\n- Mistake:\n- Fix:\n- Corrected final answer:\n</repair>\n",
    "loss.aggregation": "token",
    "loss.clip_eps_high": 0.3,
    "loss.dual_clip": 3.0,
    "loss.kl_coef": 0.01,
    "loss.importance_sampling": "none",
    "model.image_pixels": [262_144, 4_194_304],
    "prompt.system": None,
    "prompt.suffix": (
        "You FIRST think about the reasoning process as an internal monologue and then provide "
        "the final answer. The reasoning process MUST BE enclosed within <think> </think> "
        "tags. The final answer MUST BE put in \\boxed{}."
    ),
    "prompt.tags": ["think", "boxed"],
    "prompt.overlong": "drop",
    "rollout.max_new_tokens": 2048,
    "train.mini_batches": 4,
    "train.prompts_per_step": 512,
    "train.warmup_steps": 0,
    "train.weight_decay": 0.01,
}


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_each_preset_changes_what_it_promises(preset):
    """`literal` differs in decisions alone, `official` in these settings too.

    Decisions are held against the transcription and the released rule (tests/algorithm).
    """
    default, other = (
        dotted(config_to_dict(build_config({"preset": name}))) for name in ("default", preset)
    )
    changed = {k: v for k, v in other.items() if v != default[k] and k != "preset"}
    settings = {k: v for k, v in changed.items() if not k.startswith("care.decisions.")}
    assert settings == (OFFICIAL if preset == "official" else {})
    assert (changed != settings) == (preset != "default")
    # config.yaml names the preset, not its decisions, and reads back as the same configuration.
    written = config_to_yaml(build_config({"preset": preset}))
    assert "decisions" not in written
    assert build_config(yaml.safe_load(written)) == build_config({"preset": preset})


def test_a_users_own_value_wins_over_the_preset():
    """Presets lie under the user's settings, key by key."""
    reflection = {"cue": "again:"}
    care = build_config({"preset": "official", "care": {"reflection": reflection}}).care
    assert (care.reflection.cue, care.decisions.repair) == ("again:", "answer")


def test_settings_made_directly_are_the_configurations_defaults():
    """CareSettings() and a run without any setting agree."""
    assert asdict(CareSettings()) == asdict(build_config({}).care)


REFUSED = yaml.safe_load((Path(__file__).parent / "refused_settings.yaml").read_text())


@pytest.mark.parametrize(("override", "message"), REFUSED.items())
def test_bad_settings_say_key_got_and_wanted(override, message):
    """An unknown key, a wrong value, what DeepSpeed or LoRA is told against other settings: the
    error names key, got and what is wanted."""
    with pytest.raises(ValueError) as error:
        load_config(None, override.split())
    assert [part for part in message.split(" ... ") if part not in str(error.value)] == []


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


def test_the_resolved_config_reads_back_equal():
    """config.yaml of a run is the run, LoRA included, which one key of it turns on."""
    values = {"algorithm": "gspo", "preset": "official", "model": {"lora": {"rank": 8}}}
    config = build_config(values)
    assert build_config({}).model.adapters is None
    assert config.model.adapters is not None and config.model.adapters.rank == 8
    assert build_config(yaml.safe_load(config_to_yaml(config))) == config


def test_every_key_is_described():
    """--help explains every setting."""
    assert all(key.meaning for key in list_keys())


@pytest.mark.parametrize("name", ["zero2", "zero3_offload"])
def test_a_deepspeed_name_brings_the_whole_section(name, tmp_path):
    """`deepspeed=NAME`, or a file's path, replaces what a file below says, and can be changed after
    it; in a file the same."""
    path = ROOT / "configs" / "deepspeed" / f"{name}.yaml"
    section = yaml.safe_load(path.read_text())
    below = "deepspeed: {zero_stage: 1, config: {zero_optimization: {stage: 1}}}\n"
    for given in (name, path):
        more = "deepspeed.config.wall_clock_breakdown=true"
        config = load_text(tmp_path, below, f"deepspeed={given}", more)
        assert config.deepspeed.zero_stage == int(name[4]) == section["zero_stage"]
        assert config.deepspeed.config == section["config"] | {"wall_clock_breakdown": True}
        assert config.deepspeed.offloads("optimizer") == name.endswith("offload")
    same = load_text(tmp_path, f"deepspeed: {name}\n")
    assert same.deepspeed.zero == config.deepspeed.zero


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\nname: a\nseed: 2\n", "seed is given twice, in lines 1 and 3: remove one"),
        ("train: {steps: 1}\ntrain.steps: 2\n", r"train\.steps is given twice, in lines 1 and 2"),
        ("train.steps: 2\ntrain: 5\n", "train is given twice, in lines 1 and 2"),
        (
            "deepspeed:\n  config:\n    a: 1\n    b: 1\n    a: 2\n",
            r"deepspeed\.config\.a is given twice, in lines 3 and 5",
        ),
        ("train: {steps: 1\n", r"c\.yaml: not YAML: while parsing a flow mapping"),
        ("- a\n- b\n", r"c\.yaml: got list, wanted key: value lines"),
        ("extends: nowhere.yaml\n", r"nowhere\.yaml: not found"),
    ],
)
def test_a_file_that_cannot_be_meant_is_refused(text, message, tmp_path):
    """With the lines of a key that is given twice, whichever way it is written."""
    with pytest.raises(ValueError, match=message):
        load_text(tmp_path, text)


def test_a_file_is_read_as_meant(tmp_path):
    """`train.steps: 7` is that key; a free mapping's keys keep their dots; a mapping's own keys
    replace those that `<<` brings, in an alias of it too."""
    text = "train.steps: 7\ntrain: {warmup_steps: 3}\ndeepspeed.config: {a.b: 1e-3}\n"
    config = load_text(tmp_path, text)
    assert (config.train.steps, config.train.warmup_steps) == (7, 3)
    assert config.deepspeed.config == {"a.b": 0.001}
    own = "{<<: {steps: 3, learning_rate: 4}, steps: 5}"
    config = load_text(tmp_path, f"train: &own {own}\nsft: *own\n")
    for section in (config.train, config.sft):
        assert (section.steps, section.learning_rate) == (5, 4)


@pytest.mark.parametrize(
    ("override", "value"),
    [
        # What is text takes what is typed, number or mapping as YAML may find it.
        ("name=1e-3", "1e-3"),
        ("logging.project=no", "no"),
        ("care.reflection.cue=look again:", "look again:"),
        ("prompt.system='quoted: text'", "quoted: text"),
        # YAML 1.1 reads 1e-3 as text; here it is a number, in free mappings too.
        ("train.learning_rate=2e-4", 2e-4),
        ("deepspeed.config={a: {b: 1e-3}, c: -2E+5}", {"a": {"b": 0.001}, "c": -200000.0}),
        ("deepspeed.config.x=None", None),
        ("prompt.system=none", None),
        ("train.micro_batch_tokens=~", None),
    ],
)
def test_values_on_the_command_line(override, value):
    """Text, numbers in scientific notation and every spelling of null."""
    config = config_to_dict(load_config(None, [override]))
    for part in override.partition("=")[0].split("."):
        config = config[part]
    assert config == value


def test_reward_functions_by_name(tmp_path):
    """NAME=file.py:function adds one, NAME.key=value changes it, also one of a file."""
    text = "reward: {functions: [{function: a.py:f}]}\n"
    overrides = ("reward.functions.g=a.py:g", "reward.functions.g.weight=2")
    config = load_text(tmp_path, text, *overrides, "reward.functions.f.weight=0.5")
    found = [(one.function, one.weight) for one in config.reward.functions]
    assert found == [("a.py:f", 0.5), ("a.py:g", 2)]


def test_roles():
    """A key has its own role or its section's; one below a free mapping has the mapping's."""
    roles = {
        "train.steps": Role.DECIDES,
        "train.save_every": Role.FREE,
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


def test_names_of_other_trainers():
    """TRL's, verl's and EasyR1's names, in a section or not, get the name here, which exists; every
    name of docs/coming_from.md is recognised, and what it is there is a key."""
    for name, ours in FOREIGN.items():
        for section in ("", "trainer."):
            with pytest.raises(ValueError, match=f"'{section}{name}'; here it is {ours[:20]}"):
                load_config(None, [f"{section}{name}=1"])
        target = re.match(r"[a-z_.NAME]+", ours)
        assert target is not None and find_key(target[0]) is not None, ours
    text = (ROOT / "docs" / "coming_from.md").read_text()
    table = text.partition("| TRL | verl | EasyR1 | here |")[2].partition("\n\n")[0]
    rows = [re.findall(r"`([^`]+)`", line) for line in table.splitlines() if "`" in line]
    assert len(rows) > 30
    for *foreign, here in rows:
        assert find_key(here) is not None, here
        for name in foreign:
            assert re.match(rf"{re.escape(here)}\b", FOREIGN[name]), (name, FOREIGN[name])
