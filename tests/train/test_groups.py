"""A step's groups: prompts in order, seeds of their own, verdicts, and the one that is shown."""

from dataclasses import replace
from itertools import islice
from types import SimpleNamespace

import pytest

from care_train.algorithm.types import Rollout, Subgroup
from care_train.data import Sample
from care_train.rollout.engine import Completion
from care_train.training import rl
from care_train.training.archiving import case_study
from care_train.training.groups import (
    Answer,
    Group,
    choose_subgroup,
    group_updates,
    roles_of,
)
from care_train.training.rl import PromptSource
from care_train.training.step import TrainStep
from tests.algorithm.builders import make_group, right, wrong
from tests.algorithm.fakes import FakeEngine, sampled_group
from tests.train.builders import make_config, make_session

CARE = make_config()
REPAIR = Completion((7, 8), True)


def test_a_prompt_seen_twice_in_a_step_has_other_seeds():
    """Fewer rows than prompts per step, or a batch across two passes over the rows: each pass deals
    every row once, every visit of a row draws its own rollouts, and a row's first visit has the
    seeds of its id alone."""
    rows = [Sample(id=f"row-{i}", prompt="?", answer="!") for i in range(3)]
    source = PromptSource(rows, make_config({"train": {"prompts_per_step": 4}}))
    seen = [sample.draw for sample in [*source.draw(), *source.draw()]]
    assert len(set(seen)) == 8
    assert set(seen[:3]) == {"row-0", "row-1", "row-2"}
    assert all("/1" in draw for draw in seen[3:6]) and all("/2" in draw for draw in seen[6:])


def test_ranks_that_the_prompts_do_not_divide_over_are_refused(monkeypatch):
    """Before anything is loaded or evaluated."""
    monkeypatch.setattr(rl, "world_size", lambda: 6)
    config = make_config({"train": {"prompts_per_step": 128, "mini_batches": 2}})
    with pytest.raises(ValueError, match=r"got 128, wanted a multiple of .* = 2 x 6"):
        rl.check_ranks(config)


def test_dynamic_sampling_keeps_mixed_groups_and_counts_all():
    """DAPO: the batch is the mixed groups in the order of sampling; what was sampled beside it
    counts as sampled, and in the policy's accuracy."""
    groups = [
        sampled_group([right(), right()], name="all right"),
        sampled_group([right(), wrong()], name="mixed a"),
        sampled_group([wrong(), wrong()], name="all wrong"),
        sampled_group([wrong(), right()], name="mixed b"),
    ]
    config = make_config({"algorithm": "dapo", "train": {"dynamic_sampling": True}})
    ready = iter(groups)
    sampler = SimpleNamespace(
        num_starts=0,
        sync=lambda engine: {},
        rest=lambda: None,
        sample=lambda draw, step: list(islice(ready, len(draw()))),
    )
    scorer = SimpleNamespace(verify=lambda groups: groups)  # They are verified already.
    step = TrainStep(config, FakeEngine(), sampler, scorer, None)
    outcome = step.run(lambda: [groups[0].sample] * 2, 0)
    assert [group.sample.id for group in outcome.groups] == ["mixed a", "mixed b"]
    values = outcome.metrics
    assert (values["sampled_sequences"], values["groups"], values["accuracy"]) == (8, 2, 0.5)


def test_rollouts_with_symbolic_keys(tiny_folder):
    """A batch of rollouts is verified by algebra where it takes it; reasons go with them."""
    session = make_session(tiny_folder("tiny-qwen2"))
    sample = Sample(id="a", prompt="?", answer="\\frac{\\sqrt{2}}{2}")
    texts = (
        "<think>so</think> <answer>1/\\sqrt{2}</answer>",
        "<think>so</think> <answer>\\sqrt{2}</answer>",
        "<think>so</think> <answer>(b) blue",
    )
    tokenizer = session.loaded.tokenizer
    ids = [(*tokenizer.encode(text), tokenizer.eos_token_id) for text in texts]
    rollouts = session.scorer.score_all([Answer(sample, Completion(one, True)) for one in ids])
    assert [rollout.accuracy for rollout in rollouts] == [1.0, 0.0, 0.0]
    assert [rollout.format_score for rollout in rollouts] == [1.0, 1.0, 0.0]
    assert rollouts[0].verdict == "equal expressions"
    assert rollouts[2].verdict == "no complete <answer> span"
    # In perfect form and wrong, it stays below every right answer.
    assert rollouts[1].reward == pytest.approx(0.1) and rollouts[0].reward == pytest.approx(1.0)


