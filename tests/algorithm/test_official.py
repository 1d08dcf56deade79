"""`preset: official`: on recorded groups the released rule's advantages, weights and events."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from care_train.algorithm.care import select_subgroup, skipped_update, subgroup_update
from care_train.algorithm.region_weights import split_advantages
from care_train.algorithm.released import (
    TagPatterns,
    answer_prefix,
    tag_patterns,
    token_tag_spans,
    with_rest,
)
from care_train.algorithm.selection import pairwise_distances
from care_train.algorithm.types import GroupUpdate, Rollout, RolloutGroup
from care_train.config import build_config
from care_train.rollout.engine import Completion
from care_train.training import log_probs
from care_train.training.archiving import append_events
from care_train.training.groups import Group
from care_train.training.rl import open_policy
from care_train.training.sampler import Sampler
from care_train.training.step import TrainStep
from care_train.verifier import Verifier
from care_train.verifier.responses import boxed_answer, boxed_fault
from tests.algorithm.released import Outcome, Response, Tags, released_rule
from tests.train.builders import make_session, text_sample

CARE = build_config({"preset": "official"}).care
# `<` think `>`; the bracket may have merged with a space or newlines before it; 8 is `>` merged
# with a newline behind it, so that a tag ending in it is not found.
BRACKETS = ((1,), (4,), (5,), (6,))
PATTERNS = TagPatterns(
    think=tuple((*bracket, 2, 3) for bracket in BRACKETS),
    think_end=tuple((*bracket, 7, 2, 3) for bracket in BRACKETS),
    answer=tuple((*bracket, 9, 3) for bracket in BRACKETS),
    answer_end=tuple((*bracket, 7, 9, 3) for bracket in BRACKETS),
)
EOS = 0


def tags_of(patterns: TagPatterns) -> Tags:
    return {
        "think": list(patterns.think),
        "/think": list(patterns.think_end),
        "answer": list(patterns.answer),
        "/answer": list(patterns.answer_end),
    }


class Recorder:
    """Draws groups from a seed, as a policy may have sampled them."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def integer(self, high: int) -> int:
        return int(torch.randint(high, (1,), generator=self.generator))

    def words(self, most: int) -> list[int]:
        return [20 + self.integer(50) for _ in range(self.integer(most))]

    def tag(self, *name: int) -> list[int]:
        """A tag, now and then absent or merged with what follows."""
        kind = self.integer(8)
        if kind == 0:
            return []
        return [BRACKETS[self.integer(4)][0], *name, 8 if kind == 1 else 3]

    def tokens(self) -> tuple[int, ...]:
        parts = [self.tag(2), self.words(12), self.tag(7, 2), self.words(3)]
        parts += [self.tag(9), self.words(5), self.tag(7, 9), [EOS] * self.integer(2)]
        return tuple(token for part in parts for token in part) or (EOS,)

    def response(self, uid: str, reward: float) -> Response:
        vector = torch.randn(6, generator=self.generator, dtype=torch.float64)
        embedding = torch.nn.functional.normalize(vector.float(), dim=0).tolist()
        return Response(uid, self.tokens(), reward, -float(self.integer(800)) / 8, tuple(embedding))

    def batch(self, groups: int) -> list[Response]:
        """Groups of 2 to 9, of any mixture of the rewards that lambda = 0.1 gives."""
        responses = []
        for number in range(groups):
            values = [(0.0, 0.0, 0.1, 0.9, 1.0), (0.0,), (0.9, 1.0), (0.0, 0.0, 0.0, 1.0)]
            kind = values[self.integer(4)]
            responses += [
                self.response(f"u{number}", kind[self.integer(len(kind))])
                for _ in range(2 + self.integer(8))
            ]
        return responses


def rollout_of(response: Response, patterns: TagPatterns, **fields) -> Rollout:
    spans = token_tag_spans(response.tokens, patterns)
    return Rollout(response.tokens, "", spans, 0.0, 0.0, response.reward, **fields)


def train_group(
    group: list[Response], repair: Response | None
) -> tuple[GroupUpdate, list[Rollout], Rollout | None]:
    """One group through the code under test; its reflection where it has one."""
    rollouts = [rollout_of(response, PATTERNS) for response in group]
    distances = pairwise_distances(torch.tensor([response.embedding for response in group]))
    sums = torch.tensor([response.log_prob for response in group])
    subgroup = select_subgroup(RolloutGroup(tuple(rollouts), distances, sums), CARE)
    if isinstance(subgroup, str):
        return with_rest(skipped_update(subgroup), rollouts, has_kl=True), rollouts, None
    reflected = None
    if subgroup.reflect_on is not None and repair is not None:
        assert subgroup.reflect_on == 0
        reflected = rollout_of(repair, PATTERNS, reflected=True)
    update = subgroup_update(subgroup, CARE, reflected)
    sampled = [*rollouts, *([reflected] if reflected else [])]
    return with_rest(update, sampled, has_kl=True), rollouts, reflected


