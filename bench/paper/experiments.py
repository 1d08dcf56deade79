"""The paper's experiments as data: for each, the variants that are compared and what it claims.

Every variant is a list of overrides over `base.yaml`, which has CARE as in the paper. Figures 4
to 7 and 9 to 12 ask what one part of CARE does to a policy that learns: all their variants have
`HALF`.
"""

from dataclasses import dataclass

Overrides = tuple[str, ...]

CARE_PLUS: Overrides = (
    *("care.credit=departure", "care.anchor=all"),
    "care.rescue=0",
)
"""What `configs/care_plus.yaml` changes; a test keeps the two equal."""


SIGNATURE = (
    *("anchor_slope", "anchor_r2", "anchor_groups_r2"),
    *("negative_slope", "negative_r2", "negative_groups_r2", "alpha_r"),
)
"""Columns of Figure 2: fits of the means by K' and over all groups, and the check of alpha-hat."""


@dataclass(frozen=True)
class Experiment:
    """One table or figure."""

    title: str
    claim: str
    """What the paper says, on its models and benchmarks."""
    variants: dict[str, Overrides]
    """By name. The first one's sampled sequences are the budget of the others."""
    measures: tuple[str, ...] = ("accuracy_after",)
    """Columns that the summary and the picture show."""
    against: str = ""
    """The variant that gains are counted from; empty: the first."""


def _algorithm(name: str) -> Overrides:
    return (f"algorithm={name}",)


_PAPER: Overrides = ()
_NO_RGR: Overrides = ("care.reflection.negative=none",)
_GRPO = _algorithm("grpo")
_DEPARTURE: Overrides = ("care.credit=departure",)
_ANCHORS: Overrides = ("care.anchor=all",)
_NAMES_STEPS = "function: 'care_train:verified_steps', target: bonus"
_STEPS: Overrides = (
    "care.credit=steps",
    f"reward.functions=[{{{_NAMES_STEPS}, weight: 0}}]",
)
_STEPS_REWARD: Overrides = (f"reward.functions=[{{{_NAMES_STEPS}, weight: 1}}]",)
"""The same knowledge as a reward: the share of steps before the first wrong one."""
HALF: Overrides = ("care.think_weight=50%",)
"""The rationale's share of a positive's credit that gamma+ = 0.005 gives to 1,000 tokens: at the 14
of these tasks it gives 1 to 2 %, from which hardly anything is learnt."""


def _half(*more: str) -> Overrides:
    return HALF + more


