"""What the gate compares, on metrics made here; and what it leaves out."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from bench import gate
from bench.gate import comparison, differences, numbers_of, weights_digest


def _lines(change: Callable[[list[dict]], object] = lambda records: None) -> list[str]:
    """Metrics of two steps and an evaluation, after a change."""
    records = [
        {"phase": "eval", "step": 0, "time": 1.5, "accuracy": 0.25},
        {"phase": "train", "step": 1, "time": 2.5, "loss": 0.1, "groups": 4, "seconds": 3.0},
        {"phase": "train", "step": 2, "time": 3.5, "loss": None, "groups": 4, "seconds_sync": 0.1},
    ]
    change(records)
    return [json.dumps(record) for record in records]


EQUAL = numbers_of(_lines())


def test_a_run_equals_itself_whatever_the_clock_says() -> None:
    clock = {"time": 9.0, "seconds": 8.0, "seconds_new_part": 1.0, "tokens_per_second": 7}
    assert numbers_of(_lines(lambda records: records[1].update(clock))) == EQUAL
    nothing = {"changed": 0, "first": "", "missing": {}, "added": {}}
    assert comparison(EQUAL, EQUAL) == {"steps": 2, "numbers": 5, **nothing}


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (0.1, 0.1 + 2**-56, "0.1 -> 0.10000000000000002 (relative 1.4e-16)"),
        (0.0, -0.0, "0.0 -> -0.0 (relative 0.0e+00)"),
        (0.1, None, "0.1 -> null"),
    ],
    ids=["one bit", "minus zero", "not finite"],
)
def test_the_least_change_is_a_difference(old: float, new: float | None, said: str) -> None:
    one, other = (numbers_of(_lines(lambda r, v=v: r[1].update(loss=v))) for v in (old, new))
    assert [str(found) for found in differences(one, other)] == [f"train 1: loss {said}"]
    assert comparison(one, other)["first"] == f"train 1: loss {said}"


def test_a_missing_step_and_a_missing_key_are_differences() -> None:
    without_step = numbers_of(_lines(lambda records: records.pop()))
    names = [difference.name for difference in differences(EQUAL, without_step)]
    assert names == ["train 2: loss", "train 2: groups"]
    lost = {"steps": 1, "missing": {"train: loss": 1, "train: groups": 1}}
    assert comparison(EQUAL, without_step) == comparison(EQUAL, EQUAL) | lost
    without_key = numbers_of(_lines(lambda records: records[2].pop("groups")))
    assert str(*differences(without_key, EQUAL)) == "train 2: groups missing -> 4.0"
    # A change is seen beside keys that are new.
    other = comparison(without_key, EQUAL | {"train 1: loss": (0.2).hex()})
    assert (other["numbers"], other["changed"], other["missing"]) == (5, 1, {})
    assert other["added"] == {"train: groups": 1}
    assert other["first"] == "train 1: loss 0.1 -> 0.2 (relative 5.0e-01)"


def test_a_step_logged_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="train 2: loss is logged twice"):
        numbers_of(_lines(lambda records: records.append(records[2])))


def test_weights_are_compared_by_tensor_not_by_file(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(4.0), "b": torch.ones(2, dtype=torch.bfloat16)}
    whole, split, changed = (tmp_path / name for name in ("whole", "split", "changed"))
    for folder in (whole, split, changed):
        folder.mkdir()
    save_file(tensors, whole / "model.safetensors", metadata={"format": "pt"})
    for name, tensor in tensors.items():
        save_file({name: tensor}, split / f"{name}.safetensors")
    save_file(tensors | {"a": torch.arange(4.0) + 2**-22}, changed / "model.safetensors")
    assert weights_digest(whole) == weights_digest(split) != weights_digest(changed)
    with pytest.raises(ValueError, match="holds no weights"):
        weights_digest(tmp_path)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """`main` with runs that end at once with made numbers; `fail` names one that does not."""

    def main(*arguments: str, fail: str = "", loss: float = 0.1) -> int:
        def run(checkout: Path, name: str, output: Path) -> gate.Numbers:
            if name == fail:
                raise RuntimeError("status 1: out of luck")
            return EQUAL | {"train 1: loss": loss.hex()}

        monkeypatch.setattr(gate, "_run", run)
        return gate.main(arguments)

    return main


def test_recorded_numbers_are_compared_later(
    command: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = str(tmp_path / "numbers.json")
    assert command("--record", file, "--only", "care,vllm") == 0
    assert command("--compare", file, "--only", "vllm") == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["runs"].keys() == {"cold", "vllm"}
    assert command("--compare", file, "--only", "care", loss=0.2) == 1
    assert command("--compare", file, "--only", "care,vllm", fail="vllm") == 2
    assert "new vllm failed: status 1: out of luck" in capsys.readouterr().err
    assert command("--compare", file, "--only", "care", fail="cold") == 2
    with pytest.raises(SystemExit, match="2"):
        command("--compare", file, "--only", "care,grpo")
    assert "got 'grpo', wanted some of care,vllm" in capsys.readouterr().err
