"""Updates that are not finite: none is made, the first bad number is named, some are left out."""

import math

import pytest
import torch

from care_train.config import ModelSettings
from care_train.models.load import LoadedModel, load_model
from care_train.training.engine import MicroBatch
from care_train.training.failures import NotFiniteError
from tests.train.builders import make_engine, micro_batch, random_sequences


def _load(tiny_folder, bf16: bool) -> LoadedModel:
    dtype = "bfloat16" if bf16 else "float32"
    return load_model(ModelSettings(path="x", dtype=dtype), tiny_folder("tiny-qwen2"))


@pytest.mark.parametrize("spoil", ["loss", "gradient"])
@pytest.mark.parametrize(("zero_stage", "bf16"), [(0, False), (1, True), (2, True), (3, False)])
def test_what_is_not_finite_updates_nothing(zero_stage, bf16, spoil, tiny_folder, caplog):
    """NaN in the loss or in a gradient alone: left out as often as allowed, then an error that
    names the first bad number; and the next good update is as if there had been none."""
    settings = {"max_skipped_updates": 2, "zero_stage": zero_stage, "bf16": bf16}
    settings |= {"max_grad_norm": 1.0}
    loaded = _load(tiny_folder, bf16)
    engine = make_engine(loaded, **settings)
    before = _whole(engine)
    sequences = random_sequences(loaded, 1)
    good = micro_batch(engine, sequences, [1.0])
    bad = micro_batch(engine, sequences, [math.nan])
    bad = MicroBatch(bad.batch, bad.loss_arguments, ("rows.jsonl: row 7",))
    hook = None
    if spoil == "gradient":
        bad = good
        weight = next(engine.loaded.model.parameters())
        hook = weight.register_hook(lambda gradient: gradient * math.nan)
    for _ in range(2):
        result = engine.step([good, bad], 1.0)
        assert not result.applied
    where = "in the gradient" if spoil == "gradient" else "advantages is nan at response token 0"
    assert "2 of 2 allowed" in caplog.text and where in caplog.text
    with pytest.raises(NotFiniteError, match="no update was made") as error:
        engine.step([good, bad], 1.0)
    assert where in str(error.value)
    assert spoil == "gradient" or "of rows.jsonl: row 7, on rank 0" in str(error.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in _whole(engine).items())
    if hook is not None:
        hook.remove()
    other = make_engine(_load(tiny_folder, bf16), **settings)
    results = [e.step([good, good], 1.0) for e in (engine, other)]
    assert all(result.applied for result in results)
    fresh = _whole(other)
    assert all(torch.equal(tensor, fresh[name]) for name, tensor in _whole(engine).items())


def _whole(engine) -> dict[str, torch.Tensor]:
    with engine.gathered():
        return {n: p.detach().clone() for n, p in engine.loaded.model.named_parameters()}
