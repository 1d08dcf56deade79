"""bench.batches measures what the trainer does."""

import pytest

from bench import batches
from care_train.config import ModelSettings
from care_train.models.load import load_model


def test_every_way_has_all_tokens_and_packs_have_no_padding(tiny_folder, monkeypatch):
    """Padding shares are right for known lengths, and every ratio is to `count`."""
    monkeypatch.setattr(batches, "PROMPT", 4)
    monkeypatch.setattr(batches, "LONGEST", 16)
    monkeypatch.setattr(batches, "responses", lambda spread, generator: [16, 6] * 4)
    loaded = load_model(ModelSettings(path=str(tiny_folder("tiny-qwen2"))))
    found = batches.compare(loaded, "any", repeats=1)
    # 4 x (20 + 10) tokens in 8 rows of 20; sorted, the short ones lie in rows of 10.
    assert found["count"].padding == pytest.approx(1 - 120 / 160)
    assert found["budget"].padding == 0 and found["packed"].padding == 0
    assert [found[way].micro_batches for way in batches.WAYS] == [2, 2, 2]
    assert found["count"].time_ratio == 1 and all(f.seconds > 0 for f in found.values())
