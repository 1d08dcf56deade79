"""What a run is made of: model, encoder, verifier, what a program hands over, rows that fit."""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerControl, TrainerState

from care_train.algorithm.released import tag_patterns
from care_train.algorithm.spans import overlong_penalty
from care_train.config import Config
from care_train.data import Rows, Sample, join_errors, samples_at
from care_train.distributed import all_max, gather, is_main, own_share
from care_train.models.load import LoadedModel, load_model
from care_train.models.prompts import PromptEncoder, TokenText
from care_train.reporting import track
from care_train.reporting.files import write_file
from care_train.rollout.engine import RolloutEngine
from care_train.rollout.remote_engine import VllmServerEngine
from care_train.rollout.transformers_engine import TransformersEngine
from care_train.rollout.vllm_engine import VllmEngine
from care_train.rollout.vllm_process import VllmSetup
from care_train.training.groups import RolloutScorer
from care_train.training.weights import policy_weights
from care_train.verifier import Verifier
from care_train.verifier.responses import check_comparable
from care_train.verifier.score import check_key

logger = logging.getLogger(__name__)


class Callbacks:
    """transformers' `TrainerCallback` objects, told on every rank what a run does."""

    def __init__(self, callbacks: Sequence[Any] = ()) -> None:
        self._callbacks = [one() if isinstance(one, type) else one for one in callbacks]
        self._arguments: dict[str, Any] = {}
        self.state, self.control = TrainerState(), TrainerControl()

    def begin(self, config: Config, num_steps: int, first_step: int, model: Any) -> None:
        """Training begins, after `first_step` of `num_steps` steps: `on_train_begin`.

        Callbacks get the settings as `args`, and the model that is trained.
        """
        self._arguments = {"args": config, "model": model}
        self.state = TrainerState(
            global_step=first_step,
            max_steps=num_steps,
            is_local_process_zero=is_main(),
            is_world_process_zero=is_main(),
        )
        self.control = TrainerControl()
        self._tell("on_train_begin")

    def observe(self, phase: str, step: int, values: Mapping[str, float]) -> None:
        """A step or an evaluation has been logged: `on_step_end` and `on_log`, or `on_evaluate`."""
        self.state.global_step = step
        self.state.log_history.append({**values, "step": step})
        if phase == "eval":
            self._tell("on_evaluate", metrics=dict(values))
        else:
            self._tell("on_step_end")
            self._tell("on_log", logs=dict(values))

    def want_stop(self, device: torch.device) -> bool:
        """Whether any rank's `control.should_training_stop` is set; a collective of all ranks."""
        asked = bool(self._callbacks) and self.control.should_training_stop
        return bool(self._callbacks) and bool(all_max(int(asked), device))

    def show(self, model: Any) -> None:
        """From now on callbacks get this model."""
        self._arguments["model"] = model

    def saved(self) -> None:
        """A checkpoint has been written: `on_save`."""
        self._tell("on_save")

    def end(self) -> None:
        """The run is over: `on_train_end`."""
        self._tell("on_train_end")
        self.release()

    def release(self) -> None:
        """Hold the model no longer."""
        self._arguments = {}

    def _tell(self, event: str, **values: Any) -> None:
        if not self._arguments:  # A cold start comes before `begin`.
            return
        for one in self._callbacks:
            known = {**self._arguments, "state": self.state, "control": self.control, **values}
            control = getattr(one, event)(**known)
            self.control = self.control if control is None else control


@dataclass(frozen=True)
class Given:
    """What a Python program hands to a run in place of files; the command line, nothing."""

    rows: Mapping[str, Rows] = field(default_factory=dict)
    """By the path that stands for them in the settings."""
    rewards: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    """By the function that stands for them in `reward.functions`."""
    callbacks: Callbacks = field(default_factory=Callbacks)
    in_program: bool = False
    """The run is a part of a program, a notebook's say, which must survive its errors."""


@dataclass(frozen=True)
class Session:
    """A loaded model with what feeds and judges it."""

    config: Config
    loaded: LoadedModel
    encoder: PromptEncoder
    scorer: RolloutScorer
    given: Given = field(default_factory=Given)

    def rollout_engine(self) -> RolloutEngine:
        """The configured engine, ready to generate with the model as it is."""
        engine = self.new_engine()
        with torch.no_grad():
            weights = policy_weights(self.loaded.model, engine.wanted)
            engine.sync((weight.name, weight.make()) for weight in weights)
        return engine

    def new_engine(self, copy: LoadedModel | None = None) -> RolloutEngine:
        """The configured engine; it can generate after its first `sync`.

        `copy` is a whole copy of a model that ZeRO-3 shards, which transformers cannot generate
        with.
        """
        rollout = self.config.rollout
        if rollout.engine == "transformers":
            model = copy or self.loaded
            return TransformersEngine(model, rollout.batch_size, is_copy=copy is not None)
        setup = VllmSetup.of(self.config, self.loaded)
        if rollout.vllm.server is not None:
            return VllmServerEngine(self.loaded, rollout.vllm, setup.lora_rank)
        return VllmEngine(self.loaded, setup)


