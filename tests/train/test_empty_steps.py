"""A step that trains nothing says so and why; several in a row end the run: as finished where the
policy is right everywhere, else with status 66."""

from pathlib import Path

import pytest
import torch

from care_train.algorithm.types import Credit, GroupUpdate, Region, Rollout, Spans, TrainSequence
from care_train.models.prompts import EncodedPrompt
from care_train.training.empty_steps import EmptySteps, has_signal
from care_train.training.failures import NO_SIGNAL_STATUS
from care_train.training.groups import Group
from tests.train.builders import make_config, text_sample
from tests.train.runs import errors_of, records, run, summary, text_run_arguments

TAGGED = Spans((0, 1), (0, 1), (1, 2), (1, 2))
UNTAGGED = Spans(None, None, None, None)


def _rollout(accuracy: float, number: int = 0, **fields) -> Rollout:
    values = {"spans": TAGGED, "reward": accuracy, "graded": accuracy} | fields
    return Rollout((7, number), "text", accuracy=accuracy, format_score=0.0, **values)


def _group(*rollouts: Rollout, **fields) -> Group:
    prompt = EncodedPrompt((1,))
    return Group(rollouts, sample=text_sample(), prompt=prompt, **fields)


def _alike(accuracy: float, count: int = 8, **fields) -> list[Group]:
    """Groups of two different responses with the same outcome."""
    return [_group(*(_rollout(accuracy, i, **fields) for i in range(2))) for _ in range(count)]


def _mixed() -> Group:
    """A group that the policy learns from."""
    right, wrong = _rollout(1.0, 0), _rollout(0.0, 1)
    credit = Credit((0, 0), (1, 2), False)
    sequences = (TrainSequence(right, 1.0, credit), TrainSequence(wrong, -1.0, credit))
    return _group(right, wrong, update=GroupUpdate(sequences, 2, 4))


def _steps(groups: list[Group], times: int = 2, rows: int = 100, **values) -> EmptySteps:
    config = make_config({"limits": {"empty_steps": 2}} | values)
    steps = EmptySteps(config, rows, torch.device("cpu"))
    for done in range(1, times + 1):
        steps.add(groups, [], done)
    return steps


WRONG, ALIKE = _alike(0.0), [_group(_rollout(0.0), _rollout(0.0)) for _ in range(8)]
CUT = _alike(0.0, spans=UNTAGGED, finished=False)
UNSURE = _alike(0.0, verdict="unverified: took longer than 5 s")
TOO_HIGH = _alike(0.0, graded=0.62, reward=0.62) + _alike(0.0, graded=0.1, reward=0.1)
HALVES = _alike(0.0, 4) + _alike(1.0, 4)
CAUSES = [
    (WRONG, {}, ("of 8 groups 8 with all responses wrong and no rescue", "easier rows")),
    (WRONG, {"care": {"rescue": 0.0}}, ("care.rescue=1",)),
    (
        TOO_HIGH,
        {"reward": {"success_threshold": 0.8}},
        ("16 whose best", "success_threshold (now 0.8)", "0.62", "rewards from 0.1 to 0.62"),
    ),
    (
        _alike(0.0, spans=UNTAGGED),
        {},
        ("16 without a complete answer span", "cold start (`care-train sft`)", "<answer>"),
    ),
    (CUT, {}, ("16 cut by the length limit", "raise rollout.max_new_tokens (now 12)")),
    (UNSURE, {}, ("of 16 responses 16 unverified", "takes too long")),
    (ALIKE, {}, ("all the same: raise rollout.temperature",)),
    (_alike(0.5), {}, ("rewards from 0.5 to 0.5", "gives all responses the same teaches nothing")),
    (HALVES, {}, ("4 with all responses right, 4 with all responses wrong", "rollout.group_size")),
]


@pytest.mark.parametrize(("groups", "values", "wanted"), CAUSES)
def test_the_cause_is_counted_with_its_fix(groups, values, wanted, caplog):
    """The first empty step is a warning, the second ends the run, with the counts and the key."""
    steps = _steps(groups, times=1, **values)
    assert steps.ending is None and "step 1 trained nothing" in caplog.text
    steps.add(groups, [], 2)
    assert steps.ending == "failed"
    text = str(steps.error())
    assert "2 steps in a row trained nothing (limits.empty_steps = 2)" in text
    assert [part for part in wanted if part not in text or part not in caplog.text] == [], text
    assert steps.steps == 0  # a run that goes on counts anew