EXPERIMENTS: dict[str, Experiment] = {
    "table2": Experiment(
        "Table 2: components, and beside them other algorithms",
        "CARE without RGR is 3.9 points ahead of GRPO on Qwen2.5-VL-7B, CARE 4.6; 2.3 points ahead "
        "of DAPO and 0.7 of GSPO (Table 1)",
        {
            "care": _PAPER,
            "care w/o rgr": _NO_RGR,
            "grpo": _GRPO,
            "care, half the credit": HALF,
            "care_plus": CARE_PLUS,
            "dapo": _algorithm("dapo"),
            "gspo": _algorithm("gspo"),
            "cispo": _algorithm("cispo"),
            "sapo": _algorithm("sapo"),
            "care_plus, steps": CARE_PLUS + _STEPS,
            "care_plus w/o rgr, steps": CARE_PLUS + _NO_RGR + _STEPS,
            "grpo, steps": _GRPO + _STEPS_REWARD,
        },
        ("accuracy_after", "accuracy", "greedy_after", "format_after"),
        against="grpo",
    ),
    "chain": Experiment(
        "From CARE to care_plus, one change after the other, and two more from there",
        "Not in the paper: why CARE lags on rationales that decide the answer",
        {
            "care": _PAPER,
            "half the credit": HALF,
            "half, unmasked": _half("care.credit=unmasked"),
            "uniform": ("care.credit=uniform",),
            "departure": _DEPARTURE,
            "departure, all positives": _DEPARTURE + _ANCHORS,
            "care_plus": CARE_PLUS,
            "care_plus w/o rgr": CARE_PLUS + _NO_RGR,
            "care_plus, steps, rescue": (*CARE_PLUS, *_STEPS, "care.rescue=1.0"),
            "care_plus, s=1": (*CARE_PLUS, "care.neg_scale=1.0"),
            "grpo": _GRPO,
        },
        ("accuracy_after", "accuracy", "greedy_after", "format_after"),
        against="grpo",
    ),
    "fig2": Experiment(
        "Figure 2: the signature in K'",
        "The anchor's raw advantage grows as sqrt(K') (R^2 0.223 over groups), a negative's "
        "shrinks as 1 / sqrt(K') (0.555); A_raw[y+] / sqrt(K') follows alpha-hat with r = 0.998",
        # All failures of a group of 8 are in S, so that one run has every K' from 1 to 7.
        {"K=7": ("care.max_negatives=7", "train.steps=12", "eval.max_samples=100")},
        SIGNATURE,
    ),
    "fig3": Experiment(
        "Figure 3: reward curves",
        "Both CARE variants rise faster than GRPO and end higher",
        {"care": _PAPER, "care w/o rgr": _NO_RGR, "grpo": _GRPO, "care_plus": CARE_PLUS},
        ("reward",),
        against="grpo",
    ),
    "fig4": Experiment(
        "Figure 4: reflection against resampling without a cue",
        "Reflection succeeds in 76.6 %, without a cue in 19.3 %, at random in 12.8 %",
        {
            "reflection": HALF,
            "no cue": _half("care.reflection.cue="),
            "random": _half("care.reflection.cue=", "care.reflection.negative=random"),
        },
        ("reflection_success", "accuracy_after"),
    ),
    "fig5": Experiment(
        "Figure 5: selectors",
        "Nearest ends above mixed, mixed above farthest; cosine 7.5 points above random",
        {
            "cosine, diverse": HALF,
            "nearest": _half("care.selector=nearest"),
            "mixed": _half("care.selector=mixed"),
            "farthest": _half("care.selector=farthest"),
            "random": _half("care.selector=random"),
            "learned": _half("care.selector=learned"),
        },
    ),
    "fig6": Experiment(
        "Figure 6: the negatives' scale s",
        "The smaller s, the less the negatives' tokens are clipped",
        {
            f"s={s}": _half(f"care.neg_scale={s}", "train.num_iterations=2", "train.steps=18")
            for s in (1.0, 0.7, 0.5, 0.3)
        },
        ("clipped_low", "accuracy_after"),
    ),
    "fig7": Experiment(
        "Figure 7: rescue of all-wrong groups",
        "With rescue accuracy gains more after steps with all-wrong groups, at a small KL",
        {
            "on": HALF,
            "off": _half("care.rescue=0"),
        },
        ("accuracy_after", "kl", "groups_all_wrong"),
    ),
    "fig8": Experiment(
        "Figure 8: region weights over decoded tokens",
        "Region weights end 3 points above token-uniform GRPO, answer-only and unmasked failures",
        {
            "region-weighted": _PAPER,
            "half the credit": HALF,
            "answer only": ("care.think_weight=0",),
            "half, fail-think unmasked": _half("care.credit=unmasked"),
            "grpo": _GRPO,
            "uniform": ("care.credit=uniform",),
            "departure": _DEPARTURE,
        },
    ),
    "fig9": Experiment(
        "Figures 9 and 10: K with and without equalisation",
        "K = 4 is best; equalisation adds 1.0 to 1.8 points at every K and lowers the KL",
        {
            f"K={k}{'' if equalize else ', not equalised'}": _half(
                f"care.max_negatives={k}",
                f"care.equalize={str(equalize).lower()}",
            )
            for k in (4, 2, 6)
            for equalize in (True, False)
        },
        ("accuracy_after", "kl"),
    ),
    "fig11": Experiment(
        "Figure 11: anchors",
        "Eq. 2's anchor makes rationales 15 to 20 tokens shorter than a random one, as accurate",
        {
            "shortest": HALF,
            "random": _half("care.anchor=random"),
            "all positives": HALF + _ANCHORS,
        },
        ("accuracy_after", "think_length"),
    ),
    "fig12": Experiment(
        "Figure 12: the scale of a failed reflection",
        "s / 2 is best, then 3 s / 4; s / 4 and s lag behind",
        {
            "s / 2": HALF,
            "s": _half("care.reflection.reflect_scale=0.5"),
            "3 s / 4": _half("care.reflection.reflect_scale=0.375"),
            "s / 4": _half("care.reflection.reflect_scale=0.125"),
        },
    ),
    "adaptive": Experiment(
        "Section 10.2: K and s that adapt to a target signal-to-noise ratio",
        "Named as future work, without a result",
        {
            "care": HALF,
            **{f"target {t}": _half(f"care.target_snr={t}") for t in (2.5, 4)},
        },
        ("accuracy_after", "num_negatives"),
    ),
}
