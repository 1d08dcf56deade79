"""CARE's settings: the presets' keys and the bounds of values."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import pytest

from care_train.config import PRESETS, CareSettings, build_config, config_to_dict


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as `a.b.c: value`."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found


def changed(preset: str) -> dict[str, Any]:
    """What a preset changes in a whole configuration."""
    default, other = (
        flat(config_to_dict(build_config({"preset": p}))) for p in ("default", preset)
    )
    return {key: other[key] for key in other if other[key] != default[key] and key != "preset"}


def test_literal_changes_what_algorithm_1_says_differently():
    """`preset: literal` follows Algorithm 1 to the letter, in these keys and no others."""
    assert changed("literal") == {
        "care.partial": "literal",
        "care.normalize_over": "group",
        "care.anchor_prefers_format": False,
        "care.count_negatives_by": "reward",
        "care.clamp_anchor": False,
        "care.malformed": "ignore",
        "care.tag_weight": 0.0,
        "care.reflection.success_advantage": "penalized",
        "care.rescue.score": "sum",
        "care.rescue.require_format": False,
        "care.rescue.num_negatives": "literal",
    }


def test_official_changes_what_the_released_code_does_differently():
    """`preset: official` follows the authors' released code, in these keys and no others."""
    assert changed("official") == {
        "care.positive": "reward",
        "care.anchor_prefers_format": False,
        "care.farthest_first_start": "farthest",
        "care.malformed": "uniform",
        "care.tag_weight": 0.0,
        "care.reflection.on_failure": "replace",
        "care.reflection.temperature": 0.6,
        "care.reflection.top_p": 0.95,
        "care.reflection.max_new_tokens": 512,
        "care.rescue.score": "sum",
        "care.rescue.require_format": False,
        "loss.aggregation": "token",
    }


def test_default_changes_nothing():
    """`preset: default` is the defaults."""
    assert PRESETS["default"] == {} and changed("default") == {}


@pytest.mark.parametrize("preset", ["literal", "official"])
def test_a_users_own_value_wins_over_the_preset(preset):
    """Presets lie under the user's settings, key by key."""
    care = build_config({"preset": preset, "care": {"rescue": {"score": "mean"}}}).care
    assert care.rescue.score == "mean"
    assert not care.rescue.require_format


def test_settings_made_directly_are_the_configurations_defaults():
    """CareSettings() and a run without any setting agree."""
    assert asdict(CareSettings()) == asdict(build_config({}).care)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("max_negatives", 0),
        ("preselect_size", 0),
        ("neg_scale", 0.0),
        ("neg_scale", 1.1),
        ("think_weight", -0.1),
        ("robust_trim", 0.5),
        ("robust_trim", -0.1),
    ],
)
def test_values_out_of_bounds_are_errors(key, value):
    """Each names its key: s in (0, 1], K and M at least 1, gamma+ at least 0, trim in [0, 0.5)."""
    with pytest.raises(ValueError, match=rf"care\.{key}: got"):
        build_config({"care": {key: value}})


@pytest.mark.parametrize("value", [0.0, -0.1, 0.51])
def test_s_refl_lies_between_zero_and_s(value):
    """s_refl in (0, s] (Sec. 3.6)."""
    with pytest.raises(ValueError, match=r"care\.reflection\.reflect_scale: got"):
        build_config({"care": {"reflection": {"reflect_scale": value}}})


@pytest.mark.parametrize(
    ("key", "value"),
    [("selector", "hardest"), ("positive", "both"), ("malformed", "drop"), ("anchor", "longest")],
)
def test_unknown_choices_are_errors(key, value):
    """A choice that does not exist is not silently another."""
    with pytest.raises(ValueError, match=rf"care\.{key}: got '{value}'"):
        build_config({"care": {key: value}})
