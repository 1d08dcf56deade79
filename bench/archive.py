"""The archive and the report page with many groups: what writing costs a step, bytes, time to read.

    python -m bench.archive runs/quickstart
    python -m bench.archive runs/quickstart --groups 50000
    python -m bench.archive runs/quickstart --pictures docs    # those of docs/report.md

The run's own groups are written again, step by step, until there are as many as asked for. What
that costs is compared with the run's own steps: `step_share_waited_percent` is the time that its
training thread took to hand the groups over and to wait for the writer, as its metrics have it;
`step_share_total_percent` adds all of the writer's time here, as if training never ran beside it.
The archive is then opened and filtered, and the page of it opened in headless Chromium (Debian's
package; `pip install playwright` drives it) and used as a reader would: the list, a filter, a
search through all responses, one group after another.

The last line is one JSON object; the exit code is 1 where something could not be measured.
"""

import argparse
import io
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
from PIL import Image
from rich.console import Console
from rich.table import Table

from care_train.reporting import image_path, open_archive, read_archive, read_metrics
from care_train.reporting.archive import ARCHIVE, IMAGES, ArchiveFile, ArchiveWriter, archive_files
from care_train.reporting.page import write_page

_WHOLE_MIB = 1 << 20
_ROUNDS = 5
_SETTLE_MS = 600
_PAINTS = "performance.getEntriesByName('first-contentful-paint')"


def main() -> int:
    """Measure, print a table and the figures."""
    options = _options()
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        print(json.dumps({"error": "no Chromium: apt-get install chromium"}))
        return 1
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "many"
        figures: dict[str, Any] = _written(options.run, run, options.groups) | _opened(run)
        page = Path(folder) / "report.html"
        start = time.perf_counter()
        write_page([run], page, _WHOLE_MIB)
        figures["page_build_s"] = round(time.perf_counter() - start, 2)
        figures["page_mib"] = _mib([page.stat().st_size])
        figures |= _used(browser, page.as_uri())
        if options.pictures:
            write_page([options.run], page)
            _take_pictures(browser, page.as_uri(), options.pictures)
    table = Table("", "")
    for name, value in figures.items():
        table.add_row(name, f"{value:,}")
    Console().print(table)
    print(json.dumps(figures))
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="a run's folder with an archive")
    parser.add_argument("--groups", type=int, default=10_000)
    parser.add_argument("--pictures", type=Path, metavar="FOLDER", help="where to write pictures")
    return parser.parse_args()


def _written(run: Path, target: Path, groups: int) -> dict[str, Any]:
    """A run's folder with at least so many groups, and what writing them took."""
    files = archive_files(run, "step")
    if not files:
        raise SystemExit(f"{run}: no archive of steps")
    target.mkdir()
    for name in ("config.yaml", "metrics.jsonl", "summary.json"):
        shutil.copy(run / name, target / name)
    shutil.copytree(run / "final", target / "final", ignore=shutil.ignore_patterns("*.safetensors"))
    seconds, total, steps = 0.0, 0, 0
    with ArchiveWriter(target, 0, 1, None) as archive:
        for file in cycle(files):
            rows = _rows(file)
            steps, total = steps + 1, total + len(rows)
            images = [[image_path(run, name) for name in row["images"]] for row in rows]
            start = time.perf_counter()
            archive.write_step(steps, [row | {"step": steps} for row in rows], images)
            archive.flush()
            seconds += time.perf_counter() - start
            if total >= groups:
                break
    metrics = [record for record in read_metrics(run / "metrics.jsonl") if "groups" in record]
    step = sum(record["seconds"] for record in metrics) / len(metrics)
    waited = sum(record["seconds_archive"] for record in metrics) / len(metrics)
    size = sum(file.path.stat().st_size for file in archive_files(target))
    return {
        "groups": total,
        "groups_per_step": round(total / steps, 1),
        "step_s": round(step, 3),
        "handed_over_ms": round(1000 * waited, 1),
        "written_ms": round(1000 * seconds / steps, 1),
        "step_share_waited_percent": round(100 * waited / step, 2),
        "step_share_total_percent": round(100 * (waited + seconds / steps) / step, 2),
        "bytes_per_group": round(size / total),
        "bytes_per_token": round(size / _num_tokens(target), 1),
        "images_mib": _mib(path.stat().st_size for path in (target / ARCHIVE / IMAGES).iterdir()),
    }


