"""The no-image baseline (`eval.blind`)."""

import io

from PIL import Image

from care_train.data import Sample
from care_train.evaluation.evaluate import without_images


def test_a_blind_sample_has_white_images_of_the_same_sizes():
    """What is seen goes, how much of it stays: the prompt has as many image tokens."""
    file = io.BytesIO()
    Image.new("RGB", (4, 3), "teal").save(file, "PNG")
    images = (file.getvalue(), Image.new("L", (5, 2)))
    sample = Sample(id="a", prompt="which?", answer="1", images=images)
    blind = without_images(sample)
    white = [(12, (255,) * 3)], [(10, (255,) * 3)]
    assert [i.getcolors() for i in blind.images if isinstance(i, Image.Image)] == [*white]
    assert sample.images == images and blind.prompt == sample.prompt
