"""Data sets whose rows are made: each by its name, with its own held-out split."""

import pytest

from care_train.config import DataSettings, load_config
from care_train.data import load_samples


@pytest.mark.parametrize(("name", "usual"), [("digits", 4), ("charts", 3), ("geometry", 3)])
def test_a_made_data_set_is_a_source(name: str, usual: int):
    """It is a name like `easy_vqa`, with a usual level, its own held-out split and no other."""
    samples = load_samples(DataSettings(path=f"{name}@test", max_samples=5))
    assert len(samples) == 5
    assert all(sample.id.startswith(f"{name}-{usual}/test/") for sample in samples)
    held_out = load_config(None, [f"data.path={name}-2"]).held_out
    assert held_out == DataSettings(path=f"{name}-2@test")
    for level in (2, 6):
        with pytest.raises(ValueError, match=f"{name}: got split 'dev'"):
            load_samples(DataSettings(path=f"{name}-{level}@dev"))
    with pytest.raises(ValueError, match=f"^data.path: got {name}-7, wanted {name}-2 to {name}-6$"):
        load_samples(DataSettings(path=f"{name}-7"))
