"""What the Parquet file of `care-train data build` looks like: written there, read here."""

BUILT_KEY = b"care_train.data_build"
"""The key in the file's metadata by which it is known: its rows were checked, and have digests."""

DIGEST_COLUMN = "digest"
"""Each row's `sample_digest`."""

OTHER_COLUMNS = "other_columns"
"""The source's columns that the schema has no place for, as one JSON object."""

BUILT_FIELDS = ("id", "prompt", "answer", "rationale", "failed_rationale", "source")
"""The columns that are a sample's own fields, beside `images`."""

BUILT_COLUMNS = ("answer_type", "options", "origin")
"""The columns that are among a sample's `columns`, beside those of OTHER_COLUMNS."""
