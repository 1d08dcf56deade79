"""Stand-ins for engine, encoder and scorer: what the trainer asks of them, without a model."""

from types import SimpleNamespace

import torch

from care_train.algorithm.types import GroupUpdate
from care_train.config import build_config
from care_train.data import Sample
from care_train.models.batch import collate
from care_train.models.prompts import EncodedPrompt
from care_train.rollout.engine import Completion
from care_train.training.engine import StepResult
from care_train.training.sampling import GroupSampler, SampledGroup
from care_train.training.scoring import OldPolicyRows
from care_train.training.update import PolicyUpdater
from tests.algorithm.builders import right, wrong

PROMPT = EncodedPrompt((101, 102, 103))
THINK_ID = 900
"""What the opening think tag encodes to."""


def sampled_group(rollouts, prompt: EncodedPrompt = PROMPT, name: str = "0") -> SampledGroup:
    sample = Sample(id=name, prompt="?", answer="1", location="rows.jsonl: row 1")
    return SampledGroup(sample, prompt, tuple(rollouts))


class FakeEngine:
    """Records the micro-batches of every optimiser step."""

    device = torch.device("cpu")
    score = None
    learning_rate = 1e-6
    loaded = SimpleNamespace(tokenizer=lambda text, **_: {"input_ids": [THINK_ID]})

    def __init__(self) -> None:
        self.steps: list[list] = []

    def collate(self, sequences):
        return collate(sequences, 0, None)

    def step(self, micro_batches, temperature):
        self.steps.append(list(micro_batches))
        return StepResult(0.0, 0.0, [])

    def rows(self, name: str) -> torch.Tensor | None:
        """One loss argument of all rows of all steps; None where no row has it."""
        values = [m.loss_arguments.get(name) for step in self.steps for m in step]
        present = [value for value in values if value is not None]
        return torch.cat(present) if present else None

    def trained_ids(self) -> list[list[int]]:
        """Prompt, prefix and response of each trained sequence."""
        return [
            ids[mask.bool()].tolist()
            for step in self.steps
            for micro in step
            for ids, mask in zip(
                micro.batch.inputs["input_ids"], micro.batch.inputs["attention_mask"], strict=True
            )
        ]


class FakeScorer:
    """Log-prob of every token: -1 per token of context before the response."""

    def __init__(self) -> None:
        self.scored: list[list] = []

    def log_probs(self, forward, sequences, filler, pool_spans=None):
        self.scored.append(list(sequences))
        return [torch.full((len(s.response_ids),), -float(s.response_start)) for s in sequences], []

    def old_policy(self, sequences, filler, pool_spans=None):
        rows, embeddings = self.log_probs(None, sequences, filler, pool_spans)
        return [OldPolicyRows(row, torch.zeros_like(row)) for row in rows], embeddings


def train(updates: list[GroupUpdate], groups=None, **values) -> tuple[FakeEngine, FakeScorer]:
    """Run the optimiser's passes over updates and return what reached the engine."""
    config = build_config(values)
    engine, scorer = FakeEngine(), FakeScorer()
    if groups is None:
        groups = [sampled_group([wrong()]) for _ in updates]
    reference = SimpleNamespace(score=None) if config.loss.kl_coef else None
    PolicyUpdater(engine, config, scorer, reference).update(groups, updates)
    return engine, scorer


class FakeRollouts:
    """Generates `response` for every request, remembering requests and sampling settings."""

    def __init__(self, response: tuple[int, ...] = (1, 2)) -> None:
        self._response = response
        self.requests: list = []
        self.sampling: list = []

    def generate(self, requests, sampling):
        self.requests += requests
        self.sampling.append(sampling)
        return [Completion(self._response, True) for _ in requests]


class FakeEncoder:
    """One token per character."""

    def encode_text(self, text: str) -> tuple[int, ...]:
        return tuple(map(ord, text))


class FakeRolloutScorer:
    """Scores a completion as whatever the prefix makes it: a reflected rollout with its ids."""

    def score_all(self, completions, *, reflected=False):
        return [right(prefix_ids=prefix, reflected=reflected) for _, _, prefix in completions]


def make_sampler(**values) -> tuple[GroupSampler, FakeRollouts]:
    engine = FakeRollouts()
    sampler = GroupSampler(engine, FakeEncoder(), FakeRolloutScorer(), build_config(values))
    return sampler, engine
