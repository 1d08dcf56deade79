"""`timer`: each moment in one part, and where a process is, also after an error."""

import time

import pytest

from care_train.training.failures import OutOfMemoryError
from care_train.training.timer import StepSeconds, begin_step, current_place, timer


def test_an_inner_timer_interrupts_the_outer_one():
    """Parts add up to the whole: the inner part's seconds are not the outer one's as well."""
    begin_step(None)  # A test before this one may have ended within a part.
    seconds = StepSeconds()
    with timer("update"):
        time.sleep(0.01)
        with timer("optimizer"):
            time.sleep(0.05)
            assert current_place().part == "optimizer"
        assert current_place().part == "update"
    assert current_place().part == "other"
    values = seconds.values()
    assert 0.01 <= values["seconds_update"] < 0.05 <= values["seconds_optimizer"]
    parts = sum(values[f"seconds_{part}"] for part in ("update", "optimizer", "other"))
    assert parts == pytest.approx(values["seconds"])
    assert values["seconds_overhead"] == pytest.approx(parts - values["seconds_update"])


@pytest.mark.parametrize(
    ("part", "advice"),
    [
        ("generate", "rollout.batch_size"),
        ("reflect", "rollout.batch_size"),
        ("reference", "train.micro_batch_size"),
        ("select", "fewer ranks"),
    ],
)
def test_out_of_memory_names_the_part_and_what_to_lower(part, advice):
    """After the error the watchdog still sees the part it came from."""
    begin_step(3)
    with (
        pytest.raises(OutOfMemoryError, match=rf"in {part} \(no, out of memory\).*{advice}"),
        timer(part),
    ):
        raise RuntimeError("no, out of memory")
    assert (current_place().part, current_place().step) == (part, 3)
    begin_step(None)
    assert (current_place().part, current_place().step) == ("other", None)
