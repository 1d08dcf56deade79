"""Stand-ins for engine, encoder and scorer: what the trainer asks of them, without a model."""

from types import SimpleNamespace

import torch

from care_kernels import PolicyLoss
from care_train.algorithm.types import GroupUpdate
from care_train.config import build_config
from care_train.data import Sample
from care_train.models.batch import TokenSequence, collate
from care_train.models.prompts import EncodedPrompt
from care_train.rollout.engine import Completion
from care_train.training.engine import StepResult
from care_train.training.groups import Group
from care_train.training.log_probs import LogProbs, SequenceRows
from care_train.training.sampler import Sampler
from care_train.training.update import PolicyUpdater
from tests.algorithm.builders import wrong

PROMPT = EncodedPrompt((101, 102, 103))


def sampled_group(rollouts, name: str = "0", **values) -> Group:
    sample = Sample(id=name, prompt="?", answer="1", location="rows.jsonl: row 1")
    return Group(tuple(rollouts), sample=sample, prompt=PROMPT, **values)


class FakeEngine:
    """Records the micro-batches of every optimiser step."""

    device = torch.device("cpu")
    learning_rate = 1e-6
    filler = TokenSequence(EncodedPrompt((0,)), (), (0,))

    def __init__(self) -> None:
        self.steps: list[list] = []

    def collate(self, sequences):
        return collate(sequences, 0, None)

    def step(self, micro_batches, temperature):
        self.steps.append(list(micro_batches))
        return StepResult(0.0, 0.0, [_unchanged(len(micro.batch.rows)) for micro in micro_batches])

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


class FakeLogProbs(LogProbs):
    """Log-prob of every token: -1 per token of context before the response."""

    def __init__(self, engine, config, reference) -> None:
        super().__init__(engine, config, reference)
        self.scored: list[list] = []

    def forward_all(self, forward, sequences, pool_spans=None):
        self.scored.append(list(sequences))
        rows = [torch.full((len(s.response_ids),), -float(s.response_start)) for s in sequences]
        return [SequenceRows(row, torch.zeros_like(row)) for row in rows]

    def old_policy(self, sequences, pool_spans=None):
        return self.forward_all(None, sequences)


def train(updates: list[GroupUpdate], rollouts=None, **values) -> tuple[FakeEngine, FakeLogProbs]:
    """Run the optimiser's passes over updates and return what reached the engine.

    Args:
        updates: one for each group.
        rollouts: of every group; some wrong one by default.
        values: settings.
    """
    config = build_config(values)
    engine = FakeEngine()
    groups = [sampled_group(rollouts or [wrong()], update=update) for update in updates]
    reference = SimpleNamespace(log_probs=None) if config.loss.kl_coef else None
    log_probs = FakeLogProbs(engine, config, reference)
    PolicyUpdater(engine, config, reference).update(groups, log_probs.items(groups))
    return engine, log_probs


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


def make_sampler(**values) -> tuple[Sampler, FakeRollouts]:
    engine = FakeRollouts()
    return Sampler(engine, FakeEncoder(), build_config(values)), engine


def _unchanged(count: int) -> PolicyLoss:
    """The loss's report on rows that it does not compute."""
    zeros, flags = torch.zeros(count), torch.zeros(count, dtype=torch.bool)
    return PolicyLoss(torch.zeros(()), zeros, None, zeros, zeros + 1, flags, flags)
