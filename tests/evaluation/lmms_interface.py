"""LMMs-Eval's model interface, re-stated: the harness itself is not installed here.

Its abstract model, the arguments of a `generate_until` request and the registration payload
(lmms_eval/api/model.py, api/instance.py, models/registry_v2.py), and what its evaluator does with a
model on several ranks (evaluator.py); read in November 2026.
"""

import abc
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch


class Lmms(abc.ABC):
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

    @property
    def world_size(self):
        return self._world_size

    @classmethod
    def create_from_arg_string(cls, text, additional_config=None):
        arguments = dict(part.split("=", 1) for part in text.split(",") if part)
        more = {k: v for k, v in (additional_config or {}).items() if v is not None}
        return cls(**arguments, **more)


@dataclass(frozen=True)
class Instance:
    args: tuple


@dataclass(frozen=True)
class Manifest:
    model_id: str
    simple_class_path: str | None = None
    chat_class_path: str | None = None
    aliases: tuple = ()


def modules() -> dict[str, ModuleType]:
    """The modules that the adapter imports, by name, for `sys.modules`."""
    contents: dict[str, dict[str, Any]] = {
        "lmms_eval": {},
        "lmms_eval.api": {},
        "lmms_eval.api.model": {"lmms": Lmms},
        "lmms_eval.models": {},
        "lmms_eval.models.registry_v2": {"ModelManifest": Manifest},
    }
    made = {name: ModuleType(name) for name in contents}
    for name, module in made.items():
        vars(module).update(contents[name])
    return made


def install() -> None:
    """In a process of its own."""
    sys.modules.update(modules())


def run_requests(lm: Any, requests: Sequence[Instance]) -> list[str]:
    """What the evaluator does with a rank's requests: each repeated, and padded to as many as any
    rank has; the responses to the padding are dropped."""
    asked = list(requests)
    if lm.world_size > 1:
        counts = lm.accelerator.gather(torch.tensor(len(asked), device=lm.device)).tolist()
        asked += [asked[-1]] * (max(counts) - counts[lm.rank])
    responses = lm.generate_until(asked)
    if lm.world_size > 1:
        lm.accelerator.wait_for_everyone()
    return responses[: len(requests)]