def open_session(
    config: Config, folder: Path, device: torch.device, given: Given | None = None
) -> Session:
    """Load the model of `folder` with its prompt encoder and verifier."""
    given = given or Given()
    loaded = load_model(config.model, folder)
    loaded.model.to(device)
    prompt, encoder, patterns = config.prompt, PromptEncoder(loaded, config.prompt), None
    if config.care.decisions.spans == "tokens":
        patterns = tag_patterns(encoder.encode_text, prompt.think_tag, prompt.answer_tag)
    limit, buffer, length_bonus = config.rollout.max_new_tokens, config.reward.overlong_buffer, None
    if buffer is not None:
        length_bonus = partial(overlong_penalty, limit=limit, buffer=buffer)
    verifier = Verifier(prompt, config.reward, given.rewards)
    text = TokenText(loaded.tokenizer)
    scorer = RolloutScorer(text, verifier, prompt, patterns, length_bonus)
    return Session(config, loaded, encoder, scorer, given)


def usable_rows(
    session: Session, samples: Sequence[Sample], key: str, run_dir: Path | None = None
) -> tuple[Sequence[Sample], list[int]]:
    """The rows whose prompts are within `prompt.max_prompt_tokens`, and how long each prompt is.

    A collective call: each rank reads its share of the rows. No pixel is decoded.

    Args:
        session: the model's encoder, and the settings.
        samples: all rows.
        key: the setting they come from, for messages.
        run_dir: where the rows that `prompt.overlong=drop` leaves out are listed; None: a prompt
            that is too long is an error whatever that says.

    Raises:
        ValueError: rows that can be no prompt, or too long a one.
    """
    if not samples:
        return samples, []
    prompt = session.config.prompt
    lengths = _prompt_lengths(session, samples, key)
    long = [place for place, length in enumerate(lengths) if length > prompt.max_prompt_tokens]
    if not long:
        return samples, lengths
    if run_dir is None or prompt.overlong == "error" or len(long) == len(samples):
        errors = [
            f"{samples[place].location}: the prompt has {lengths[place]} tokens, wanted at most "
            f"{prompt.max_prompt_tokens}"
            for place in long
        ]
        raise ValueError(
            f"{join_errors(key, errors)}\nraise prompt.max_prompt_tokens (the longest has "
            f"{max(lengths)}), lower model.image_pixels, drop the rows, or leave them out of "
            "training with prompt.overlong=drop (prompts and images are never truncated)"
        )
    if is_main():
        path = run_dir / f"{key}.dropped.jsonl"
        dropped = [(samples[place], lengths[place]) for place in long]
        rows = [{"row": s.location, "id": s.id, "tokens": tokens} for s, tokens in dropped]
        write_file(path, "".join(json.dumps(row) + "\n" for row in rows))
        logger.warning(
            "warning: %s: %d of %d rows are left out, over prompt.max_prompt_tokens: the run's "
            "folder lists them in %s",
            *(key, len(long), len(samples), path.name),
        )
    kept = sorted(set(range(len(samples))) - set(long))
    return samples_at(samples, kept), [lengths[place] for place in kept]


def _prompt_lengths(session: Session, samples: Sequence[Sample], key: str) -> list[int]:
    own = own_share(range(len(samples)))
    lengths, errors, hidden = {}, {}, set()
    for place in track(iter(own), f"measuring the prompts of {key}", is_main()):
        try:
            sample = samples[place]
            lengths[place] = session.encoder.num_tokens(sample)
            if sample.hides_options:
                hidden.add(place)
            if key.startswith("sft"):
                check_comparable(sample)
            else:
                check_key(sample, session.config.reward)
        except ValueError as error:
            errors[place] = str(error)
    for other_lengths, other_errors, other_hidden in gather((lengths, errors, hidden)):
        lengths |= other_lengths
        errors |= other_errors
        hidden |= other_hidden
    if errors:
        raise ValueError(join_errors(key, [errors[place] for place in sorted(errors)]))
    if hidden and is_main():
        logger.warning(
            "warning: %s: of %d of %d rows (the first: %s) the key names an option and the prompt "
            "none: write the options into it, unless the image shows them",
            *(key, len(hidden), len(samples), samples[min(hidden)].location),
        )
    return [lengths[place] for place in range(len(samples))]
