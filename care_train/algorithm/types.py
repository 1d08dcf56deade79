"""The values Algorithm 1 works on: frozen, small, and free of any model or engine.

Lengths are in tokens. Shape letters: G rollouts in a group, T tokens of a response, D hidden.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

# The verifier's processes and command read spans, and start fast without torch.
if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Spans:
    """Where a response's regions lie: half-open token ranges from its first sampled token."""

    think: tuple[int, int] | None
    """Tokens from `<think>` to `</think>`, tags included; None when the response never thinks."""
    think_content: tuple[int, int] | None
    """Tokens touching the text between the think tags: T_think is its length."""
    answer: tuple[int, int] | None
    """Tokens from `<answer>` to `</answer>`, tags included; None without a complete pair."""
    answer_content: tuple[int, int] | None
    """Tokens touching the text between the answer tags: T_ans is its length."""
    wrong_step: tuple[int, int] | None = None
    """Tokens of the first wrong step, where a reward function names it; None: it names none."""

    @property
    def think_length(self) -> int:
        """T_think of Eq. 2."""
        return _length(self.think_content)

    @property
    def answer_length(self) -> int:
        """T_ans of Eq. 2."""
        return _length(self.answer_content)

    @property
    def well_formed(self) -> bool:
        """A complete answer span exists: without one, no token carries the answer's credit."""
        return self.answer is not None


def _length(span: tuple[int, int] | None) -> int:
    return 0 if span is None else span[1] - span[0]


@dataclass(frozen=True, eq=False)
class Rollout:
    """One response y_i, scored. Equal to itself alone, so that it can be a table's key."""

    token_ids: tuple[int, ...]
    """The sampled tokens, ending with EOS unless the length limit cut the response."""
    text: str
    """The decoded response without EOS; a reflected rollout's begins with its forced prefix."""
    spans: Spans
    accuracy: float
    """acc in [0, 1]."""
    format_score: float
    """fmt in [0, 1]."""
    reward: float
    """r of Eq. 1."""
    finished: bool = True
    """Whether the last token is EOS."""
    prefix_ids: tuple[int, ...] = ()
    """Tokens forced between the prompt and the first sampled token (reflection, Sec. 3.6)."""
    reflected: bool = False
    """Whether this is y^rgr, the resample of a hard negative."""
    verdict: str = ""
    """The verifier's reason for the accuracy, for people."""
    format_verdict: str = ""
    """And for the format."""
    rewards: tuple[tuple[str, float], ...] = ()
    """What the verifier and each reward function gave, by name."""
    graded: float = 0.0
    """acc before `reward.success_threshold` makes it 0 or 1."""
    log_probs: tuple[float, ...] | None = field(default=None, repr=False)
    """Per token, the log-prob by the engine that sampled it. None where it keeps none."""
    old_log_probs: torch.Tensor | None = field(default=None, repr=False)
    """[T] fp32 log pi_old of each token, by the trainer. None before its forward."""
    old_log_normalizer: torch.Tensor | None = field(default=None, repr=False)
    """[T] fp32 log sum exp of the logits of the same forward."""


@dataclass(frozen=True)
class RolloutGroup:
    """Y: the G rollouts of one prompt, what the old policy's forward says of them, and the subgroup
    that is chosen by it."""

    rollouts: tuple[Rollout, ...]
    distances: torch.Tensor | None = None
    """[G, G] fp64 d_cos of every two rationales (Eq. 4). None before the old policy's forward."""
    log_prob_sums: torch.Tensor | None = None
    """[G] fp32: log pi_old(y | x), summed over the response's tokens."""
    subgroup: Subgroup | str = ""
    """Lines 3-10 and 21-25: S, or why the group is skipped; not read by a baseline."""
    reflected: Rollout | None = None
    """Line 14: the verified reflection."""

    def __post_init__(self) -> None:
        size = len(self.rollouts)
        assert self.distances is None or self.distances.shape == (size, size)
        assert self.log_prob_sums is None or self.log_prob_sums.shape == (size,)

    @property
    def responses(self) -> tuple[Rollout, ...]:
        """The rollouts and, behind them, the reflection."""
        return self.rollouts if self.reflected is None else (*self.rollouts, self.reflected)


