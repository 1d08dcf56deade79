"""The rollout engine and the trainer give the same tokens the same log-probs."""

from collections.abc import Sequence

import torch

from care_train.doctor import Finding, Subject, error, ok, spread, warning
from care_train.models.batch import ModelBatch, TokenSequence, collate
from care_train.models.lora import add_adapters, has_adapters
from care_train.models.policy import Policy
from care_train.models.prompts import EncodedPrompt, PromptEncoder
from care_train.rollout.engine import (
    Completion,
    Request,
    RolloutEngine,
    SamplingSettings,
    banned_token_ids,
    request_seed,
)

_NUM_PROMPTS = 4
_NUM_TOKENS = 16
_ERROR_GAP = 0.5
"""Mean gap in nats beyond which the engine samples from another policy."""
_WARNING_GAP = {"float32": 0.01, "bfloat16": 0.05}


def check_parity(subject: Subject) -> Finding:
    """Log-probs of a few sampled tokens: rollout engine against the trainer's forward.

    An engine that keeps no log-probs samples greedily instead, where the trainer must find no
    token likelier than the engine's.
    """
    encoder = PromptEncoder(subject.model, subject.config.prompt)
    rows = spread(subject.rows, _NUM_PROMPTS)
    prompts = encoder.encode(rows)
    engine = _rollout_engine(subject, encoder)
    rollout = subject.config.rollout
    length = min(_NUM_TOKENS, rollout.max_new_tokens)
    requests = [
        Request(prompt, request_seed(subject.config.seed, 0, row.id, 0))
        for prompt, row in zip(prompts, rows, strict=True)
    ]
    completions = engine.generate(requests, SamplingSettings(length, rollout.temperature))
    if any(completion.log_probs is None for completion in completions):
        completions = engine.generate(requests, SamplingSettings(length, greedy=True))
    gaps, batch = _gaps(subject, prompts, completions)
    mean, worst = float(gaps.mean()), int(gaps.argmax())
    token = subject.model.tokenizer.convert_ids_to_tokens(int(batch.target_ids[worst]))
    row = rows[int(batch.sequence_ids[worst])]
    text = (
        f"over {len(gaps)} tokens, rollouts and trainer differ by {mean:.2g} nats on average, "
        f"{float(gaps[worst]):.2g} at most ({token!r} in {row.location or row.id})"
    )
    if not mean <= _ERROR_GAP:  # A NaN is an error too.
        return error(
            text,
            "the engine does not sample the policy that is trained: check its version, "
            "model.attention and the processor; try rollout.engine=transformers",
        )
    if mean > _WARNING_GAP[subject.config.model.dtype]:
        return warning(text, "try model.dtype=float32 or another model.attention")
    return ok(text)


@torch.no_grad()
def _gaps(
    subject: Subject, prompts: Sequence[EncodedPrompt], completions: Sequence[Completion]
) -> tuple[torch.Tensor, ModelBatch]:
    """[N] nats of each sampled token, and the batch that they are rows of: |engine - trainer|, or
    below the trainer's best token where the engine keeps no log-probs."""
    loaded, temperature = subject.model, subject.config.rollout.temperature
    sequences = [
        TokenSequence(prompt, (), completion.token_ids)
        for prompt, completion in zip(prompts, completions, strict=True)
    ]
    batch = collate(sequences, loaded.pad_token_id, loaded.image_token_id)
    batch = batch.to(loaded.model.device)
    was_training = loaded.model.training
    loaded.model.eval()
    policy = Policy(loaded.model)
    logits = policy.head.logits(policy.hidden_states(batch).flatten(0, 1)[batch.rows])
    loaded.model.train(was_training)
    # The engine's distribution is the one after bans.
    banned = torch.tensor(banned_token_ids(loaded), dtype=torch.int64, device=logits.device)
    logits.index_fill_(1, banned, -torch.inf)
    kept = [completion.log_probs for completion in completions]
    chosen = batch.target_ids[:, None]
    if any(row is None for row in kept):
        return logits.max(1).values - logits.gather(1, chosen)[:, 0], batch
    own = (logits / temperature).log_softmax(1).gather(1, chosen)[:, 0]
    theirs = torch.tensor([x for row in kept if row is not None for x in row])
    return (theirs.to(own) - own).abs(), batch


def _rollout_engine(subject: Subject, encoder: PromptEncoder) -> RolloutEngine:
    # Imported here: DeepSpeed comes with it, and where that is broken this one check is.
    from care_train.distributed import initialize_process_group
    from care_train.models.prompts import TokenText
    from care_train.training.groups import RolloutScorer
    from care_train.training.session import Session
    from care_train.verifier import Verifier

    # vLLM joins the process group that a run has.
    initialize_process_group()
    config = subject.config
    verifier = Verifier(config.prompt, config.reward)
    scorer = RolloutScorer(TokenText(subject.model.tokenizer), verifier, config.prompt)
    lora = config.model.lora
    if config.rollout.vllm.lora == "adapter" and lora and not has_adapters(subject.model.model):
        # As the run will send them; untrained they change nothing.
        add_adapters(subject.model.model, lora, config.seed)
    session = Session(config, subject.model, encoder, scorer)
    return session.rollout_engine(subject.model, config.rollout.batch_size)