def test_a_policy_that_is_right_everywhere_has_finished(caplog):
    """Not an error, and only once there is evidence: 64 groups, or all prompts. A few prompts whose
    keys are wrong, and so never right, change nothing."""
    assert _steps(_alike(1.0, 8)).ending is None
    assert _steps(_alike(1.0, 8), rows=16).ending == "finished"
    assert _steps(_alike(1.0, 8), times=8).ending == "finished"
    assert "training is finished" in caplog.text
    nearly = _steps(_alike(1.0, 30) + _alike(0.0, 2), times=3)
    assert nearly.ending == "finished" and "90 of the last 96 groups" in nearly.finish_text()
    assert _steps(_alike(1.0, 28) + _alike(0.0, 4), times=3).ending == "failed"


def test_few_prompts_per_step_need_more_steps():
    """One group without a signal is common: a single prompt per step is judged by 8."""
    assert [_steps(_alike(0.0, 1), times).ending for times in (2, 7, 8)] == [None, None, "failed"]
    assert _steps(_alike(0.0, 1), times=2, rows=2).ending == "failed"


def test_a_step_with_a_signal_begins_a_new_row_and_null_never_ends(caplog):
    """And warnings of a long row grow rare; groups that dynamic sampling dropped are counted."""
    steps = _steps(WRONG, times=1)
    steps.add([*WRONG, _mixed()], [], 2)
    steps.add(WRONG, [], 3)
    assert steps.steps == 1 and steps.ending is None
    steps.add(WRONG, _alike(1.0, 24), 4)
    assert "of 32 groups 24 with all responses right" in str(steps.error())
    caplog.clear()
    assert _steps(WRONG, times=20, limits={"empty_steps": None}).ending is None
    assert caplog.text.count("trained nothing") == 5  # steps 1, 2, 4, 8 and 16


def test_what_a_signal_is():
    """A KL term alone, as of groups with equal rewards, is none; nor is credit on no token."""
    rollout, answer = _rollout(1.0), Credit((0, 0), (1, 2), False)
    nowhere = Credit((0, 1), (0, 0), False, (Region(0, 2, 0.0),), think_weight=0.5)
    cases = [(1.0, answer), (0.0, answer), (1.0, nowhere)]
    updates = [GroupUpdate((TrainSequence(rollout, a, credit),), 1, 2) for a, credit in cases]
    assert [has_signal(update) for update in updates] == [True, False, False]


REWARD = """
def score(data_source, solution_str, ground_truth, extra_info=None):
    return {value}
"""


def _arguments(folder: Path, value: str) -> list[str]:
    """A run of 6 steps of all 8 prompts, rewarded by a function that returns `value`."""
    (folder / "reward.py").write_text(REWARD.format(value=value))
    functions = f"reward.functions=[{{function: {folder / 'reward.py'}:score}}]"
    return [
        *text_run_arguments(folder),
        *(functions, "train.steps=6", "train.prompts_per_step=8", "limits.empty_steps=2"),
    ]


def test_a_reward_that_reaches_no_success_ends_the_run_and_goes_on_once_it_does(tmp_path):
    """Every rank ends alike, with step, counts, key and how to go on; with the key set the run
    goes on and trains."""
    graded = "0.2 + 0.4 * (len(solution_str) % 2)"
    arguments = _arguments(tmp_path, graded)
    for errors in errors_of(*arguments, status=NO_SIGNAL_STATUS, ranks=2):
        assert "step 2 of 6: 2 steps in a row trained nothing" in errors, errors
        assert "set reward.success_threshold (now 1, as it is null) no higher than" in errors
        assert f"resume={tmp_path / 'run'}" in errors
    changes = ("reward.success_threshold=0.5", "allow_changes=[reward.success_threshold]")
    run(*arguments, *changes, "--resume", ranks=2)
    steps = records(tmp_path / "run")
    assert len(steps) == 6 and any(step["trained_sequences"] for step in steps)


def test_a_run_whose_responses_are_all_right_ends_well_and_early(tmp_path):
    """Status 0, the final model and its evaluation, the reason in the summary; resumed, it is
    finished at once, and without the limit it trains on."""
    arguments = _arguments(tmp_path, "1.0")
    folder = tmp_path / "run"
    assert "step 2: training is finished" in run(*arguments)
    first = summary(folder)
    assert first["steps"] == 2 and "right" in first["ended_early"]
    assert "accuracy_after" in first and (folder / "final").is_dir()
    assert "Ended early" in (folder / "report.md").read_text()
    run(*arguments, "--resume")
    assert summary(folder)["steps"] == 2
    run(*arguments, "--resume", "limits.empty_steps=null")
    assert summary(folder)["steps"] == 6 and "ended_early" not in summary(folder)
