"""Cold start (Sec. 4.1): supervised fine-tuning on rationale and answer in Sec. 3.1's format."""

import logging
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from care_train.algorithm.selection import repair_prefix
from care_train.config import Config, DataSettings, PromptSettings
from care_train.data import PromptOrder, Sample, load_samples, require_rationales
from care_train.distributed import all_max, all_sum, is_main, own_share
from care_train.models.batch import TokenSequence
from care_train.models.prompts import EncodedPrompt
from care_train.reporting import MetricsLogger
from care_train.training.checkpoint import Checkpoint, Checkpoints
from care_train.training.engine import MicroBatch, PolicyEngine
from care_train.training.guard import StopSignals
from care_train.training.loop import StepLoop, is_due
from care_train.training.micro_batches import agreed_micro_batches
from care_train.training.optimizer import OptimizerSettings
from care_train.training.session import Session, usable_rows
from care_train.training.timer import timer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ColdStartRows:
    """Rows that were found valid, before the first step."""

    all: Sequence[Sample]
    learnt: Sequence[Sample]
    """Those with a rationale, and with a prompt that is not too long."""
    counts: dict[str, float]
    """`count_rows`."""
    held_out: Sequence[Sample]
    """Those of `sft.eval_data`, which are not learnt."""


def cold_start_rows(session: Session, samples: Sequence[Sample], run_dir: Path) -> ColdStartRows:
    """Check and measure a cold start's rows, on all ranks.

    Raises:
        ValueError: no row has a rationale, or a row can be no prompt or is too long.
    """
    config = session.config
    rows = require_rationales(samples)
    counts = count_rows(samples, rows)
    rows, prompt_lengths = usable_rows(session, rows, "sft.data", run_dir)
    check_lengths(session, rows, prompt_lengths)
    held_out: Sequence[Sample] = ()
    if config.sft.eval_data is not None:
        settings = DataSettings(path=config.sft.eval_data)
        held_out = require_rationales(load_samples(settings, config.seed, "sft.eval_data"))
        usable_rows(session, held_out, "sft.eval_data")
    return ColdStartRows(samples, rows, counts, held_out)


def count_rows(samples: Sequence[Sample], rows: Sequence[Sample]) -> dict[str, float]:
    """How many rows there are, and how many have no rationale, with a warning if any has none."""
    missing = len(samples) - len(rows)
    if missing and is_main():
        logger.warning(
            "%d of %d cold-start rows have no rationale and are not learnt", missing, len(samples)
        )
    return {"rows": float(len(samples)), "rows_without_rationale": float(missing)}


def check_lengths(session: Session, rows: Sequence[Sample], prompt_lengths: Sequence[int]) -> None:
    """Before the first step: no sequence has more tokens than `train.micro_batch_tokens`.

    Raises:
        ValueError: one has; names the longest.
    """
    limit = session.config.train.micro_batch_tokens
    if limit is None:
        return
    lengths = [
        length + _response_length(session, row)
        for row, length in zip(rows, prompt_lengths, strict=True)
    ]
    longest = max(lengths)
    if longest > limit:
        raise ValueError(
            f"train.micro_batch_tokens: got {limit}, wanted at least {longest}, the tokens of "
            f"{rows[lengths.index(longest)].location}: the longest row, and none is ever cut"
        )


def _response_length(session: Session, sample: Sample) -> int:
    """Tokens of the longest text that may follow the prompt, with the one that ends it."""
    config, encode = session.config, session.encoder.encode_text
    texts = [("", response_text(config.prompt, sample))]
    if sample.failed_rationale is not None and config.sft.repair_share > 0:
        texts.append(_repair_texts(config, sample, sample.failed_rationale))
    return 1 + max(len(encode(prefix)) + len(encode(text)) for prefix, text in texts)


def run_sft(
    session: Session,
    cold_start: ColdStartRows,
    folder: Path,
    metrics: MetricsLogger,
    device: torch.device,
    checkpoint: Checkpoint | None,
    started: Callable[[], None],
) -> dict[str, float]:
    """Fine-tune on rows with a rationale; the rest is as `StepLoop.train`.

    Returns:
        The last step's metrics, `eval_loss` among them where `sft.eval_data` is set; `rows`, and of
        them `rows_without_rationale`, which are not learnt.
    """
    loop = SftLoop(session, cold_start, folder.parent, metrics, device)
    values = loop.train(folder, checkpoint, started)
    loop.checkpoints.remove()
    return values | cold_start.counts


def cold_start_checkpoints(config: Config, run_dir: Path) -> Checkpoints:
    """The cold start's own checkpoints, which are removed at its end."""
    return Checkpoints(run_dir / "cold_start_checkpoints", config.train.keep_checkpoints)


