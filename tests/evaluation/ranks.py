"""Ranks of one test: `python -m tests.evaluation.ranks MODEL ROWS OUT [EVAL ARGUMENTS]`.

First `evaluate` with an engine whose `generate` is a collective, as that of a vLLM sharded by
tensor parallelism is; then `care-train eval` with the arguments.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from care_train.cli import main as care_train
from care_train.config import DataSettings
from care_train.data import load_samples
from care_train.distributed import rank
from care_train.evaluation.evaluate import evaluate
from care_train.rollout.engine import Completion, Request, SamplingSettings
from care_train.rollout.transformers_engine import TransformersEngine
from tests.train.builders import make_session


class CollectiveEngine(TransformersEngine):
    """Every rank must call `generate` for any to return."""

    num_calls = 0

    def generate(self, requests: Sequence[Request], sampling: SamplingSettings) -> list[Completion]:
        self.num_calls += 1
        dist.all_reduce(torch.ones(1))
        return super().generate(requests, sampling)


def main(model: str, rows: str, out: str, *arguments: str) -> int:
    session = make_session(Path(model), {"rollout": {"batch_size": 2}})
    engine = CollectiveEngine(session.loaded, 2)
    samples = load_samples(DataSettings(path=rows, max_samples=5))
    result = evaluate(session, engine, samples, torch.device("cpu"), greedy=True)
    found = {"num_calls": engine.num_calls, "num_questions": result["num_questions"]}
    Path(out, f"found_{rank()}.json").write_text(json.dumps(found))
    return care_train(arguments)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