def _rows(file: ArchiveFile) -> list[dict[str, Any]]:
    """A file's groups as the trainer hands them over: lists of numbers are arrays."""
    table = parquet.read_table(file.path)
    kinds = table.schema.field("rollouts").type.value_type
    numbers = {
        kind.name: kind.type.value_type.to_pandas_dtype()
        for kind in (kinds.field(place) for place in range(kinds.num_fields))
        if pa.types.is_list(kind.type) and pa.types.is_primitive(kind.type.value_type)
    }
    rows = table.to_pylist()
    for row in rows:
        for rollout in row["rollouts"]:
            for name, dtype in numbers.items():
                if rollout[name] is not None:
                    rollout[name] = np.asarray(rollout[name], dtype)
    return rows


def _num_tokens(run: Path) -> int:
    """Sampled tokens of all responses."""
    rollouts = read_archive(run, columns=["rollouts.token_ids"])["rollouts"].combine_chunks()
    return len(rollouts.flatten().field("token_ids").flatten())


def _opened(run: Path) -> dict[str, float]:
    """Milliseconds to open the archive and to filter it."""
    columns = ["step", "outcome", "num_correct"]
    whole = _time(lambda: open_archive(run))
    light = open_archive(run, columns=columns)
    return {
        "open_ms": whole,
        "open_columns_ms": _time(lambda: open_archive(run, columns=columns)),
        "filter_ms": _time(lambda: light.filter(lambda group: group["outcome"] == "anchored")),
    }


def _used(browser: str, url: str) -> dict[str, float]:
    """Milliseconds of what a reader does."""
    with _started(browser) as chromium:
        page = chromium.new_page()
        status = page.locator(".side [role=status]")

        def open_page() -> None:
            page.goto("about:blank")
            page.goto(url)
            page.wait_for_selector("#main[data-ready=overview]")

        def to_list() -> None:
            page.evaluate("location.hash = 'groups'")
            page.locator(".groups a").first.wait_for()

        def to_filter() -> None:
            page.locator("#filter-order").select_option("worst")
            page.locator("#filter-step-to").fill("0")
            status.get_by_text("0 groups", exact=True).wait_for()

        def to_next() -> None:
            before = page.evaluate("location.hash")
            page.keyboard.press("j")
            page.wait_for_function("before => location.hash !== before", arg=before)
            page.wait_for_selector("#group-title")

        def to_search() -> None:
            page.locator("#in-texts").check()
            page.locator("#search").fill("no response says this")
            status.get_by_text("0 groups", exact=True).wait_for(timeout=120_000)

        found = {"page_ready_ms": _time(open_page)}
        page.wait_for_function(_PAINTS + ".length")  # Chromium notes it a moment later
        found["first_paint_ms"] = page.evaluate(f"Math.round({_PAINTS}[0].startTime)")
        found["list_ms"] = _time(to_list)
        found["next_group_ms"] = sorted(_time(to_next) for _ in range(_ROUNDS))[_ROUNDS // 2]
        found["search_responses_ms"] = _time(to_search)
        page.get_by_role("button", name="Clear").click()
        page.locator(".groups a").first.wait_for()
        found["filter_and_sort_ms"] = _time(to_filter)
    return found


def _take_pictures(browser: str, url: str, folder: Path) -> None:
    """A group whose reflection succeeded, and the curves, on a desktop's screen and a phone's."""
    with _started(browser) as chromium:
        page = chromium.new_page()
        page.goto(f"{url}#groups")
        page.locator("#filter-role").select_option("reflected_success")
        page.locator("#filter-outcome").select_option("anchored")
        page.wait_for_timeout(_SETTLE_MS)
        group = page.locator(".groups a").first.get_attribute("href")
        for name, hash, width, height, scheme in (
            ("report-group", group, 1280, 1000, "light"),
            ("report-curves", "#overview", 1280, 800, "dark"),
            ("report-phone", group, 390, 800, "light"),
        ):
            view: Any = {"viewport": {"width": width, "height": height}, "color_scheme": scheme}
            shown = chromium.new_page(**view)
            shown.goto(f"{url}{hash}")
            shown.wait_for_selector("#main[data-ready]")
            shown.wait_for_timeout(_SETTLE_MS)
            with Image.open(io.BytesIO(shown.screenshot())) as image:
                image.save(folder / f"{name}.webp", quality=85, method=6)


@contextmanager
def _started(browser: str) -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        yield chromium
        chromium.close()


def _time(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return round(1000 * (time.perf_counter() - start))


def _mib(sizes: Any) -> float:
    return round(sum(sizes) / 2**20, 1)


if __name__ == "__main__":
    sys.exit(main())
