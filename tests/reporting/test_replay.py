"""`care-train replay`: selection, advantages and token weights over an archive, without a model."""

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch

from care_train.algorithm.baselines import baseline_updates
from care_train.algorithm.region_weights import spread_advantages
from care_train.cli import main
from care_train.replay import replay
from care_train.replay.archived import steps_of
from care_train.replay.compare import _configs as replayed_config
from care_train.replay.compare import credit
from care_train.reporting import read_archive
from tests.reporting.archives import invented_groups, write_run


def test_the_runs_own_configuration_gives_its_advantages_exactly(quickstart_run: Path):
    """Every group again: the same rollouts, the same advantages of sequences and tokens."""
    found = replay(quickstart_run)
    roles = {r["role"] for row in _rows(quickstart_run) for r in row["rollouts"]}
    assert {"anchor", "hard_negative"} <= roles and not found.changes and not found.unknown
    assert len(found.groups) == len(_rows(quickstart_run))
    for group in found.groups:
        assert group.recorded_outcome == group.replayed_outcome
        assert group.recorded_chosen == group.replayed_chosen and group.overlap == 1
        assert group.advantage_difference == group.token_difference == 0
    assert found.recorded.summary() == found.replayed.summary()
    assert found.recorded.summary()["trained_sequences"] > 0


def test_grpo_equals_its_own_code(quickstart_run: Path):
    """Advantages of the archived rewards, spread over each response's tokens."""
    config, _ = replayed_config(quickstart_run, ["algorithm=grpo"])
    count = 0
    for groups in steps_of(quickstart_run):
        updates = baseline_updates(
            [group.sampled.rollouts for group in groups],
            "grpo",
            lambda values: values,
            length_normalized=True,
            keep_without_signal=True,  # its KL has a gradient
        )
        for update, credited in zip(updates, credit(groups, config), strict=True):
            assert not isinstance(credited, str)
            assert list(credited.advantages.values()) == [s.advantage for s in update.sequences]
            lengths = [len(s.rollout.token_ids) for s in update.sequences]
            wanted = spread_advantages(update.sequences).split(lengths)
            for values, one in zip(credited.token_advantages.values(), wanted, strict=True):
                torch.testing.assert_close(torch.from_numpy(values), one)
            count += any(credited.advantages.values())
    assert count


def test_fewer_negatives_are_a_part_of_the_runs_own(quickstart_run: Path):
    """K' and s change who trains and how much; the nearest negative stays."""
    found = replay(quickstart_run, ["care.max_negatives=1", "care.neg_scale=0.25"])
    assert set(found.changes) >= {"care.max_negatives", "care.neg_scale"}
    anchored = [g for g in found.groups if g.recorded_outcome == "anchored" and g.recorded_chosen]
    assert anchored
    for group in anchored:
        assert len(group.replayed_chosen) <= 3
        assert set(group.replayed_chosen) <= set(group.recorded_chosen)
    assert (
        found.replayed.summary()["trained_sequences"]
        < found.recorded.summary()["trained_sequences"]
    )


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("rollout.temperature=0.5", "rollout.temperature"),
        ("reward.format_weight=0.3", "reward.format_weight"),
        ("care.reflection.cue=again", "care.reflection.cue"),
        ("preset=official", "preset"),
    ],
)
def test_what_decides_the_samples_is_refused(quickstart_run: Path, override, named):
    with pytest.raises(ValueError, match=named):
        replay(quickstart_run, [override])


def test_what_was_not_stored_is_refused_with_the_reason(quickstart_run: Path, tmp_path: Path):
    """CARE over the archive of a baseline, which has no distances; a run without an archive."""
    run = write_run(tmp_path / "run", list(invented_groups(2)))
    (run / "config.yaml").write_bytes((quickstart_run / "config.yaml").read_bytes())
    with pytest.raises(ValueError, match="no distances"):
        replay(run)
    assert main(["replay", str(run)]) == 2
    assert replay(run, ["algorithm=grpo"]).groups
    shutil.rmtree(run / "archive")
    with pytest.raises(ValueError, match=r"logging\.archive_gib=0"):
        replay(run)


def test_the_command_writes_table_and_files(quickstart_run: Path, tmp_path: Path, capsys):
    """A table on standard output; JSON, CSV and PNG on request."""
    outputs = [tmp_path / f"replay.{kind}" for kind in ("json", "csv", "png")]
    options = [f"--out={path}" for path in outputs]
    assert main(["replay", str(quickstart_run), "algorithm=dapo", *options]) == 0
    assert "sampled tokens with an advantage" in capsys.readouterr().out
    written = json.loads(outputs[0].read_text())
    with outputs[1].open() as file:
        assert len(list(csv.DictReader(file))) == len(written["per_group"]) == written["groups"]
    assert outputs[2].read_bytes().startswith(b"\x89PNG")
    assert main(["replay", str(quickstart_run), "--out=replay.xls"]) == 2


def _rows(run: Path) -> list[dict]:
    return read_archive(run).to_pylist()