@dataclass(frozen=True)
class Member:
    """One sequence of the subgroup S and the role it plays there."""

    rollout: Rollout
    shaped_reward: float
    """r~: the reward, or Eq. 14's pseudo-reward in a rescue."""
    is_negative: bool
    index: int | None = None
    """Its place in the group; None for the reflected rollout."""


@dataclass(frozen=True)
class Subgroup:
    """S: the anchor first, then the others in order of selection."""

    anchor: Member
    others: tuple[Member, ...]
    rescued: bool = False
    """Whether the anchor is the pseudo-anchor of Sec. 3.7."""
    reflect_on: int | None = None
    """Which of `others` reflection rewrites; None where it does not apply."""
    scale: float = 1.0
    """Factor on s and s_refl (`target_snr`)."""

    @property
    def members(self) -> tuple[Member, ...]:
        return (self.anchor, *self.others)

    @property
    def num_negatives(self) -> int:
        """K_S: the negatives actually present."""
        return sum(member.is_negative for member in self.others)


class Region(NamedTuple):
    """Tokens of a response, from its first sampled one, that weigh alike in Eq. 11."""

    start: int
    end: int
    """Half-open; an end at or before the start: no token."""
    weight: float


@dataclass(frozen=True)
class Credit:
    """The regions of Eq. 11 for one response; what lies in none weighs 0."""

    think: tuple[int, int] = (0, 0)
    answer: tuple[int, int] = (0, 0)
    """Weighs 1."""
    earns_rationale: bool = False
    """Whether the rationale weighs `think_weight`, or 0."""
    regions: tuple[Region, ...] = ()
    """Laid over the two, the last one on top."""
    think_weight: float = 0.0
    """gamma+."""
    normalize: bool = True
    """Divide by the sum of the weights."""

    @property
    def is_given(self) -> bool:
        """Whether any token has a weight."""
        rationale = self.earns_rationale and self.think_weight > 0 and _length(self.think) > 0
        regions = any(region.weight > 0 and region.start < region.end for region in self.regions)
        return rationale or regions or _length(self.answer) > 0


@dataclass(frozen=True)
class TrainSequence:
    """One sequence the optimiser sees: the member of S* and its credit."""

    rollout: Rollout
    advantage: float
    """A[y], sequence level (Eqs. 7-8 and the equalisation)."""
    credit: Credit
    """How Eq. 11 spreads it over the tokens."""
    role: str = "rollout"
    """anchor | positive | negative | reflected_success | reflected_failure | proxy_anchor |
    rollout."""
    raw_advantage: float = 0.0
    """A_raw[y] of Eq. 7."""


@dataclass(frozen=True)
class GroupUpdate:
    """What Algorithm 1 makes of one group: the sequences to train, or why there are none."""

    sequences: tuple[TrainSequence, ...]
    num_sequences: int
    """How many sequences the loss's denominator counts: |S*|, or all G for a baseline."""
    num_tokens: int
    """Their response tokens."""
    skipped: str | None = None
    """Why a group was skipped: all_correct | no_failures | all_wrong | no_positives |
    no_negatives | no_proxy_anchor | no_wrong_step | no_signal | truncated."""
    num_negatives: int = 0
    """K_S."""
    equalize_factor: float = 1.0
    """sqrt(K / K_S), or 1."""
    anchor_clamped: bool = False
    """Whether the anchor's negative advantage was set to 0."""
    rescued: bool = False


def skipped_update(reason: str, rescued: bool = False) -> GroupUpdate:
    """The update of a group that trains nothing and counts in no denominator."""
    return GroupUpdate((), 0, 0, skipped=reason, rescued=rescued)