def token_rows(update: GroupUpdate) -> dict[int, list[float]]:
    """a_it of each trained sequence, by the id of its rollout."""
    pairs = zip(update.sequences, split_advantages(update.sequences), strict=True)
    return {id(sequence.rollout): row.tolist() for sequence, row in pairs}


@pytest.mark.parametrize("seed", range(12))
def test_token_advantages_equal_the_released_rule_on_drawn_groups(seed):
    """Selection, advantages and token weights of every response and reflection of 25 groups."""
    recorder = Recorder(seed)
    batch = recorder.batch(25)
    uids = list(dict.fromkeys(response.uid for response in batch))
    repairs = {
        uid: recorder.response(uid, (0.0, 0.1, 1.0)[recorder.integer(3)]) for uid in uids[:-5]
    }
    outcome = released_rule(batch, lambda uid, _: repairs.get(uid), tags_of(PATTERNS))
    wanted = {id(r): row for r, row in zip(outcome.responses, outcome.advantages, strict=True)}
    kinds, reflections = set(), 0
    for uid in uids:
        group = [response for response in batch if response.uid == uid]
        update, rollouts, reflected = train_group(group, repairs.get(uid))
        rows = token_rows(update)
        for response, rollout in zip(group, rollouts, strict=True):
            assert rows[id(rollout)] == pytest.approx(wanted[id(response)], rel=1e-5, abs=1e-7)
        if reflected is not None:
            reflections += 1
            repair = repairs[uid]
            assert rows[id(reflected)] == pytest.approx(wanted[id(repair)], rel=1e-5, abs=1e-7)
        assert update.num_sequences == len(rollouts) + (reflected is not None)
        kinds |= {sequence.role for sequence in update.sequences}
    assert reflections == len(outcome.rgr_events)
    assert kinds >= {"anchor", "negative", "proxy_anchor", "reflected_success", "rest"}


class Tagged:
    """The engine with tags put into some of its completions: a tiny model writes none itself."""

    def __init__(self, inner, tokenizer) -> None:
        self._inner = inner
        texts = ("<think>", "a</think>\nso <answer>", " <answer>", "red</answer>")
        self._tags = [tuple(tokenizer(t, add_special_tokens=False)["input_ids"]) for t in texts]
        self.asked: list = []

    def __getattr__(self, name):
        return getattr(self._inner, name)

    def generate(self, requests, sampling):
        self.asked.append((requests, sampling))
        completions = self._inner.generate(requests, sampling)
        return [self._tagged(c, place) for place, c in enumerate(completions)]

    def _tagged(self, completion: Completion, place: int) -> Completion:
        ids, (think, answer, bare, close) = completion.token_ids, self._tags
        kinds = [ids, think + ids, think + ids[:4] + answer + ids[4:], ids[:3] + bare + close + ids]
        return replace(completion, token_ids=kinds[place % 4])


REWARD = '''
def compute_score(reward_inputs):
    """Any text is right or wrong, by its letters."""
    scores = []
    for one in reward_inputs:
        value = sum(map(ord, one["response"])) % 3
        scores.append({"overall": value == 2, "accuracy": float(value == 2)})
    return scores
'''


@pytest.mark.parametrize("kl_coef", [0.01, 0.0])
def test_token_advantages_equal_the_released_rule_on_rollouts_of_a_model(
    tiny_folder, tmp_path: Path, monkeypatch, kl_coef
):
    """Through the whole step, with the model's embeddings, log-probs and reflections."""
    (tmp_path / "reward.py").write_text(REWARD)
    function = f"{tmp_path}/reward.py:compute_score"
    session = make_session(
        tiny_folder("tiny-qwen2"),
        {
            "preset": "official",
            "prompt": {"max_prompt_tokens": 600},
            "rollout": {"group_size": 7},
            "train": {"prompts_per_step": 6, "mini_batches": 1},
            "reward": {"functions": [{"function": function}]},
            "loss": {"kl_coef": kl_coef},
            "model": {"image_pixels": None},
        },
    )
    device = torch.device("cpu")
    engine, inner, reference = open_policy(session, device)
    rollout: Any = Tagged(inner, session.loaded.tokenizer)
    sampler = Sampler(rollout, session.encoder, session.config)
    step = TrainStep(session.config, engine, sampler, session.scorer, reference)
    samples = [text_sample(i, prompt=f"what is {i}?", answer="red") for i in range(6)]
    embeddings: dict[int, torch.Tensor] = {}

    def spied(vectors: torch.Tensor) -> torch.Tensor:
        found = pairwise_distances(vectors)
        embeddings[id(found)] = vectors
        return found

    monkeypatch.setattr(log_probs, "pairwise_distances", spied)
    groups = step.run(lambda: samples, 0).groups
    outcome = by_the_release(groups, embeddings, session)
    check_groups(groups, outcome, kept=kl_coef > 0)
    check_events(groups, outcome, session.config.care, tmp_path)
    check_reflections(groups, rollout, session)


