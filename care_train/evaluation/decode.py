"""Answer a benchmark's questions, one record per response, written as soon as it is there."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from care_train.config import Config
from care_train.distributed import barrier, gather, is_main, rank, world_size
from care_train.evaluation.decoding import EVAL_STEP, decoding, equal_batches
from care_train.evaluation.judging import Judged, judge_responses
from care_train.evaluation.question import Question
from care_train.evaluation.question_set import QuestionSet
from care_train.reporting import track
from care_train.reporting.jsonl import JsonlWriter, read_jsonl
from care_train.rollout.engine import Completion, Request, RolloutEngine, request_seed
from care_train.training.failures import Stopped
from care_train.training.guard import StopSignals
from care_train.training.session import Session
from care_train.verifier.judge import Judge

Job = tuple[int, int, int]
"""A question's place, a seed of `eval.seeds`, and which of `eval.samples` responses."""
Record = Mapping[str, Any]


def answer_questions(
    session: Session,
    engine: RolloutEngine,
    questions: QuestionSet,
    folder: Path,
    device: torch.device,
) -> list[Record]:
    """Every record of a benchmark: those found in `folder`, and the missing ones made now.

    Args:
        session: the model with its prompt encoder.
        engine: generates with it.
        questions: the benchmark's.
        folder: where this run's records of it are; each rank appends to a file of its own.
        device: this rank's.

    Returns:
        All records on every rank, in the order of seeds, questions and samples.

    Raises:
        ValueError: a record found was made from another question.
        Stopped: a signal asked for it; what is written stays.
    """
    config = session.config
    ids = questions.ids
    jobs = list(_jobs(config, len(ids)))
    found = _found(folder)
    _check_found(found, questions, folder)
    missing = [job for job in jobs if (ids[job[0]], job[1], job[2]) not in found]
    own = missing[rank() :: world_size()]
    batches = equal_batches(own, config.eval.batch_size, device)
    judge = Judge(config.reward.judge) if config.reward.judge else None
    bar = track(batches, questions.name, config.logging.progress and is_main())
    answered = 0
    with StopSignals() as signals, closing(JsonlWriter(folder / f"rank_{rank()}.jsonl")) as log:
        for batch in bar:
            for record in _answer(session, engine, questions, judge, batch):
                log.write(record)
            answered += len(batch)
            if stop := signals.requested(device):
                have = len(jobs) - len(missing) + sum(gather(answered))
                raise Stopped(stop, have, len(jobs), folder.parents[1], folder)
    barrier()
    records = _found(folder)
    return [records[ids[place], seed, sample] for place, seed, sample in jobs]


def _jobs(config: Config, count: int) -> Iterator[Job]:
    for seed in config.eval.seeds:
        for place in range(count):
            for sample in range(config.eval.samples):
                yield place, seed, sample


def _answer(
    session: Session,
    engine: RolloutEngine,
    questions: QuestionSet,
    judge: Judge | None,
    batch: Sequence[Job],
) -> list[Record]:
    """Decode and judge a batch; its questions' images are read once however often it is asked."""
    asked = {place: questions.read(place) for place, _, _ in batch}
    encoded = session.encoder.encode([question.sample for question in asked.values()])
    prompts = dict(zip(asked, encoded, strict=True))
    requests = [
        Request(prompts[place], request_seed(seed, EVAL_STEP, questions.ids[place], sample))
        for place, seed, sample in batch
    ]
    completions = engine.generate(requests, decoding(session.config))
    responses = [(asked[job[0]], c) for job, c in zip(batch, completions, strict=True)]
    judged = judge_responses(session, questions, judge, responses)
    return [
        _record(questions, job, *response, one)
        for job, response, one in zip(batch, responses, judged, strict=True)
    ]


def _record(
    questions: QuestionSet, job: Job, question: Question, completion: Completion, judged: Judged
) -> Record:
    place, seed, sample = job
    judgement = judged.judgement
    return {
        "id": questions.ids[place],
        "seed": seed,
        "sample": sample,
        "digest": questions.digests[place],
        "group": question.group,
        "expected": question.sample.answer,
        "answer": judged.answer,
        "accuracy": judgement.accuracy,
        "exact": judgement.is_exact,
        "format": judged.format_score,
        "finished": completion.finished,
        "tokens": len(completion.token_ids),
        "reason": judgement.reason,
        "vote": judgement.vote,
        "response": judged.text,
    }


def _found(folder: Path) -> dict[tuple[str, int, int], Record]:
    """Records by question, seed and sample, whatever ranks wrote them."""
    records: dict[tuple[str, int, int], Record] = {}
    for path in sorted(folder.glob("rank_*.jsonl")):
        for record in read_jsonl(path):
            records[record["id"], record["seed"], record["sample"]] = record
    return records


def _check_found(
    found: Mapping[tuple[str, int, int], Record], questions: QuestionSet, folder: Path
) -> None:
    digests = dict(zip(questions.ids, questions.digests, strict=True))
    for (id, _, _), record in found.items():
        if digests.get(id, record["digest"]) != record["digest"]:
            raise ValueError(
                f"{folder}: the record of {id!r} answers another question than the one that "
                f"{questions.source} has now: restore those rows, or choose another name for the "
                "run"
            )
