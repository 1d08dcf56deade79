"""What the paper leaves open, where models, prompts and the optimiser meet Algorithm 1.

What each decision changes in lines 1-41 stands in test_care.py, by hand, and in test_end_to_end.py,
against the transcription.
"""

from dataclasses import replace

import pytest
import torch

from care_train.algorithm.care import select_subgroup, subgroup_update
from care_train.algorithm.region_weights import token_credit
from care_train.algorithm.types import GroupUpdate, Subgroup, TrainSequence
from care_train.config import load_config
from care_train.training.metrics import step_metrics
from tests.algorithm.builders import care, make_group, make_subgroup, right, wrong
from tests.algorithm.fakes import PROMPT, THINK_ID, make_sampler, sampled_group, train

NEGATIVE = wrong(text="<think>they are equal</think> <answer>3</answer>")


def reflect(*negatives, **settings):
    """The groups after their reflection, and the engine that was asked."""
    sampler, engine = make_sampler(**settings)
    groups = [
        sampled_group([right(), n], str(i), subgroup=make_subgroup(right(), [n], reflect_on=0))
        for i, n in enumerate(negatives)
    ]
    return sampler.reflect(groups, 0), engine


class TestReflectionPrompt:
    """care.reflection.cue: x, `<think>`, failed rationale, cue; the failed answer dropped."""

    @pytest.mark.parametrize(("think", "answer"), [("think", "answer"), ("reasoning", "final")])
    def test_what_is_sampled_from(self, think, answer):
        """The prompt's own ids, then the forced prefix, with think left open (Sec. 8.2's tags)."""
        tags = {"think_tag": think, "answer_tag": answer}
        assert load_config(None, [f"prompt.{k}={v}" for k, v in tags.items()]).prompt.think_tag
        negative = wrong(text=f"<{think}>they are equal</{think}> <{answer}>3</{answer}>")
        own = {"care": {"reflection": {"cue": "look again:"}}, "prompt": tags}
        (reflecting,), engine = reflect(negative, **own)
        (request,) = engine.requests
        assert request.prompt is PROMPT
        assert "".join(map(chr, request.prefix_ids)) == f"<{think}>they are equal\nlook again:\n"
        assert reflecting.repair is not None
        assert reflecting.repair.prefix_ids == request.prefix_ids

    def test_its_own_sampling_settings(self):
        """The rollouts' own, or those of the released code, whose length limit the rollouts' own
        may lower."""
        rollout = {"temperature": 0.9, "top_p": 0.8, "max_new_tokens": 777}
        own = {"temperature": 0.6, "top_p": 0.95, "max_new_tokens": 512}
        short = {"max_new_tokens": 77}
        for preset, limits, expected in (
            ("default", {}, rollout),
            ("official", {}, own),
            ("official", short, own | short),
        ):
            _, engine = reflect(NEGATIVE, preset=preset, rollout=rollout | limits)
            (sampling,) = engine.sampling
            assert {key: getattr(sampling, key) for key in own} == expected


class TestReflectionContext:
    """care.reflection.context: log-probs under the context sampled from; prefix and cue weigh 0."""

    REFLECTED = right(think=1, answer=1, reflected=True, prefix_ids=(7, 8, 9))

    def trained(self, context: str):
        credit = token_credit(self.REFLECTED, care(), is_negative=False, earns_rationale=True)
        sequence = TrainSequence(self.REFLECTED, 1.0, credit, "reflected_success")
        update = GroupUpdate((sequence,), 1, len(self.REFLECTED.token_ids))
        own = {"care": {"reflection": {"context": context}}, "loss": {"kl_coef": 0.0}}
        return train([update], [right()], **own)[0]

    def test_full(self):
        """x + prefix + cue, so that the ratio is 1 at the first step; only sampled tokens count."""
        engine = self.trained("full")
        response = list(self.REFLECTED.token_ids)
        assert engine.trained_ids() == [[101, 102, 103, 7, 8, 9, *response]]
        rows = engine.rows("advantages")
        assert rows is not None and len(rows) == len(response)
        assert engine.rows("importance_weights") is None

    def test_x_only(self):
        """x and an opened think, with importance weights truncated at 2."""
        engine = self.trained("x_only")
        response = list(self.REFLECTED.token_ids)
        assert engine.trained_ids() == [[101, 102, 103, THINK_ID, *response]]
        weights = engine.rows("importance_weights")
        # The fake log-probs are -6 under the full context and -4 under x: exp(2) is cut to 2.
        assert weights is not None and weights.tolist() == [2.0] * len(response)


@pytest.mark.parametrize(("max_new_tokens", "lengths"), [(30, [15]), (57, [15, 64])])
def test_no_reflection_over_the_limit(max_new_tokens, lengths):
    """Prompt (3) and prefix (15, 64) must fit into max_prompt_tokens + max_new_tokens, whole.

    What is left out is counted: wanted less sampled, as reflection_skipped.
    """
    negatives = [wrong(text="<think>x</think>"), wrong(text=f"<think>{'x' * 50}</think>")]
    (short, long), engine = reflect(
        *negatives,
        prompt={"max_prompt_tokens": 10},
        rollout={"max_new_tokens": max_new_tokens},
        care={"reflection": {"cue": "look:"}},
    )
    assert [len(request.prefix_ids) for request in engine.requests] == lengths
    assert short.repair is not None and (long.repair is not None) == (len(lengths) == 2)
    if long.repair is None:
        verified = replace(short, reflected=right(reflected=True))
        values = step_metrics([verified, long], [], torch.device("cpu"))
        assert (values["reflection_skipped"], values["reflections"]) == (1, 1)


def test_only_s_star_reaches_the_engine():
    """Eq. 7: A = 0 outside S: of six rollouts with K = 2, two are neither forwarded nor trained."""
    rollouts = [right(think=i) if i < 3 else wrong(think=i) for i in range(6)]
    settings = care("max_negatives=2")
    subgroup = select_subgroup(make_group(rollouts), settings)
    assert isinstance(subgroup, Subgroup)
    update = subgroup_update(subgroup, settings)
    engine, scorer = train([update], rollouts, train={"num_iterations": 2})
    assert [len(batch) for batch in scorer.scored] == [3, 3]
    assert len(engine.trained_ids()) == 2 * 3


@pytest.mark.parametrize(
    ("values", "scored"),
    [({}, False), ({"num_iterations": 2}, True), ({"mini_batches": 2}, True)],
)
def test_one_step_per_batch_needs_no_old_log_probs(values, scored):
    """With one optimiser step the old policy is the current one: the ratio is 1."""
    update = subgroup_update(make_subgroup(right(), [wrong()] * 2), care())
    engine, _ = train(
        [update, update], train={"prompts_per_step": 2} | values, loss={"kl_coef": 0.0}
    )
    assert (engine.rows("old_log_probs") is not None) == scored
    assert len(engine.steps) == values.get("num_iterations", 1) * values.get("mini_batches", 1)


def test_kl_estimators():
    """k3 unless another is asked for; all five are offered."""
    assert load_config().loss.kl_estimator == "k3"
    for estimator in ("k1", "k2", "k3", "k3_unbiased", "exact"):
        assert load_config(None, [f"loss.kl_estimator={estimator}"]).loss.kl_estimator == estimator