class SftLoop(StepLoop):
    """The cold start's steps."""

    phase = "sft"
    title = "cold start"
    data_key = "sft.data.path"

    def __init__(
        self,
        session: Session,
        rows: ColdStartRows,
        run_dir: Path,
        metrics: MetricsLogger,
        device: torch.device,
    ) -> None:
        sft = session.config.sft
        super().__init__(session, rows.all, run_dir, metrics, device)
        self.num_steps = sft.steps
        self.checkpoints = cold_start_checkpoints(session.config, run_dir)
        optimizer = OptimizerSettings(
            sft.learning_rate,
            sft.steps,
            session.config.train.warmup_steps,
            schedule="cosine",
        )
        self.engine = PolicyEngine(session.loaded, optimizer, session.config, device)
        self.totals = {}
        self._rows = rows
        self._order = PromptOrder(len(rows.learnt), session.config.seed)

    def restore(self, state: Mapping[str, Any], own: Mapping[str, Any]) -> None:
        self.totals = state["values"]

    def step(self, step: int) -> dict[str, float]:
        sft, done = self.config.sft, step + 1
        indices = self._order.take(step * sft.batch_size, sft.batch_size)
        batch = [self._rows.learnt[i] for i in own_share(indices)]
        self.totals = self._learn(batch, step)
        is_last = done == self.num_steps
        is_evaluated = is_last or is_due(done, self.config.train.eval_every, self.num_steps)
        if self._rows.held_out and is_evaluated:
            self.totals["eval_loss"] = self._held_out_loss()
        return self.totals

    def after_step(self, done: int, signals: StopSignals) -> None:
        stop = signals.requested(self.device)
        if stop or is_due(done, self.config.train.save_every, self.num_steps):
            self.save(done, {"values": self.totals}, stop)

    def _learn(self, samples: Sequence[Sample], step: int) -> dict[str, float]:
        """One optimiser step on the mean negative log-likelihood of the response tokens.

        With ratio 1 and advantage 1/N, the gradient of Eq. 12 is that of the mean log-likelihood,
        so the policy's own fused step serves.
        """
        start, engine, config = time.perf_counter(), self.engine, self.config
        sequences = self._sequences(samples, [sft_target(config, s, step) for s in samples])
        own_tokens = sum(len(sequence.response_ids) for sequence in sequences)
        tokens = all_sum([float(own_tokens)], engine.device)[0]
        micro_batches = []
        for places in agreed_micro_batches(sequences, config.train, engine.device)[0]:
            batch = engine.collate([sequences[i] for i in places])
            weights = torch.full((len(batch.rows),), 1.0 / tokens, device=engine.device)
            labels = tuple(sequences[i].prompt.location or "a prompt" for i in places)
            micro_batches.append(MicroBatch(batch, {"advantages": weights}, labels))
        learning_rate = engine.learning_rate  # the one used here; the step sets the next one's
        with timer("update"):
            result = engine.step(micro_batches, temperature=1.0)
        own_loss = -sum(float(output.log_probs.sum()) for output in result.outputs)
        return {
            "loss": all_sum([own_loss], engine.device)[0] / tokens,
            "grad_norm": result.grad_norm,
            "learning_rate": learning_rate,
            "tokens_per_second": tokens / (time.perf_counter() - start),
        }

    def _held_out_loss(self) -> float:
        """Mean negative log-likelihood of `sft.eval_data` in nats per response token, over all
        ranks."""
        engine, rows, size = self.engine, self._rows.held_out, self.config.train.micro_batch_size
        own = own_share(range(len(rows)))
        chunks = [own[start : start + size] for start in range(0, len(own), size)]
        total, tokens = 0.0, 0.0
        # Sharded parameters require the same number of forwards on every rank.
        for turn in range(all_max(len(chunks), engine.device)):
            if turn >= len(chunks):
                engine.log_probs(engine.collate([engine.filler]), 1.0)
                continue
            samples = [rows[place] for place in chunks[turn]]
            texts = [("", response_text(self.config.prompt, sample)) for sample in samples]
            log_probs, _ = engine.log_probs(engine.collate(self._sequences(samples, texts)), 1.0)
            total -= float(log_probs.sum())
            tokens += len(log_probs)
        total, tokens = all_sum([total, tokens], engine.device)
        return total / tokens

    def _sequences(
        self, samples: Sequence[Sample], texts: Sequence[tuple[str, str]]
    ) -> list[TokenSequence]:
        prompts = self.session.encoder.encode(samples)
        pairs = zip(prompts, texts, strict=True)
        return [target_sequence(self.session, prompt, *parts) for prompt, parts in pairs]


def sft_target(config: Config, sample: Sample, step: int) -> tuple[str, str]:
    """(read only, learned) text after the prompt: Sec. 3.1's format, a slip, or a repair of it."""
    if sample.failed_rationale is None:
        return "", response_text(config.prompt, sample)
    draw = random.Random(f"{config.seed}/{step}/{sample.id}").random()
    if draw < config.sft.repair_share:
        return _repair_texts(config, sample, sample.failed_rationale)
    failed_answer = sample.columns.get("failed_answer")
    slip_draw = random.Random(f"{config.seed}/slip/{sample.id}").random()
    if failed_answer is None or slip_draw >= config.sft.slip_share:
        return "", response_text(config.prompt, sample)
    slip = replace(sample, rationale=sample.failed_rationale, answer=failed_answer)
    return "", response_text(config.prompt, slip)


def response_text(prompt: PromptSettings, sample: Sample) -> str:
    """A row's rationale and answer in Sec. 3.1's format and the tags of all other stages."""
    think, answer = prompt.think_tag, prompt.answer_tag
    return f"<{think}>{sample.rationale}</{think}> <{answer}>{sample.right_answer}</{answer}>"


def _repair_texts(config: Config, sample: Sample, failed_rationale: str) -> tuple[str, str]:
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
