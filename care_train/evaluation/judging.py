"""Which responses are right: the benchmark's rule, or the run's own verifier; then the judge."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from care_train.algorithm.spans import parse_spans
from care_train.evaluation.answers import settle
from care_train.evaluation.question import Judgement, Question
from care_train.evaluation.question_set import QuestionSet
from care_train.rollout.engine import Completion
from care_train.training.session import Session
from care_train.verifier import format_score, infer_type, normalize
from care_train.verifier.judge import Case, Judge, case_of
from care_train.verifier.pool import shared_pool
from care_train.verifier.types import Item, Verdict


@dataclass(frozen=True)
class Judged:
    """A response and what is said of it."""

    text: str
    answer: str | None
    """The answer span's text; None without one."""
    format_score: float
    judgement: Judgement


def judge_responses(
    session: Session,
    questions: QuestionSet,
    judge: Judge | None,
    responses: Sequence[tuple[Question, Completion]],
) -> list[Judged]:
    """Decode and judge a batch, in order.

    Args:
        session: its tags, its tokenizer and, for rows of `eval.data`, its verifier and rewards.
        questions: the benchmark.
        judge: asked about open-ended answers of a benchmark that are right by no rule, as the
            authors ask GPT-5 (Sec. 8.3). Rows of `eval.data` have theirs within the verifier.
        responses: each question with what was generated for it.
    """
    if questions.judge is None:
        return _by_verifier(session, responses)
    judged = [_by_rule(session, questions, *response) for response in responses]
    reward = session.config.reward
    pool = shared_pool(reward.workers, reward.timeout)
    settled = settle([one.judgement for one in judged], pool)
    judged = [
        replace(one, judgement=judgement) for one, judgement in zip(judged, settled, strict=True)
    ]
    return judged if judge is None else _ask(session, judge, responses, judged)


def _by_rule(
    session: Session, questions: QuestionSet, question: Question, completion: Completion
) -> Judged:
    """Only the answer span counts (Sec. 8.3); without one nothing is right."""
    assert questions.judge is not None
    text = session.scorer.text(completion)
    answer = answer_of(session, text)
    if answer is None:
        cut = "" if completion.finished else ": cut by the length limit"
        judgement = Judgement(0.0, False, f"no complete answer span{cut}", "")
    elif not answer.strip():
        judgement = Judgement(0.0, False, "empty answer", "")
    else:
        judgement = questions.judge(answer, question)
    prompt = session.config.prompt
    form = format_score(text, prompt.think_tag, prompt.answer_tag) if completion.finished else 0.0
    return Judged(text, answer, form, judgement)


def _by_verifier(
    session: Session, responses: Sequence[tuple[Question, Completion]]
) -> list[Judged]:
    """As rollouts are scored (Eq. 1): the row's type, options and tolerance, the run's rewards."""
    scored = session.scorer.score_all([(q.sample, completion, ()) for q, completion in responses])
    judged = []
    for (question, _), rollout in zip(responses, scored, strict=True):
        answer = answer_of(session, rollout.text)
        vote = "" if answer is None else normalize(answer)
        is_exact = rollout.accuracy > 0 and vote == normalize(question.sample.answer)
        judgement = Judgement(rollout.accuracy, is_exact, rollout.verdict, vote)
        judged.append(Judged(rollout.text, answer, rollout.format_score, judgement))
    return judged


def _ask(
    session: Session,
    judge: Judge,
    responses: Sequence[tuple[Question, Completion]],
    judged: Sequence[Judged],
) -> list[Judged]:
    settings = session.config.reward.judge
    types = settings.types if settings else []
    cases: dict[int, Case] = {}
    for place, ((question, _), one) in enumerate(zip(responses, judged, strict=True)):
        sample, answer = question.sample, (one.answer or "").strip()
        is_open = not question.is_choice and infer_type(sample.answer) in types
        if is_open and answer and not one.judgement.accuracy:
            case = case_of(sample.prompt, Item(answer, sample.answer))
            cases |= {} if case is None else {place: case}
    verdicts = dict(zip(cases, judge.judge(list(cases.values())), strict=True))
    return [_overruled(one, verdicts.get(place)) for place, one in enumerate(judged)]


def _overruled(one: Judged, verdict: Verdict | None) -> Judged:
    if verdict is None:
        return one
    judgement = replace(one.judgement, accuracy=verdict.accuracy, reason=verdict.reason)
    return replace(one, judgement=judgement)


def answer_of(session: Session, text: str) -> str | None:
    """The text of the answer span; None where there is no complete one."""
    prompt = session.config.prompt
    span = parse_spans(text, prompt.think_tag, prompt.answer_tag).answer_content
    return None if span is None else text[span[0] : span[1]]
