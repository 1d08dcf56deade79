"""Evaluation: a single decode per question, no reflection (Sec. 8.3).

`evaluate` scores held-out rows during training; `answer_questions` writes a benchmark's records.
"""

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL import Image

from care_train.algorithm.types import Rollout
from care_train.config import Config
from care_train.data import Sample
from care_train.data.answers import accepted_answers
from care_train.data.images import image_sizes
from care_train.distributed import all_max, all_sum, barrier, gather, is_main, own_share, rank
from care_train.evaluation.question import Benchmark, Question, QuestionSet, letters
from care_train.reporting import track
from care_train.reporting.archive import ArchiveWriter
from care_train.reporting.files import JsonlWriter, read_jsonl
from care_train.rollout.engine import (
    Completion,
    Request,
    RolloutEngine,
    SamplingSettings,
    request_seed,
)
from care_train.training.archiving import archive_evaluation
from care_train.training.failures import Stopped
from care_train.training.groups import Answer
from care_train.training.guard import StopSignals
from care_train.training.session import Session
from care_train.training.timer import timer
from care_train.verifier import Response, normalize
from care_train.verifier.answers import MAX_ANSWER_CHARS

EVAL_STEP = -1
"""Stands for the step in the seeds of evaluation requests: no training step has this number."""

T = TypeVar("T")

Job = tuple[int, int, int]
"""A question's place, a seed of `eval.seeds`, and which of `eval.samples` responses."""
Record = dict[str, Any]


def evaluate(
    session: Session,
    engine: RolloutEngine,
    samples: Sequence[Sample],
    device: torch.device,
    *,
    greedy: bool = False,
    blind: bool = False,
    description: str = "evaluate",
    archive: ArchiveWriter | None = None,
    step: int = 0,
) -> dict[str, float]:
    """Decode every question once and verify: `accuracy`, `format` and `num_questions` of all ranks.

    Args:
        session: the model with its prompt encoder and verifier.
        engine: generates with it.
        samples: the questions of all ranks.
        device: this rank's.
        greedy: take the likeliest token each time, instead of sampling as in training.
        blind: show a blank image in the place of each.
        description: what the progress says.
        archive: where the answers go, but for blind ones; None: nowhere.
        step: how many steps the policy was trained.
    """
    config = session.config
    share = list(own_share(samples))
    batches = equal_batches(share, config.rollout.batch_size, device)
    sampling = decoding(config, greedy)
    rollouts: list[Rollout] = []
    how = " (greedy)" if greedy else " (blind)" if blind else ""
    for batch in track(batches, f"{description}{how}", is_main()):
        if blind:
            batch = [without_images(sample) for sample in batch]
        prompts = session.encoder.encode(batch)
        requests = [
            Request(prompt, request_seed(config.seed, EVAL_STEP, sample.id, 0))
            for sample, prompt in zip(batch, prompts, strict=True)
        ]
        with timer("generate"):
            completions = engine.generate(requests, sampling)
        rollouts += session.scorer.score_all(list(map(Answer, batch, completions)))
    if archive is not None and not blind:
        archive_evaluation(archive, step, "greedy" if greedy else "sampled", share, rollouts)
    correct = sum(rollout.accuracy for rollout in rollouts)
    well_formed = sum(rollout.format_score for rollout in rollouts)
    correct, well_formed, count = all_sum([correct, well_formed, float(len(share))], device)
    return {"accuracy": correct / count, "format": well_formed / count, "num_questions": count}


def evaluate_both(
    session: Session,
    engine: RolloutEngine,
    samples: Sequence[Sample],
    device: torch.device,
    description: str = "evaluate",
    *,
    archive: ArchiveWriter | None = None,
    step: int = 0,
) -> dict[str, float]:
    """`evaluate` at the training temperature, and what `eval.also` asks for beside."""
    more: dict[str, Any] = {"description": description, "archive": archive, "step": step}
    ask = partial(evaluate, session, engine, samples, device, **more)
    values = ask()
    if "greedy" in session.config.eval.also:
        greedy = ask(greedy=True)
        values |= {f"greedy_{name}": greedy[name] for name in ("accuracy", "format")}
    if "blind" in session.config.eval.also:
        values["blind_accuracy"] = ask(blind=True)["accuracy"]
    return values


