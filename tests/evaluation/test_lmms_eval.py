"""LMMs-Eval finds our model, runs its own tasks on it, and gets answers it can parse."""

import json
from pathlib import Path

import pytest
import yaml

from bench.protocol_fixtures import draw

pytest.importorskip("lmms_eval", reason="pip install --no-deps -r requirements/lmms-eval.txt")

from lmms_eval.api.instance import Instance

from care_train.evaluation.lmms_eval import CareTrainModel
from tests.train.runs import python


def _requests(model, contexts: list[str], images: list[list], generation: dict) -> list[Instance]:
    model.task_dict["colors"] = {"test": [{"images": row} for row in images]}
    visual = lambda doc: doc["images"]  # noqa: E731
    metadata = {"task": "colors", "doc_id": 0, "repeats": 1}
    return [
        Instance("generate_until", (text, generation, visual, i, "colors", "test"), 0, metadata)
        for i, text in enumerate(contexts)
    ]


@pytest.fixture
def model(tiny_folder):
    arguments = f"path={tiny_folder()},prompt__system=null,rollout__max_new_tokens=12"
    config = {"batch_size": 2, "max_batch_size": 8, "device": "cuda:0"}
    return CareTrainModel.create_from_arg_string(arguments, config)


def test_requests_are_answered_in_order_whatever_the_batch(model, tiny_folder):
    """Text alone, one image, two images in the text; the same in one batch and in several."""
    contexts = ["what color?", "what color?", "is <image> like <image>?", "<image> <image> <image>"]
    images = [[], [draw("red")], [draw("red"), draw("blue")], [draw("green")]]
    requests = _requests(model, contexts, images, {"temperature": 0, "max_new_tokens": 16})
    answers = model.generate_until(requests)
    assert len(answers) == 4 and all(isinstance(answer, str) for answer in answers)
    other = CareTrainModel(path=str(tiny_folder()), prompt__system="null", batch_size="auto")
    other.task_dict = model.task_dict
    for answer, longer in zip(answers, other.generate_until(requests), strict=True):
        assert longer.startswith(answer)


def test_a_document_asked_again_gets_another_sample(model):
    """LMMs-Eval's `repeats`: the same request several times over, in one batch or two."""
    requests = _requests(model, ["what color?"], [[draw("red")]], {"temperature": 1.0})
    answers = model.generate_until(requests * 5)
    assert len(set(answers)) > 1
    assert model.generate_until(requests * 5) == answers


def test_sampling_follows_the_task(model):
    """Temperature 0 and do_sample=False are greedy; another temperature is the task's."""
    assert model._sampling({"temperature": 0}).greedy
    assert model._sampling({"do_sample": False}).greedy
    sampled = model._sampling({"temperature": 0.3, "top_p": 0.9, "max_new_tokens": 4096})
    assert (sampled.greedy, sampled.temperature, sampled.top_p) == (False, 0.3, 0.9)
    assert sampled.max_new_tokens == 12


@pytest.mark.parametrize(
    ("text", "generation", "answer_only", "shown"),
    [
        ("<think>so</think> <answer> B </answer>", {}, True, "B"),
        ("<think>so</think> <answer>B</answer>", {}, False, "<think>so</think> <answer>B</answer>"),
        ("it is B\n\nthen", {"until": ["\n\n"]}, True, "it is B"),
        ("it is B", {"until": "Q:"}, True, "it is B"),
    ],
)
def test_answers_are_shown_without_reasoning(text, generation, answer_only, shown, model):
    """Tasks parse answers; whole responses on request."""
    model._answer_only = answer_only
    assert model._shown(text, generation) == shown


def test_what_is_not_offered_says_so(model, tiny_folder):
    """No log-likelihoods, no rounds, no video, no unknown setting."""
    for method in (model.loglikelihood, model.generate_until_multi_round):
        with pytest.raises(NotImplementedError):
            method([])
    with pytest.raises(ValueError, match="colors 0: got a bytes"):
        model.generate_until(_requests(model, ["?"], [[b"video"]], {}))
    with pytest.raises(ValueError, match=r"rollout\.lenght"):
        CareTrainModel(path=str(tiny_folder()), rollout__lenght="3")


_TASKS = {
    "mmmu": ("mmmu/mmmu_val.yaml", "validation"),
    "mmmu_pro_standard": ("mmmu_pro/mmmu_pro_standard.yaml", "test"),
}


def _write_tasks(repositories: dict[str, Path], folder: Path) -> None:
    """LMMs-Eval's own two tasks as they are, but for where their rows are."""
    import lmms_eval

    for name, (task, split) in _TASKS.items():
        paths = sorted(repositories[name].rglob("*.parquet"))
        rows = [str(path) for path in paths if "vision" not in path.parts]
        values = {
            "include": f"{Path(lmms_eval.__file__).parent}/tasks/{task}",
            **{"task": f"local_{name}", "dataset_path": "parquet", "dataset_name": None},
            "dataset_kwargs": {"data_files": {split: rows}},
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(values))


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_lmms_eval_runs_its_tasks_on_our_model(ranks, repositories, tiny_folder, tmp_path):
    """The package's command line, its entry point and its scores; each document answered once."""
    _write_tasks(repositories, tmp_path)
    launch = ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    arguments = f"path={tiny_folder()},prompt__system=null,rollout__max_new_tokens=8"
    python(
        *(*launch, "-m", "lmms_eval", "--model", "care_train"),
        *("--model_args", arguments, "--batch_size", 4, "--include_path", tmp_path),
        *("--tasks", ",".join(f"local_{name}" for name in _TASKS)),
        *("--log_samples", "--output_path", tmp_path / "out"),
    )
    (path,) = tmp_path.glob("out/*/*_results.json")
    results = json.loads(path.read_text())["results"]
    for name, count in (("mmmu", 8), ("mmmu_pro_standard", 4)):
        assert 0 <= results[f"local_{name}"]["mmmu_acc,none"] <= 1
        (log,) = tmp_path.glob(f"out/*/*_samples_local_{name}.jsonl")
        answered = [json.loads(line) for line in log.read_text().splitlines()]
        assert sorted(one["doc_id"] for one in answered) == list(range(count))
