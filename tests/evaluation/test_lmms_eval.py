"""The LMMs-Eval adapter, against a re-statement of the interface that it is written for.

LMMs-Eval itself is not installed here. Restated are its abstract model, the arguments of a
`generate_until` request and the registration payload (lmms_eval/api/model.py, api/instance.py,
models/registry_v2.py, read in November 2026); what its evaluator does around them is not covered.
"""

import abc
import importlib
import sys
from dataclasses import dataclass
from types import ModuleType

import pytest

from bench.protocol_fixtures import draw


class _Lmms(abc.ABC):
    is_simple = True

    def __init__(self):
        self._rank, self._world_size, self.task_dict = 0, 1, {}

    @abc.abstractmethod
    def loglikelihood(self, requests): ...

    @abc.abstractmethod
    def generate_until(self, requests): ...

    @abc.abstractmethod
    def generate_until_multi_round(self, requests): ...

    @property
    def rank(self):
        return self._rank

    @classmethod
    def create_from_arg_string(cls, text, additional_config=None):
        arguments = dict(part.split("=", 1) for part in text.split(",") if part)
        more = {k: v for k, v in (additional_config or {}).items() if v is not None}
        return cls(**arguments, **more)


@dataclass(frozen=True)
class _Instance:
    args: tuple


@dataclass(frozen=True)
class _Manifest:
    model_id: str
    simple_class_path: str | None = None
    chat_class_path: str | None = None
    aliases: tuple = ()


@pytest.fixture
def adapter(monkeypatch):
    """The adapter's module, its base class restated."""
    contents = {
        "lmms_eval": {},
        "lmms_eval.api": {},
        "lmms_eval.api.model": {"lmms": _Lmms},
        "lmms_eval.models": {},
        "lmms_eval.models.registry_v2": {"ModelManifest": _Manifest},
    }
    for name, values in contents.items():
        module = ModuleType(name)
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, name, module)
    name = "care_train.evaluation.lmms_eval_model"
    monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module(name)
    sys.modules.pop(name, None)


def _requests(model, contexts: list[str], images: list[list], generation: dict) -> list[_Instance]:
    model.task_dict["colors"] = {"test": [{"images": row} for row in images]}
    return [
        _Instance((context, generation, lambda doc: doc["images"], place, "colors", "test"))
        for place, context in enumerate(contexts)
    ]


_ARGUMENTS = "prompt__system=null,rollout__max_new_tokens=12"


@pytest.fixture
def model(adapter, tiny_folder):
    arguments = f"path={tiny_folder()},{_ARGUMENTS}"
    config = {"batch_size": 2, "device": "cuda:0"}
    return adapter.CareTrainModel.create_from_arg_string(arguments, config)


def test_requests_are_answered_in_order_whatever_the_batch(model, adapter, tiny_folder):
    """Text alone, one image, two images in the text; the same in one batch and in several."""
    contexts = ["what color?", "what color?", "is <image> like <image>?", "<image> <image> <image>"]
    images = [[], [draw("red")], [draw("red"), draw("blue")], [draw("green")]]
    requests = _requests(model, contexts, images, {"temperature": 0, "max_new_tokens": 16})
    answers = model.generate_until(requests)
    assert len(answers) == 4 and all(isinstance(answer, str) for answer in answers)
    other = adapter.CareTrainModel(path=str(tiny_folder()), prompt__system="null", batch_size="8")
    other.task_dict = model.task_dict
    longer = other.generate_until(requests)
    for answer, long_answer in zip(answers, longer, strict=True):
        assert long_answer.startswith(answer)


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
    assert issubclass(getattr(adapter, name), _Lmms) and getattr(adapter, name).is_simple
