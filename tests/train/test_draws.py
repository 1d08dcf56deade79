"""What a step samples: prompts in order, seeds of their own, counts of all that was sampled."""

import pytest

from care_train.data import Sample
from care_train.training.groups import Group
from care_train.training.rl import PromptSource
from care_train.training.step import TrainStep
from tests.algorithm.builders import right, wrong
from tests.algorithm.fakes import FakeEngine, sampled_group
from tests.train.builders import make_config


def test_a_prompt_seen_twice_in_a_step_has_other_seeds():
    """Fewer rows than prompts per step, or a batch across two passes over the rows: every visit
    of a row draws its own rollouts, and a row's first visit has the seeds of its id alone."""
    rows = [Sample(id=f"row-{i}", prompt="?", answer="!") for i in range(3)]
    source = PromptSource(rows, make_config({"train": {"prompts_per_step": 4}}))
    seen = [sample.draw for sample in [*source.draw(), *source.draw()]]
    assert len(set(seen)) == 8
    assert set(seen[:3]) == {"row-0", "row-1", "row-2"}
    assert all("/1" in draw for draw in seen[3:6]) and all("/2" in draw for draw in seen[6:])


class Sampler:
    """Deals ready groups, as many at a time as are asked for."""

    num_starts = 0

    def __init__(self, groups: list[Group]) -> None:
        self._groups = groups

    def sync(self, engine) -> dict[str, float]:
        return {}

    def rest(self) -> None:
        pass

    def sample(self, draw, step) -> list[Group]:
        count = len(draw())
        taken, self._groups = self._groups[:count], self._groups[count:]
        return taken


class Scorer:
    """For groups that are verified already."""

    def verify(self, groups) -> list[Group]:
        return groups


def test_dynamic_sampling_keeps_mixed_groups_and_counts_all():
    """DAPO: the batch is the mixed groups in the order of sampling; what was sampled beside it
    counts as sampled, and in the policy's accuracy."""
    groups = [
        sampled_group([right(), right()], name="all right"),
        sampled_group([right(), wrong()], name="mixed a"),
        sampled_group([wrong(), wrong()], name="all wrong"),
        sampled_group([wrong(), right()], name="mixed b"),
    ]
    train = {"dynamic_sampling": True}
    config = make_config({"algorithm": "dapo", "train": train})
    step = TrainStep(config, FakeEngine(), Sampler(groups), Scorer(), None)
    outcome = step.run(lambda: [groups[0].sample] * 2, 0)
    assert [group.sample.id for group in outcome.groups] == ["mixed a", "mixed b"]
    values = outcome.metrics
    assert (values["sampled_sequences"], values["groups"], values["accuracy"]) == (8, 2, 0.5)


@pytest.mark.parametrize("count", [1, 2])
def test_repeated_steps_deal_all_rows(count):
    """Each pass over the rows deals every row once."""
    rows = [Sample(id=f"row-{i}", prompt="?", answer="!") for i in range(4)]
    source = PromptSource(rows, make_config({"train": {"prompts_per_step": count}}))
    dealt = [sample.id for _ in range(4 // count) for sample in source.draw()]
    assert sorted(dealt) == sorted(row.id for row in rows)
