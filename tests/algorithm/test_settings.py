"""CARE's settings: what the presets decide, the bounds of values, and keys that are gone."""

from dataclasses import asdict

import pytest
import yaml

from care_train.config import (
    PRESETS,
    CareSettings,
    Decisions,
    build_config,
    config_to_dict,
    config_to_yaml,
)


def flat(values: dict, prefix: str = "") -> dict:
    """Nested mappings as `a.b.c: value`."""
    found: dict = {}
    for key, value in values.items():
        found |= (
            flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
    return found


WITHOUT_FORMAT = {
    "care.decisions.anchor_prefers_format": False,
    "care.decisions.clamp_anchor": False,
    "care.decisions.proxy_score": "sum",
    "care.decisions.proxy_requires_format": False,
}
CHANGES = {
    "default": {},
    "literal": {
        "care.decisions.partial": "literal",
        "care.decisions.normalize_over": "group",
        "care.decisions.count_negatives_by": "reward",
        "care.decisions.malformed": "ignore",
        "care.decisions.repaired_advantage": "penalized",
        "care.decisions.rescue_size": "literal",
        "care.decisions.tag_weight": 0.0,
        **WITHOUT_FORMAT,
    },
    "official": {
        "care.decisions.positive": "reward",
        "care.decisions.rescue_negatives": "spread",
        "care.decisions.failed_reflection": "replace",
        "care.decisions.count_negatives_by": "members",
        "care.decisions.spans": "tokens",
        "care.decisions.repair": "answer",
        "care.decisions.repair_temperature": 0.6,
        "care.decisions.repair_top_p": 0.95,
        "care.decisions.repair_max_tokens": 512,
        "care.decisions.beyond_subgroup": "regularized",
        "care.reflection.cue": (
            "\n<repair>\n- Mistake:\n- Fix:\n- Corrected final answer:\n</repair>\n"
        ),
        "care.reflection.context": "x_only",
        "loss.aggregation": "token",
        "loss.clip_eps_high": 0.3,
        "loss.dual_clip": 3.0,
        "loss.kl_coef": 0.01,
        "loss.importance_sampling": "none",
        "model.min_pixels": 262_144,
        "model.max_pixels": 4_194_304,
        "prompt.system": None,
        "prompt.suffix": (
            "You FIRST think about the reasoning process as an internal monologue and then provide "
            "the final answer. The reasoning process MUST BE enclosed within <think> </think> "
            "tags. The final answer MUST BE put in \\boxed{}."
        ),
        "prompt.overlong": "drop",
        "reward.answer": "boxed",
        "rollout.max_new_tokens": 2048,
        "train.mini_batches": 4,
        "train.prompts_per_step": 512,
        "train.warmup_steps": 0,
        "train.weight_decay": 0.01,
        **WITHOUT_FORMAT,
    },
}


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_each_preset_changes_what_it_promises(preset):
    """`literal`: Algorithm 1 to the letter; `official`: the released code; nothing else differs."""
    default, other = (
        flat(config_to_dict(build_config({"preset": name}))) for name in ("default", preset)
    )
    changed = {k: v for k, v in other.items() if v != default[k] and k != "preset"}
    assert changed == CHANGES[preset]


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_a_written_configuration_keeps_its_preset(preset):
    """config.yaml names the preset, not its decisions, and reads back as the same configuration."""
    config = build_config({"preset": preset})
    written = config_to_yaml(config)
    assert "decisions" not in written
    assert build_config(yaml.safe_load(written)) == config


def test_a_users_own_value_wins_over_the_preset():
    """Presets lie under the user's settings, key by key."""
    reflection = {"cue": "again:"}
    care = build_config({"preset": "official", "care": {"reflection": reflection}}).care
    assert (care.reflection.cue, care.reflection.context) == ("again:", "x_only")
    assert care.decisions.positive == "reward"


def test_settings_made_directly_are_the_configurations_defaults():
    """CareSettings() and a run without any setting agree."""
    assert asdict(CareSettings()) == asdict(build_config({}).care)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_negatives": 0}, "max_negatives: got 0, wanted an integer, at least 1"),
        ({"preselect_size": 0}, "preselect_size: got 0, wanted an integer, at least 1"),
        ({"neg_scale": 0.0}, r"neg_scale: got 0.0, wanted a number in \(0, 1\]"),
        ({"neg_scale": 1.1}, r"neg_scale: got 1.1, wanted a number in \(0, 1\]"),
        ({"think_weight": -0.1}, "think_weight: got -0.1, wanted a number, at least 0"),
        ({"reflection": {"reflect_scale": 0.0}}, "reflect_scale: got 0.0"),
        ({"reflection": {"reflect_scale": 0.51}}, r"reflect_scale: got 0.51, wanted in \(0, neg_s"),
        ({"selector": "hardest"}, "selector: got 'hardest'"),
        ({"anchor": "longest"}, "anchor: got 'longest'"),
        ({"decisions": {"partial": "literal"}}, "decisions: got .* wanted no such key: preset"),
    ],
)
def test_wrong_values_name_key_and_bounds(values, message):
    """s in (0, 1], s_refl in (0, s], K and M at least 1, gamma+ at least 0; no unknown choices."""
    with pytest.raises(ValueError, match=rf"care\.(reflection\.)?{message}"):
        build_config({"care": values})


class TestGone:
    """Keys of earlier versions: silent where nothing changed, else an error that says what now."""

    def test_what_a_preset_decides_anyway_is_no_error(self):
        """A run's config.yaml names every key: one of an earlier version stays readable."""
        old = {"robust": False, "clamp_anchor": False}
        config = build_config({"preset": "literal", "care": old})
        assert config == build_config({"preset": "literal"})

    @pytest.mark.parametrize(
        ("preset", "values", "message"),
        [
            ("default", {"clamp_anchor": False}, "care.clamp_anchor: got False.* gone: the preset"),
            ("default", {"robust": True}, "care.robust: got True.* gone: mean and standard"),
        ],
    )
    def test_another_value_is_an_error(self, preset, values, message):
        """It names the key and what replaces it."""
        with pytest.raises(ValueError, match=message):
            build_config({"preset": preset, "care": values})

    def test_no_key_is_both_gone_and_known(self):
        """What the decisions are called in old files is no setting any more."""
        known = {field for field in asdict(CareSettings()) if field != "decisions"}
        assert not known & set(asdict(Decisions()))
