"""The LMMs-Eval adapter, against a re-statement of the interface that it is written for."""

import importlib
import sys

import pytest

from bench.protocol_fixtures import draw
from tests.evaluation.lmms_interface import Instance, Lmms, modules


@pytest.fixture
def adapter(monkeypatch):
    """The adapter's module, its base class restated."""
    # Accelerate otherwise takes all cores for this process.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for name, module in modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    name = "care_train.evaluation.lmms_eval_model"
    monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module(name)
    sys.modules.pop(name, None)


def _requests(model, contexts: list[str], images: list[list], generation: dict) -> list[Instance]:
    model.task_dict["colors"] = {"test": [{"images": row} for row in images]}
    return [
        Instance((context, generation, lambda doc: doc["images"], place, "colors", "test"))
        for place, context in enumerate(contexts)
    ]


_ARGUMENTS = "prompt__system=null,rollout__max_new_tokens=12"


@pytest.fixture
def model(adapter, tiny_folder):
    arguments = f"path={tiny_folder()},{_ARGUMENTS}"
    config = {"batch_size": 2, "max_batch_size": 8, "device": "cuda:0"}
    return adapter.CareTrainModel.create_from_arg_string(arguments, config)


def test_requests_are_answered_in_order_whatever_the_batch(model, adapter, tiny_folder):
    """Text alone, one image, two images in the text; the same in one batch and in several."""
    contexts = ["what color?", "what color?", "is <image> like <image>?", "<image> <image> <image>"]
    images = [[], [draw("red")], [draw("red"), draw("blue")], [draw("green")]]
    requests = _requests(model, contexts, images, {"temperature": 0, "max_new_tokens": 16})
    answers = model.generate_until(requests)
    assert len(answers) == 4 and all(isinstance(answer, str) for answer in answers)
    other = adapter.CareTrainModel(
        path=str(tiny_folder()), prompt__system="null", batch_size="auto"
    )
    other.task_dict = model.task_dict
    longer = other.generate_until(requests)
    for answer, long_answer in zip(answers, longer, strict=True):
        assert long_answer.startswith(answer)


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
        ("<think>so</think> <answer> B </answer>", {}, "true", "B"),
        ("<think>so</think> <answer>B</answer>", {}, False, "<think>so</think> <answer>B</answer>"),
        ("it is B\n\nthen", {"until": ["\n\n"]}, True, "it is B"),
        ("it is B", {"until": "Q:"}, True, "it is B"),
    ],
)
def test_answers_are_shown_without_reasoning(text, generation, answer_only, shown, adapter, model):
    """Tasks parse answers; whole responses on request."""
    model._answer_only = str(answer_only).lower() == "true"
    assert model._shown(text, generation) == shown


def test_what_is_not_offered_says_so(model):
    """No log-likelihoods, no rounds, no video."""
    with pytest.raises(NotImplementedError):
        model.loglikelihood([])
    with pytest.raises(NotImplementedError):
        model.generate_until_multi_round([])
    with pytest.raises(ValueError, match="colors 0: got a bytes"):
        model.generate_until(_requests(model, ["?"], [[b"video"]], {}))


def test_wrong_arguments_are_named(adapter, tiny_folder):
    """An unknown setting is an error with its name, not ignored."""
    with pytest.raises(ValueError, match=r"rollout\.lenght"):
        adapter.CareTrainModel(path=str(tiny_folder()), rollout__lenght="3")


def test_it_registers_under_its_name(adapter):
    """The entry point's payload names a class that exists and fits."""
    from care_train.evaluation.lmms_eval_plugin import manifest

    payload = manifest()
    module, name = payload.simple_class_path.rsplit(".", 1)
    assert payload.model_id == "care_train" and module == adapter.__name__
    assert issubclass(getattr(adapter, name), Lmms) and getattr(adapter, name).is_simple
