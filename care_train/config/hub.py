"""Settings of what is uploaded to the Hugging Face Hub."""

import re

from care_train.config.base import check, section


@section
class HubSettings:
    """What a run uploads to the Hugging Face Hub."""

    push_to: str | None = None
    """`ORG/NAME`: the model repository that `final/` and a model card are uploaded to at the end of
    a run. It is made at the start, so that a missing token is known then, and is private. None:
    none."""

    def __post_init__(self) -> None:
        good = self.push_to is None or re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", self.push_to)
        check(bool(good), "hub.push_to", self.push_to, "ORG/NAME")