def without_images(sample: Sample) -> Sample:
    """The sample with a white image of the same size in the place of each of its own.

    Raises:
        RowError: as `image_sizes`.
    """
    sizes = image_sizes(sample)
    return replace(sample, images=tuple(Image.new("RGB", size, "white") for size in sizes))


def decoding(config: Config, greedy: bool | None = None) -> SamplingSettings:
    """How responses are sampled: as in training (Sec. 8.2), or greedily; None: as `eval.decode`
    says."""
    rollout = config.rollout
    greedy = config.eval.decode == "greedy" if greedy is None else greedy
    return SamplingSettings(
        rollout.max_new_tokens, rollout.temperature, rollout.top_p, rollout.top_k, greedy
    )


def equal_batches(own: Sequence[T], size: int, device: torch.device) -> list[Sequence[T]]:
    """This rank's items in batches, padded with empty batches so that all ranks have as many.

    Ranks that share one vLLM by tensor parallelism must call `generate` equally often: a rank with
    fewer batches would leave the others waiting in a collective.
    """
    batches: list[Sequence[T]] = [own[start : start + size] for start in range(0, len(own), size)]
    return batches + [()] * (all_max(len(batches), device) - len(batches))


def answer_questions(
    session: Session,
    engine: RolloutEngine,
    questions: QuestionSet,
    folder: Path,
    device: torch.device,
) -> list[Record]:
    """Every record of a benchmark: those found in `folder`, and the missing ones made now.

    Args:
        session, engine: the model with its prompt encoder, and what generates with it.
        questions: the benchmark's.
        folder: where this run's records of it are; each rank appends to a file of its own.
        device: this rank's.

    Returns:
        All records on every rank, in the order of seeds, questions and samples.

    Raises:
        ValueError: a record found was made from another question.
        Stopped: a signal asked for it; what is written stays.
    """
    config, ids = session.config, questions.ids
    seeds, samples = config.eval.seeds, range(config.eval.samples)
    jobs = [(place, s, sample) for s in seeds for place in range(len(ids)) for sample in samples]
    found = _found(folder)
    digests = dict(zip(ids, questions.digests, strict=True))
    for (id, _, _), record in found.items():
        if digests.get(id, record["digest"]) != record["digest"]:
            raise ValueError(
                f"{folder}: the record of {id!r} answers another question than the one that "
                f"{questions.source} has now: restore those rows, or choose another name for the "
                "run"
            )
    missing = [job for job in jobs if (ids[job[0]], *job[1:]) not in found]
    own = own_share(missing)
    batches = equal_batches(own, config.rollout.batch_size, device)
    answered = 0
    with StopSignals() as signals, closing(JsonlWriter(folder / f"rank_{rank()}.jsonl")) as log:
        for batch in track(batches, questions.name, is_main()):
            for record in _answer(session, engine, questions, batch):
                log.write(record)
            answered += len(batch)
            if stop := signals.requested(device):
                have = len(jobs) - len(missing) + sum(gather(answered))
                raise Stopped(stop, have, len(jobs), folder.parents[1], folder)
    barrier()
    records = _found(folder)
    return [records[ids[place], seed, sample] for place, seed, sample in jobs]


def judge_responses(
    session: Session,
    benchmark: Benchmark | None,
    responses: Sequence[tuple[Question, Completion]],
) -> list[Record]:
    """What the record of each response says of its text; only the answer span counts (Sec. 8.3).

    Args:
        session: its tags, its tokenizer, its verifier and, for rows of `eval.data`, its rewards.
        benchmark: its rule decides about choices and exact matches. Other free-form answers are the
            verifier's and then the language model's of `reward.judge`, as the paper asks GPT-5.
            None, for rows of `eval.data`: responses are scored as rollouts are (Eq. 1).
        responses: each question with what was generated for it.
    """
    if benchmark is None:
        return _score(session, responses)
    verifier, records = session.scorer.verifier, []
    for question, completion in responses:
        text = session.scorer.text(completion)
        answer = verifier.answer(text)
        fault = verifier.form_fault(Response(text, question.sample, completion.finished))
        record = {"answer": answer, "format": float(not fault), "response": text}
        records.append(record | _judge(benchmark, question, answer, completion.finished))
    _ask_verifier(session, responses, records)
    return records