def by_the_release(groups: list[Group], embeddings: dict[int, torch.Tensor], session) -> Outcome:
    patterns = tag_patterns(session.encoder.encode_text, "think", "answer")
    batch, repairs = [], {}
    for group in groups:
        for i, rollout in enumerate(group.rollouts):
            embedding, log_prob = (), 0.0
            if group.distances is not None and group.log_prob_sums is not None:
                embedding = tuple(embeddings[id(group.distances)][i].tolist())
                log_prob = float(group.log_prob_sums[i])
            uid = group.sample.id
            batch.append(Response(uid, rollout.token_ids, rollout.reward, log_prob, embedding))
        if group.reflected is not None:
            r = group.reflected
            repairs[group.sample.id] = Response(group.sample.id, r.token_ids, r.reward)
    return released_rule(batch, lambda uid, _: repairs[uid], tags_of(patterns))


def check_groups(groups: list[Group], outcome: Outcome, kept: bool) -> None:
    responses = [rollout for group in groups for rollout in group.rollouts]
    responses += [group.reflected for group in groups if group.reflected is not None]
    assert [r.token_ids for r in responses] == [r.tokens for r in outcome.responses]
    rows = {}
    for group in groups:
        rows |= token_rows(group.update)
    assert any(any(row) for row in rows.values())
    for rollout, wanted in zip(responses, outcome.advantages, strict=True):
        if kept or any(wanted):
            assert rows[id(rollout)] == pytest.approx(wanted, rel=1e-4, abs=1e-6)
        else:
            assert id(rollout) not in rows
    assert sum(g.update.num_tokens for g in groups) == sum(len(r.token_ids) for r in responses)


def check_events(groups: list[Group], outcome: Outcome, care, folder: Path) -> None:
    append_events(folder, groups, care, 3)
    for name, wanted in (
        ("care_events.jsonl", [{**event, "step": 3} for event in outcome.care_events]),
        ("rgr_events.jsonl", outcome.rgr_events),
    ):
        found = [json.loads(line) for line in (folder / name).read_text().splitlines()]
        assert found == [pytest.approx(event) for event in wanted] and found
        assert [list(event) for event in found] == [list(event) for event in wanted]


def check_reflections(groups: list[Group], rollout: Tagged, session) -> None:
    """Sampled behind the failed text and an opened answer; the new tokens alone count."""
    requests, sampling = rollout.asked[1]
    assert (sampling.temperature, sampling.top_p) == (0.6, 0.95)
    assert sampling.max_new_tokens == session.config.rollout.max_new_tokens
    reflected = [group for group in groups if group.reflected is not None]
    assert len(requests) == len(reflected) > 0
    decode = session.loaded.tokenizer.decode
    for group, request in zip(reflected, requests, strict=True):
        assert group.reflected is not None
        text = decode(request.prefix_ids)
        assert text.endswith("<answer>") and "<repair>\n- Mistake:\n- Fix:" in text
        assert group.reflected.text == decode(group.reflected.token_ids, skip_special_tokens=True)


@pytest.mark.parametrize(
    ("failed", "wanted"),
    [
        ("<think>x</think> <answer>3</answer>", "<think>xCUE</think> <answer>"),
        ("<think>x</think>\\boxed{3} \n", "<think>xCUE</think>\\boxed{3}\n<answer>"),
        ("<think>x", "<think>xCUE\n<answer>"),
        ("just 3", "<think>CUE</think>\njust 3\n<answer>"),
        ("", "<think>CUE</think>\n<answer>"),
        ("<answer>3", "<think>CUE</think>\n<answer>"),
        ("<think>a</think>b</think>c", "<think>aCUE</think>b</think>c\n<answer>"),
    ],
)
def test_what_a_reflection_continues(failed, wanted):
    """The cue before the first closing think tag; the answer is dropped from its tag on."""
    assert answer_prefix(failed, "CUE", "think", "answer") == wanted


@pytest.mark.parametrize(
    ("text", "answer", "is_well_formed"),
    [
        # The last box, braces matched.
        (r"\boxed{1} or \boxed{ \frac{1}{2} }.", r"\frac{1}{2}", False),
        (r"\boxed{1} or \boxed{2", None, False),
        # `<think>.*</think>.*\boxed\{.*\}.*` once space around brackets is gone.
        ("\n< think > a < / think >\nso \\boxed{1} it is", "1", True),
        (r"<think>a</think> 1", None, False),
        (r"<think>a \boxed{1}", "1", False),
        (r"\boxed{1}<think>a</think>", "1", False),
        (r"<think>\boxed{1}</think>", "1", False),
        (r"<think>a</think><answer>1</answer>", None, False),
    ],
)
def test_boxed_answers(text, answer, is_well_formed):
    """`boxed` in `prompt.tags`, EasyR1's math reward: 0.9 acc + 0.1 fmt."""
    assert boxed_answer(text) == answer
    assert (not boxed_fault(text)) == is_well_formed
    config = build_config({"preset": "official"})
    sample = text_sample(answer="1")
    score = Verifier(config.prompt, config.reward).score(text, sample)
    assert score.reward == pytest.approx(0.9 * (answer == "1") + 0.1 * is_well_formed)