def _group(
    *rollouts: Rollout, reflected: Rollout | None = None, config=CARE, name: str = "0"
) -> Group:
    """A group as a step leaves it; the rationale of rollout i stands at 10 i degrees."""
    embedded = make_group(rollouts)
    group = sampled_group(
        rollouts, name, distances=embedded.distances, log_prob_sums=embedded.log_prob_sums
    )
    if config.algorithm == "care":
        group = replace(group, subgroup=choose_subgroup(group, config, 0, name))
    if reflected is not None:
        group = replace(group, reflected=reflected, repair=Answer(group.sample, REPAIR))
    (update,) = group_updates([group], config, lambda values: values)
    return replace(group, update=update)


def _shown(*groups: Group) -> tuple[str, str, list[tuple[str, str, float]]]:
    group, outcome, records = case_study(groups, 25, lambda completion: str(completion.token_ids))
    assert {(r.step, r.prompt, r.answer) for r in records} == {(25, "?", "1")}
    return group.sample.id, outcome, [(r.role, r.completion, r.reward) for r in records]


ANCHORED = (right(text="a"), wrong(text="far", think=9), wrong(text="near"), wrong(text="b"))


@pytest.mark.parametrize(
    ("repair", "outcome", "role"),
    [
        (right(reflected=True), "repaired", "reflected_success"),
        (wrong(reflected=True), "failed", "reflected_failure"),
    ],
)
def test_a_repaired_group_is_shown_before_others(repair, outcome, role):
    """The anchor, the failure that was shown to the policy, and its repair; each rollout has a role
    by its place, negatives ranked from the anchor on."""
    found = _group(*ANCHORED, reflected=repair, name="repaired")
    assert isinstance(found.subgroup, Subgroup) and found.subgroup.reflect_on is not None
    negative = found.subgroup.others[found.subgroup.reflect_on].rollout
    name, title, shown = _shown(_group(right(), right()), _group(*ANCHORED), found)
    assert (name, title) == ("repaired", f"anchored · reflection {outcome}")
    assert shown == [
        ("anchor", "a", 1.0),
        ("hard_negative", negative.text, 0.1),
        (role, "(7, 8)", repair.reward),
    ]
    roles = roles_of(found)
    assert roles[0] == ("anchor", None) and roles[4] == (role, None)
    ranks = [rank for kind, rank in roles.values() if kind == "hard_negative"]
    assert set(ranks) == set(range(1, len(found.subgroup.others) + 1)) and len(ranks) > 1
    assert set(roles) == {4, *(member.index for member in found.subgroup.members)}


def test_what_is_shown_of_other_groups():
    """Without a reflection the negative nearest to the anchor, whatever order it was sampled in; of
    a rescued group its pseudo-anchor; of a baseline's, which has no anchor, the best and the worst
    by advantage, and of rollouts that are all alike one."""
    without = make_config({"care": {"reflection": {"negative": "none"}}})
    _, title, shown = _shown(_group(*ANCHORED, config=without))
    # "far" is at 10 degrees; the others stand at 20 and 30.
    assert title == "anchored" and shown == [("anchor", "a", 1.0), ("hard_negative", "far", 0.1)]
    _, title, shown = _shown(_group(right(), right()), _group(wrong(text="p"), wrong(), wrong()))
    assert title == "rescued" and [role for role, *_ in shown] == ["pseudo_anchor", "hard_negative"]
    grpo = make_config({"algorithm": "grpo", "loss": {"kl_coef": 0.0}})
    mixed = _group(wrong(text="w"), right(text="r"), wrong(text="x"), config=grpo)
    alike = _group(wrong(text="w"), wrong(text="x"), config=grpo)
    assert _shown(alike, mixed)[1:] == ("trained", [("trained", "r", 1.0), ("trained", "x", 0.1)])
    _, title, shown = _shown(alike)
    assert title.startswith("skipped · ") and shown == [("unused", "w", 0.1)]
