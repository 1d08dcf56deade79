"""The report page's data: bands over seeds, what it carries of an archive, what it refuses."""

import base64
import gzip
import hashlib
import http.client
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from care_train.cli import main
from care_train.reporting.charts import average_window, charts, mean_interval, smoothed
from care_train.reporting.page import LiveServer, Page, write_page
from care_train.reporting.page.contents import conditions, differences, read_run, read_runs
from tests.reporting.archives import (
    group,
    invented_groups,
    write_evaluation,
    write_metrics,
    write_run,
)


def _block(page: Page, name: str) -> Any:
    return json.loads(gzip.decompress(page.blocks[name]))


def test_a_page_carries_all_it_needs_and_allows_nothing_else(tmp_path: Path) -> None:
    """The policy names the scripts and the style by their hashes; no address is loaded."""
    write_page([write_metrics(tmp_path / "run")], tmp_path / "new" / "report.html")
    text = (tmp_path / "new" / "report.html").read_text()
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)
    assert policy is not None
    rules = dict(rule.split(" ", 1) for rule in policy[1].replace("&#x27;", "'").split("; "))
    parts = re.findall(r"<(script|style)(?: type=\"module\")?>(.*?)</\1>", text, re.DOTALL)
    assert [kind for kind, _ in parts] == ["style", "script", "script"]
    for kind, content in parts:
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in rules[f"{kind}-src"].split()
    assert rules["default-src"] == rules["connect-src"] == "'none'"
    assert not re.search(r"(src|href|action)=\"(?!#)", text)


def test_seeds_are_a_band(tmp_path: Path) -> None:
    """Each step's mean and 95 % interval over the seeds' moving averages. Settings that decide the
    result part the runs; names, logging and limits do not."""
    configs = [
        "algorithm: care\nname: a\n",
        "algorithm: care\nname: b\nseed: 1\nlogging: {samples_every: 0}\n",
        "algorithm: care\nseed: 2\n",
        "algorithm: grpo\nname: c\n",
    ]
    runs = [
        read_run(write_metrics(tmp_path / f"s{seed}", config, seed=seed))
        for seed, config in enumerate(configs)
    ]
    assert [len(own) for own in conditions(runs).values()] == [3, 1]
    assert conditions(runs[:3]) == {"s, 3 seeds": runs[:3]}
    cut = replace(runs[1], records=runs[1].records[:9])
    assert [*conditions([runs[0], cut])] == ["s, 2 seeds to step 9"]
    # Folders of one name, in two experiments, are two conditions.
    twins = [write_metrics(tmp_path / x / "r", f"algorithm: {x}") for x in ("care", "grpo")]
    assert [*conditions(read_runs(twins))] == ["care/r", "grpo/r"]
    assert differences(runs)["algorithm"] == ["care", "care", "care", "grpo"]
    found = charts([[run.records for run in runs[:3]]])
    (line,) = next(chart for chart in found if chart["title"] == "Accuracy")["series"]
    values = [np.array([record["accuracy"] for record in run.records]) for run in runs[:3]]
    averages = [smoothed(one, average_window(30)) for one in values]
    mean, half = mean_interval([float(one[9]) for one in averages])
    assert line["y"][9] == pytest.approx(mean, rel=1e-4)
    assert line["high"][9] - line["y"][9] == pytest.approx(half, rel=1e-3)
    # Trained, rescued and skipped groups are all groups.
    series = next(chart for chart in charts([[runs[0].records]]) if chart["stacked"])["series"]
    assert [sum(values) for values in zip(*(one["y"] for one in series), strict=True)] == [1.0] * 30


def test_scores_of_other_questions_are_marked(tmp_path: Path) -> None:
    """Accuracies side by side that another prompt or other questions gave say so."""
    for name, config in (("a", "prompt: {suffix: null}"), ("b", "prompt: {suffix: Think.}")):
        run = write_metrics(tmp_path / name, config)
        (run / "summary.json").write_text('{"num_questions": 9, "accuracy": 0.5}')
    for names, is_marked in (("ab", True), ("aa", False)):
        page = Page([tmp_path / name for name in names])
        note = _block(page, "page")["tables"][0]["note"]
        assert note.startswith("Brackets") and ("Not all runs" in note) == is_marked


