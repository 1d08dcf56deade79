"""Ranks of one test: `python -m tests.evaluation.ranks MODEL ROWS OUT [EVAL ARGUMENTS]`.

First `evaluate` with an engine whose `generate` is a collective, as that of a vLLM sharded by
tensor parallelism is; then LMMs-Eval's way with the adapter; then `care-train eval` with the
arguments.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from bench.protocol_fixtures import draw
from care_train.cli import main as care_train
from care_train.config import DataSettings
from care_train.data import load_samples
from care_train.distributed import rank
from care_train.evaluation.evaluate import evaluate
from care_train.rollout.engine import Completion, Request, SamplingSettings
from care_train.rollout.transformers_engine import TransformersEngine
from tests.evaluation import lmms_interface
from tests.train.builders import make_session


class CollectiveEngine(TransformersEngine):
    """Every rank must call `generate` for any to return."""

    num_calls = 0

    def generate(self, requests: Sequence[Request], sampling: SamplingSettings) -> list[Completion]:
        self.num_calls += 1
        dist.all_reduce(torch.ones(1))
        return super().generate(requests, sampling)


def main(model: str, rows: str, out: str, *arguments: str) -> int:
    torch.set_num_threads(1)
    session = make_session(Path(model), {"eval": {"batch_size": 2}})
    engine = CollectiveEngine(session.loaded, 2)
    samples = load_samples(DataSettings(path=rows, max_samples=5))
    result = evaluate(session, engine, samples, torch.device("cpu"), greedy=True)
    found = {"num_calls": engine.num_calls, "num_questions": result.num_questions}
    found |= _through_lmms_eval(model)
    Path(out, f"found_{rank()}.json").write_text(json.dumps(found))
    return care_train(arguments)


def _through_lmms_eval(model: str) -> dict[str, Any]:
    """Three documents, every second one a rank's, through the adapter."""
    lmms_interface.install()
    from care_train.evaluation.lmms_eval_model import CareTrainModel

    lm = CareTrainModel(model, prompt__system="null", rollout__max_new_tokens="6", batch_size="1")
    docs = [{"images": [draw(color)]} for color in ("red", "green", "blue")]
    lm.task_dict["colors"] = {"test": docs}
    visual, generation = (lambda doc: doc["images"]), {"temperature": 0}
    requests = [
        lmms_interface.Instance(("what color?", generation, visual, place, "colors", "test"))
        for place in range(lm.rank, len(docs), lm.world_size)
    ]
    answers = lmms_interface.run_requests(lm, requests)
    return {"ranks": lm.world_size, "answers": answers}


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
