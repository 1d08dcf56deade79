"""CARE's settings: what the presets decide, and the bounds of values."""

from dataclasses import asdict

import pytest
import yaml

from care_train.config import (
    PRESETS,
    CareSettings,
    build_config,
    config_to_dict,
    config_to_yaml,
)


def flat(values: dict, prefix: str = "") -> dict:
    """Nested mappings as `a.b.c: value`."""
    found: dict = {}
    for key, value in values.items():
        own = prefix + key
        found |= flat(value, f"{own}.") if isinstance(value, dict) else {own: value}
    return found


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

    Decisions are held against the transcription and the released rule (test_end_to_end.py,
    test_official.py).
    """
    default, other = (
        flat(config_to_dict(build_config({"preset": name}))) for name in ("default", preset)
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
