"""The corpus of bench.data: what it plants is what the build finds."""

import json
from pathlib import Path

from bench import data
from bench.data_corpus import Corpus, build_config, make_corpus
from care_train.config import load_build_settings
from care_train.data.building import build


def test_planted_rows_are_found_one_by_one(tmp_path: Path) -> None:
    """Every reason and kind of duplicate has the planted count, and a wrong count would show."""
    corpus = make_corpus(tmp_path / "corpus", 500, workers=1)
    assert corpus.sizes == {"chartqa": 76, "geometry3k": 22, "virl39k": 402}
    config = tmp_path / "build.yaml"
    config.write_text(build_config(corpus, tmp_path / "built"))
    counts = build(load_build_settings(config, ["workers=1"]))["counts"]
    assert data._wrong_counts(corpus, counts) == []
    assert counts["sources"]["virl39k"]["duplicates"] == {
        "conflicting_answer of chartqa": 2,
        "duplicate of chartqa": 4,
        "near_duplicate of geometry3k": 4,
    }
    expected = json.loads(json.dumps(corpus.expected))
    expected["virl39k"]["kept"] += 1
    wrong = data._wrong_counts(Corpus(corpus.folder, corpus.sizes, expected), counts)
    kept = counts["sources"]["virl39k"]["kept"]
    assert wrong == [f"virl39k: kept: got {kept}, wanted {kept + 1}"]
