"""A model of LMMs-Eval (github.com/EvolvingLMMs-Lab/lmms-eval): its tasks run on our engines.

With both packages installed, `python -m lmms_eval --model care_train --model_args
path=runs/care/final,config=configs/eval.yaml --tasks mmmu_val` finds this class through the entry
point `lmms_eval.models`. Imported by LMMs-Eval alone, which is no dependency of this package.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.model import lmms  # pyright: ignore[reportMissingImports]
from PIL import Image

from care_train.config import load_config
from care_train.data import Sample
from care_train.data.schema import IMAGE_PLACEHOLDER
from care_train.distributed import initialize_process_group, rank, world_size
from care_train.evaluation.evaluate import decoding
from care_train.hub import model_folder
from care_train.rollout.engine import Request, SamplingSettings, request_seed
from care_train.training.session import open_session

_SEED_STEP = -2
"""The step in these requests' seeds: neither training's nor `care-train eval`'s."""


class CareTrainModel(lmms):
    """Answers LMMs-Eval's `generate_until` requests with a checkpoint of ours."""

    is_simple = True

    def __init__(
        self,
        path: str,
        config: str | None = None,
        batch_size: int | str | None = None,
        answer_only: bool | str = True,
        device: str | None = None,
        max_batch_size: int | str | None = None,
        **overrides: Any,
    ) -> None:
        """Load the checkpoint.

        Args:
            path: a Hugging Face folder, such as a run's `final/`.
            config: a YAML file with prompt, tags, engine and lengths; None: the defaults.
            batch_size: sequences generated at once; None or `auto`: rollout.batch_size.
                LMMs-Eval's own default is 1, which it passes.
            answer_only: return the answer span's text where a response has one, for tasks that
                parse answers and no reasoning; False returns whole responses.
            device: taken and ignored: LMMs-Eval passes one, the launcher's rank decides.
            max_batch_size: taken and ignored.
            overrides: more settings, with `__` for the dots that LMMs-Eval's arguments cannot have.

        Raises:
            ValueError: an unknown setting, or no model at `path`.
        """
        super().__init__()
        settings = [f"{key.replace('__', '.')}={value}" for key, value in overrides.items()]
        if batch_size not in (None, "auto"):
            settings.append(f"rollout.batch_size={int(batch_size)}")
        self._config = load_config(config, [*settings, f"model.path={path}"])
        self._answer_only = str(answer_only).lower() in ("true", "1")
        # On several ranks LMMs-Eval counts requests and waits through these two.
        self._device = initialize_process_group()
        self.accelerator = Accelerator(cpu=self._device.type == "cpu")
        self._session = open_session(self._config, model_folder(path), self._device)
        self._engine = self._session.rollout_engine()
        self._rank, self._world_size = rank(), world_size()

    @property
    def device(self) -> torch.device:
        """This rank's."""
        return self._device

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """One response per request, in order; a document asked again gets another sample.

        LMMs-Eval asks again for its `repeats`, and to give each rank as many requests.
        """
        texts: list[str] = []
        asked: Counter[str] = Counter()
        size = self._config.rollout.batch_size
        for start in range(0, len(requests), size):
            texts += self._respond(requests[start : start + size], asked)
        return texts

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Not offered: the protocol is one decode per question."""
        raise NotImplementedError("care_train answers in one round")

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Not offered: answers are generated."""
        raise NotImplementedError("care_train generates answers; it scores no continuations")

    def _respond(self, requests: Sequence[Any], asked: Counter[str]) -> list[str]:
        arguments = [request.args for request in requests]
        samples = [self._sample(*argument) for argument in arguments]
        prompts = []
        for sample, prompt in zip(samples, self._session.encoder.encode(samples), strict=True):
            seed = request_seed(self._config.seed, _SEED_STEP, sample.id, asked[sample.id])
            prompts.append(Request(prompt, seed))
            asked[sample.id] += 1
        # Requests of one task share their generation settings; a batch may hold several tasks.
        by_settings = defaultdict(list)
        for place, (_, generation, *_) in enumerate(arguments):
            by_settings[self._sampling(generation)].append(place)
        texts = [""] * len(requests)
        for sampling, places in by_settings.items():
            completions = self._engine.generate([prompts[i] for i in places], sampling)
            for place, completion in zip(places, completions, strict=True):
                text = self._session.scorer.text(completion)
                texts[place] = self._shown(text, arguments[place][1])
        return texts

    def _sample(
        self, context: str, generation: Any, doc_to_visual: Any, doc_id: Any, task: str, split: str
    ) -> Sample:
        visuals = doc_to_visual(self.task_dict[task][split][doc_id]) or []
        for visual in visuals:
            if not isinstance(visual, (Image.Image, str)):
                raise ValueError(
                    f"{task} {doc_id}: got a {type(visual).__name__}, wanted images: care_train "
                    "reads no video or audio"
                )
        # Some tasks mark images in the text. Marks that do not fit them put the images first.
        if context.count(IMAGE_PLACEHOLDER) != len(visuals):
            context = context.replace(IMAGE_PLACEHOLDER, "")
        name = f"{task}/{split}/{doc_id}"
        return Sample(id=name, prompt=context, answer="", images=tuple(visuals), location=name)

    def _sampling(self, generation: Mapping[str, Any]) -> SamplingSettings:
        """The task's temperature where it has one; the config's length.

        Tasks' own lengths are meant for answers without reasoning.
        """
        own = decoding(self._config)
        temperature = generation.get("temperature")
        is_greedy = generation.get("do_sample") is False or temperature == 0
        return replace(
            own,
            temperature=own.temperature if not temperature else float(temperature),
            top_p=float(generation.get("top_p") or own.top_p),
            greedy=own.greedy or is_greedy,
        )

    def _shown(self, text: str, generation: Mapping[str, Any]) -> str:
        answer = self._session.scorer.verifier.answer(text)
        if self._answer_only and answer is not None:
            return answer.strip()
        until = generation.get("until") or []
        for stop in [until] if isinstance(until, str) else until:
            text = text.split(stop)[0] if stop else text
        return text
