"""Answer a benchmark's questions: one record per response, written as soon as it is there."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from care_train.algorithm.spans import parse_spans
from care_train.distributed import barrier, gather, is_main, rank, world_size
from care_train.evaluation.evaluate import EVAL_STEP, decoding, equal_batches
from care_train.evaluation.question import Judgement, Question
from care_train.evaluation.question_set import QuestionSet
from care_train.reporting import track
from care_train.reporting.jsonl import JsonlWriter, read_jsonl
from care_train.rollout.types import Completion, Request, RolloutEngine, request_seed
from care_train.config import Config
from care_train.training.failures import Stopped
from care_train.training.guard import StopSignals
from care_train.training.session import Session
from care_train.verifier import format_score, infer_type, normalize, verify_batch
from care_train.verifier.answers import MAX_ANSWER_CHARS
from care_train.verifier.judge import Case, Judge, case_of
from care_train.verifier.pool import shared_pool
from care_train.verifier.types import Item

Job = tuple[int, int, int]
"""A question's place, a seed of `eval.seeds`, and which of `eval.samples` responses."""
Record = Mapping[str, Any]
Response = tuple[Question, Completion]


@dataclass(frozen=True)
class Judged:
    """A response and what is said of it."""

    text: str
    answer: str | None
    """The answer span's text; None without one."""
    format_score: float
    judgement: Judgement


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
    missing = [job for job in jobs if (ids[job[0]], *job[1:]) not in found]
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


def judge_responses(
    session: Session, questions: QuestionSet, judge: Judge | None, responses: Sequence[Response]
) -> list[Judged]:
    """Decode and judge a batch, in order; only the text of the answer span counts (Sec. 8.3).

    Rows of `eval.data` are scored as rollouts are (Eq. 1). A benchmark's answers are judged by its
    rule; the verifier is asked about those of free-form questions that the rule leaves open, and
    then the judge, as the paper asks GPT-5.

    Args:
        session: its tags, its tokenizer and, for rows of `eval.data`, its verifier and rewards.
        questions: the benchmark.
        judge: a language model; None asks nobody.
        responses: each question with what was generated for it.
    """
    if questions.judge is None:
        return _by_verifier(session, responses)
    judged = [_by_rule(session, questions, *response) for response in responses]
    settings = session.config.reward
    verdicts = settle([one.judgement for one in judged], settings.workers, settings.timeout)
    judged = [
        replace(one, judgement=verdict) for one, verdict in zip(judged, verdicts, strict=True)
    ]
    if judge is None or settings.judge is None:
        return judged
    cases: dict[int, Case] = {}
    for place, ((question, _), one) in enumerate(zip(responses, judged, strict=True)):
        key, answer = question.sample.answer, (one.answer or "").strip()
        is_open = not question.right and infer_type(key) in settings.judge.types
        if (is_open or question.is_odd) and answer and not one.judgement.accuracy:
            case = case_of(question.sample.prompt, Item(answer, key))
            cases |= {} if case is None else {place: case}
    for place, verdict in zip(cases, judge.judge(list(cases.values())), strict=True):
        ruled = judged[place].judgement
        ruled = replace(ruled, accuracy=verdict.accuracy, reason=verdict.reason)
        judged[place] = replace(judged[place], judgement=ruled)
    return judged


def settle(judgements: Sequence[Judgement], workers: int, timeout: float) -> list[Judgement]:
    """Ask the verifier (Eq. 1) what the judgements leave open, all at once; in order.

    Args:
        judgements: of a batch.
        workers: processes that compare what needs algebra.
        timeout: seconds that one comparison may take.
    """
    items = [item for judgement in judgements for item in judgement.asked]
    verdicts = iter(verify_batch(items, shared_pool(workers, timeout)))
    settled = []
    for judgement in judgements:
        found = [next(verdicts) for _ in judgement.asked]
        if found:
            best = max(found, key=lambda verdict: verdict.accuracy)
            judgement = replace(judgement, accuracy=best.accuracy, reason=best.reason, asked=())
        settled.append(judgement)
    return settled


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
    judged = judge_responses(session, questions, judge, responses)
    for (place, seed, sample), (question, completion), one in zip(
        batch, responses, judged, strict=True
    ):
        yield {
            "id": questions.ids[place],
            "seed": seed,
            "sample": sample,
            "digest": questions.digests[place],
            "group": question.group,
            "expected": question.sample.answer,
            "answer": one.answer,
            "accuracy": one.judgement.accuracy,
            "exact": one.judgement.is_exact,
            "format": one.format_score,
            "finished": completion.finished,
            "tokens": len(completion.token_ids),
            "reason": one.judgement.reason,
            "vote": one.judgement.vote,
            "response": one.text,
        }


def _by_rule(
    session: Session, questions: QuestionSet, question: Question, completion: Completion
) -> Judged:
    assert questions.judge is not None
    text, prompt = session.scorer.text(completion), session.config.prompt
    answer = answer_of(session, text)
    if answer is None:
        cut = "" if completion.finished else ": cut by the length limit"
        judgement = Judgement(0.0, False, f"no complete answer span{cut}", "")
    elif not answer.strip():
        judgement = Judgement(0.0, False, "empty answer", "")
    elif len(answer) > MAX_ANSWER_CHARS:
        judgement = Judgement(0.0, False, f"longer than {MAX_ANSWER_CHARS:,} characters", "")
    else:
        judgement = questions.judge(answer, question)
    form = format_score(text, prompt.think_tag, prompt.answer_tag) if completion.finished else 0.0
    return Judged(text, answer, form, judgement)


def _by_verifier(session: Session, responses: Sequence[Response]) -> list[Judged]:
    """The row's type, options and tolerance count, and the run's reward functions and judge."""
    scored = session.scorer.score_all([(q.sample, completion, ()) for q, completion in responses])
    judged = []
    for (question, _), rollout in zip(responses, scored, strict=True):
        answer = answer_of(session, rollout.text)
        vote = "" if answer is None else normalize(answer)
        is_exact = rollout.accuracy > 0 and vote == normalize(question.sample.answer)
        judgement = Judgement(rollout.accuracy, is_exact, rollout.verdict, vote)
        judged.append(Judged(rollout.text, answer, rollout.format_score, judgement))
    return judged


def answer_of(session: Session, text: str) -> str | None:
    """The text of the answer span; None where there is no complete one."""
    prompt = session.config.prompt
    span = parse_spans(text, prompt.think_tag, prompt.answer_tag).answer_content
    return None if span is None else text[span[0] : span[1]]


def _found(folder: Path) -> dict[tuple[str, int, int], Record]:
    """Records by question, seed and sample, whatever ranks wrote them."""
    return {
        (record["id"], record["seed"], record["sample"]): record
        for path in sorted(folder.glob("rank_*.jsonl"))
        for record in read_jsonl(path)
    }


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
