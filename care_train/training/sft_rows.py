"""The cold start's rows: what is learnt of each, how many have none, and the held-out loss."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from care_train.algorithm.reflection import repair_prefix
from care_train.config import Config, PromptSettings
from care_train.data import Sample, load_samples, require_rationales
from care_train.distributed import all_max, all_sum, is_main, rank, world_size
from care_train.models.batch import TokenSequence
from care_train.models.prompts import EncodedPrompt
from care_train.training.engine import PolicyEngine
from care_train.training.row_check import usable_rows
from care_train.training.session import Session

logger = logging.getLogger(__name__)


def response_text(prompt: PromptSettings, sample: Sample) -> str:
    """A row's rationale and answer in Sec. 3.1's format and the tags of all other stages."""
    think, answer = prompt.think_tag, prompt.answer_tag
    return f"<{think}>{sample.rationale}</{think}> <{answer}>{sample.answer}</{answer}>"


def repair_texts(config: Config, sample: Sample, failed_rationale: str) -> tuple[str, str]:
    """(read only, learned): a failed rationale with the cue, then the right one and the answer."""
    think = config.prompt.think_tag
    prefix = repair_prefix(failed_rationale, config.care.reflection.cue, think)
    return prefix, response_text(config.prompt, sample).removeprefix(f"<{think}>")


def target_sequence(
    session: Session, prompt: EncodedPrompt, prefix: str, response: str
) -> TokenSequence:
    """Prompt, text that is only read, and the response to learn with the token that ends it."""
    encode = session.encoder.encode_text
    ids = encode(response) + session.loaded.eos_token_ids[:1]
    return TokenSequence(prompt, encode(prefix), ids)


def count_rows(samples: Sequence[Sample], rows: Sequence[Sample]) -> dict[str, float]:
    """How many rows there are, and how many of them have no rationale; says so if any."""
    missing = len(samples) - len(rows)
    if missing and is_main():
        logger.warning(
            "%d of %d cold-start rows have no rationale and are not learnt", missing, len(samples)
        )
    return {"rows": float(len(samples)), "rows_without_rationale": float(missing)}


def check_lengths(session: Session, rows: Sequence[Sample], prompt_lengths: Sequence[int]) -> None:
    """Before the first step: no sequence has more tokens than `sft.micro_batch_tokens`.

    Raises:
        ValueError: one has; names the longest.
    """
    limit = session.config.sft.micro_batch_tokens
    if limit is None:
        return
    lengths = [
        length + _response_length(session, row)
        for row, length in zip(rows, prompt_lengths, strict=True)
    ]
    longest = max(lengths)
    if longest > limit:
        raise ValueError(
            f"sft.micro_batch_tokens: got {limit}, wanted at least {longest}, the tokens of "
            f"{rows[lengths.index(longest)].location}: the longest row, and none is ever cut"
        )


def _response_length(session: Session, sample: Sample) -> int:
    """Tokens of the longest text that may follow the prompt, with the one that ends it."""
    config, encode = session.config, session.encoder.encode_text
    texts = [("", response_text(config.prompt, sample))]
    if sample.failed_rationale is not None and config.sft.repair_share > 0:
        texts.append(repair_texts(config, sample, sample.failed_rationale))
    return 1 + max(len(encode(prefix)) + len(encode(text)) for prefix, text in texts)


class HeldOutRows:
    """The rows of `sft.eval_data`, which the cold start does not learn."""

    def __init__(self, session: Session) -> None:
        """Load them.

        Raises:
            ValueError: none has a rationale.
        """
        config = session.config
        assert config.sft.eval_data is not None
        rows = require_rationales(load_samples(config.sft.eval_data, config.seed, "sft.eval_data"))
        self._rows, _ = usable_rows(session, rows, "sft.eval_data")
        self._session = session

    @torch.no_grad()
    def loss(self, engine: PolicyEngine) -> float:
        """Mean negative log-likelihood in nats per response token, over all ranks."""
        size = self._session.config.sft.micro_batch_size
        own = range(rank(), len(self._rows), world_size())
        chunks = [own[start : start + size] for start in range(0, len(own), size)]
        total, tokens = 0.0, 0.0
        # Sharded parameters want as many forwards on every rank.
        for turn in range(all_max(len(chunks), engine.device)):
            chunk = chunks[turn] if turn < len(chunks) else range(1)
            samples = [self._rows[place] for place in chunk]
            log_probs, _ = engine.score(engine.collate(self._sequences(samples)), 1.0)
            if turn < len(chunks):
                total -= float(log_probs.sum())
                tokens += len(log_probs)
        total, tokens = all_sum([total, tokens], engine.device)
        return total / tokens

    def _sequences(self, samples: Sequence[Sample]) -> list[TokenSequence]:
        session = self._session
        prompts = session.encoder.encode(samples)
        return [
            target_sequence(session, prompt, "", response_text(session.config.prompt, sample))
            for sample, prompt in zip(samples, prompts, strict=True)
        ]


@dataclass(frozen=True)
class ColdStartRows:
    """Rows that were found valid, before the first step."""

    all: Sequence[Sample]
    learnt: Sequence[Sample]
    """Those with a rationale, and with a prompt that is not too long."""
    counts: dict[str, float]
    """`count_rows`."""
    held_out: HeldOutRows | None
    """`sft.eval_data`."""


def cold_start_rows(session: Session, samples: Sequence[Sample], run_dir: Path) -> ColdStartRows:
    """Check and measure a cold start's rows, on all ranks.

    Args:
        session: the model to fine-tune, with its encoder.
        samples: rows, of which those with a rationale are learnt.
        run_dir: the run's folder; rows that are left out are listed there.

    Raises:
        ValueError: no row has a rationale, or a row can be no prompt or is too long.
    """
    rows = require_rationales(samples)
    counts = count_rows(samples, rows)
    rows, prompt_lengths = usable_rows(session, rows, "sft.data", run_dir)
    check_lengths(session, rows, prompt_lengths)
    held_out = HeldOutRows(session) if session.config.sft.eval_data is not None else None
    return ColdStartRows(samples, rows, counts, held_out)