def test_a_large_archive_is_thinned_evenly(tmp_path: Path, monkeypatch: Any) -> None:
    """Evenly spaced steps with the last one, no more than asked for, and the page says so."""
    run = write_run(tmp_path / "run", list(invented_groups(64)), per_step=4)
    sizes = [path.stat().st_size for path in (run / "archive").glob("*.parquet")]
    monkeypatch.setattr("care_train.reporting.page.page._MIB", -(-sum(sizes) // 4))
    page = Page([run], max_mib=1)
    steps = sorted({line["step"] for line in _block(page, "groups")})
    assert steps == [4, 8, 12, 16]
    assert _block(page, "page")["groups"]["note"] == "run: 4 of 16 steps, evenly spaced."


def test_answers_of_a_lone_evaluation_are_a_page(tmp_path: Path, monkeypatch: Any) -> None:
    """Without metrics too; of many questions evenly spaced ones, and the page says so."""
    monkeypatch.setattr("care_train.reporting.page.groups._MAX_QUESTIONS", 3)
    write_evaluation(tmp_path / "run", 0, "greedy", "abbabb")
    page = Page([tmp_path / "run"])
    lines = _block(page, "answers")
    assert [line["row"] for line in lines] == ["row-0", "row-2", "row-4"]
    assert [line["outcome"] for line in lines] == ["right", "wrong", "wrong"]
    assert _block(page, "page")["answers"]["note"] == "run: 3 of 6 questions, evenly spaced."
    block = _block(page, lines[1]["block"])
    assert block["groups"][lines[1]["at"]]["rollouts"][0]["pieces"] == ["<answer>b</answer>"]
    write_evaluation(tmp_path / "run", 5, "greedy", "aabbab")
    page.refresh()
    outcomes = [line["outcome"] for line in _block(page, "answers")]
    assert outcomes == ["stayed right", "stayed wrong", "became right"]


def test_a_run_that_takes_anothers_place_is_shown(tmp_path: Path) -> None:
    """`overwrite=true` writes files of the same names: a page that watches reads them anew."""
    page = None
    for said in ("first", "second"):
        run = write_run(tmp_path / "run", [group(0, [said] * 4)])
        write_evaluation(run, 0, "greedy", [said])
        page = page or Page([run])
    assert page is not None
    page.refresh()
    for name in ("0-step-000001-rank-00", "0-answers-0"):
        assert "second" in str(_block(page, name)["groups"])


def test_without_a_tokenizer_spans_are_shaded(tmp_path: Path) -> None:
    """Rationale and answer are a piece each, with the mean of their tokens' values."""
    text = "<think>why</think> so <answer>a</answer>"
    page = Page([write_run(tmp_path / "run", [group(0, [text] * 4)])])
    (found,) = _block(page, "0-step-000001-rank-00")["groups"]
    rollout = found["rollouts"][0]
    assert rollout["pieces"] == ["", "<think>why</think>", " so ", "<answer>a</answer>", ""]
    numbers = np.linspace(0, 1, 8)
    means = [numbers[:5].mean(), numbers[5:].mean()]
    assert rollout["weight"][1::2] == pytest.approx(means, abs=1e-5)
    assert rollout["weight"][::2] == [None, None, None] and not rollout["perToken"]


def test_errors_name_what_is_wrong(tmp_path: Path, capsys: Any) -> None:
    """A folder that is no run's or no file's name, a bound or port that is none, and files that a
    copy cut off."""
    assert main(["report", str(tmp_path)]) == 2
    assert (
        f"{tmp_path}: got no metrics.jsonl, wanted the folder of a run" in capsys.readouterr().err
    )
    assert main(["report", str(write_metrics(tmp_path / "run")), "--max-mib", "0"]) == 2
    assert "--max-mib: got 0" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "run"), "--out", str(tmp_path)]) == 2
    assert f"--out: got the folder {tmp_path}, wanted a file" in capsys.readouterr().err
    assert main(["report", "--watch", str(tmp_path / "run"), "--port", "65536"]) == 2
    assert "--port: got 65536, wanted 0 to 65535" in capsys.readouterr().err
    (run := tmp_path / "run").joinpath("summary.json").write_text('{"accuracy')
    with pytest.raises(ValueError, match=r"run/summary.json: not JSON"):
        read_run(run)
    (run / "config.yaml").write_text("care: [")
    with pytest.raises(ValueError, match=r"run/config.yaml: not YAML"):
        read_run(run)
    write_evaluation(tmp_path / "cut", 0, "greedy", "ab")
    (file,) = tmp_path.glob("cut/archive/*.parquet")
    file.write_bytes(file.read_bytes()[:99])
    with pytest.raises(ValueError, match=r"eval-000000-greedy-rank-00.parquet: damaged"):
        Page([tmp_path / "cut"])


@pytest.fixture
def server(tmp_path: Path) -> Iterator[LiveServer]:
    with LiveServer([write_run(tmp_path / "run", list(invented_groups(4)))]) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def _status(server: LiveServer, path: str, host: str | None = None) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    headers = {} if host is None else {"Host": host}
    connection.request("GET", path, headers=headers)
    status = connection.getresponse().status
    connection.close()
    return status


def test_the_served_page_is_its_users_alone(server: LiveServer) -> None:
    """It listens on the loopback, wants the path that was told and its own name as Host."""
    assert server.server_address[0] == "127.0.0.1"
    path = server.url.split(str(server.server_port))[1]
    assert _status(server, path) == _status(server, f"{path}block/groups") == 200
    for wrong in ("/", "/version", "/x/", f"{path}block/none", f"{path}../etc/passwd"):
        assert _status(server, wrong) == 404
    for host in ("evil.example", f"evil.example:{server.server_port}", "127.0.0.1", ""):
        assert _status(server, path, host) == 421
