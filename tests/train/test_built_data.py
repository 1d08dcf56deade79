"""A built data set of mixed rows becomes prompts; a resume knows its pixels."""

from pathlib import Path

import pytest
from PIL import Image

from care_train.config import DataSettings
from care_train.data import load_samples
from care_train.training.checkpoint import Checkpoint
from care_train.training.resume import check_identity, identity
from tests.data import published
from tests.data.published import build_from
from tests.train.builders import encoder_of, load, make_config


@pytest.mark.parametrize("kind", ["tiny-qwen2.5-vl", "tiny-qwen3-vl"])
def test_mixed_rows_become_prompts(kind, tiny_folder, tmp_path: Path):
    """One batch of a lazily read file: each row has its own images' tokens and pixels, or none."""
    sources = [
        {"name": "virl", "adapter": "virl39k", "path": str(published.virl39k(tmp_path / "v"))},
        {"name": "geo", "adapter": "geometry3k", "path": str(published.geometry3k(tmp_path / "g"))},
    ]
    _, output = build_from(tmp_path, sources)
    samples = load_samples(DataSettings(path=str(output / "train.parquet")))
    loaded = load(tiny_folder(kind))
    prompts = encoder_of(loaded, max_prompt_tokens=500).encode(samples)
    images = [0 if p.image_grid_thw is None else len(p.image_grid_thw) for p in prompts]
    assert images == [1, 2, 0, 1, 1, 1]
    for prompt in prompts:
        tokens = prompt.token_ids.count(loaded.image_token_id)
        assert (tokens > 0) == (prompt.image_grid_thw is not None)


def test_a_resume_refuses_other_pixels(color_rows: Path, tiny_folder, tmp_path: Path):
    """The same rows over a changed image file are other rows."""
    import shutil

    folder = Path(shutil.copytree(color_rows.parent, tmp_path / "rows"))
    config = make_config({"data": {"path": str(folder / "rows.jsonl")}})
    model = load(tiny_folder()).model
    before = identity(config, load_samples(config.data), model)
    checkpoint = Checkpoint(tmp_path / "step_000001", before)
    check_identity(
        checkpoint, identity(config, load_samples(config.data), model), "data.path", config
    )
    image = Image.open(folder / "3.png").convert("RGB")
    image.putpixel((5, 5), (9, 9, 9))
    image.save(folder / "3.png")
    now = identity(config, load_samples(config.data), model)
    with pytest.raises(ValueError, match=r"data\.path: its rows are not those that"):
        check_identity(checkpoint, now, "data.path", config)