def _score(session: Session, responses: Sequence[tuple[Question, Completion]]) -> list[Record]:
    """The row's type, options and tolerance count, and the run's reward functions and judge."""
    scored = session.scorer.score_all([Answer(q.sample, completion) for q, completion in responses])
    records = []
    for (question, _), rollout in zip(responses, scored, strict=True):
        answer = session.scorer.verifier.answer(rollout.text)
        vote = normalize(answer or "")
        keys = accepted_answers(question.sample.answer)
        is_exact = rollout.accuracy > 0 and vote in map(normalize, keys)
        found = _judgement(rollout.accuracy, rollout.verdict, vote, is_exact)
        text = {"answer": answer, "format": rollout.format_score, "response": rollout.text}
        records.append(text | found)
    return records


def _judge(benchmark: Benchmark, question: Question, answer: str | None, finished: bool) -> Record:
    """What the benchmark's own rule says of an answer."""
    if answer is None:
        return _judgement(0.0, f"no complete answer span{'' if finished else ': cut by its limit'}")
    if len(answer) > MAX_ANSWER_CHARS:
        return _judgement(0.0, f"longer than {MAX_ANSWER_CHARS:,} characters")
    if not answer.strip():
        return _judgement(0.0, "empty answer")
    if not question.right:
        is_exact = benchmark.matches(answer, question)
        reason = "exact match" if is_exact else "no exact match"
        return _judgement(float(is_exact), reason, normalize(answer), is_exact)
    place = benchmark.choose(answer, question)
    if place is None:
        return _judgement(0.0, "names no option")
    letter, wanted = letters(place + 1)[-1], [letters(i + 1)[-1] for i in question.right]
    if letter in wanted:
        return _judgement(1.0, f"chose {letter}", letter, True)
    return _judgement(0.0, f"chose {letter}, wanted {' or '.join(sorted(wanted))}", letter)


def _judgement(accuracy: float, reason: str, vote: str = "", exact: bool = False) -> Record:
    """`vote` is the answer as a majority counts it; `exact`: right by the benchmark's own rule."""
    return {"accuracy": accuracy, "exact": exact, "reason": reason, "vote": vote}


def _ask_verifier(
    session: Session, responses: Sequence[tuple[Question, Completion]], records: list[Record]
) -> None:
    """Free-form answers without an exact match, all at once; of several keys the best counts."""
    asked: list[tuple[Record, Response]] = []
    for (question, completion), record in zip(responses, records, strict=True):
        if record["vote"] and not record["exact"] and not question.right:
            for key in question.keys or [question.sample.answer]:
                sample = replace(question.sample, answer=key)
                asked.append((record, Response(record["response"], sample, completion.finished)))
    # Not with `reward.tolerance`: what a benchmark takes for right does not follow the training.
    verdicts = session.scorer.verifier.verdicts([response for _, response in asked], None)
    for (record, _), verdict in zip(asked, verdicts, strict=True):
        if verdict.accuracy >= record["accuracy"]:
            record |= {"accuracy": verdict.accuracy, "reason": verdict.reason}


def _answer(
    session: Session,
    engine: RolloutEngine,
    questions: QuestionSet,
    batch: Sequence[Job],
) -> Iterator[Record]:
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
    judged = judge_responses(session, questions.benchmark, responses)
    for job, (question, completion), found in zip(batch, responses, judged, strict=True):
        place, seed, sample = job
        yield {
            "id": questions.ids[place],
            "seed": seed,
            "sample": sample,
            "digest": questions.digests[place],
            "group": question.group,
            "problem": question.problem or questions.ids[place],
            "expected": question.sample.answer,
            "finished": completion.finished,
            "tokens": len(completion.token_ids),
        } | found


def _found(folder: Path) -> dict[tuple[str, int, int], Record]:
    """Records by question, seed and sample, whatever ranks wrote them."""
    return {
        (record["id"], record["seed"], record["sample"]): record
        for path in sorted(folder.glob("rank_*.jsonl"))
        for record in read_jsonl(path)
    }
