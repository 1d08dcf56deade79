"""The report page with many groups: how large it is, how long it takes to make, open and search.

    python -m bench.report_page runs/quickstart
    python -m bench.report_page runs/quickstart --groups 50000 --max-mib 512
    python -m bench.report_page runs/quickstart --pictures docs    # those of docs/report.md

The run's own archive is repeated until it holds as many groups as asked for. The page is then
opened in headless Chromium (Debian's package; `pip install playwright` drives it) and used as a
reader would: the list, a filter, a search through all responses, one group after another.

The last line is one JSON object; the exit code is 1 where something could not be measured.
"""

import argparse
import io
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
from PIL import Image
from rich.console import Console
from rich.table import Table

from care_train.reporting.archive import ARCHIVE, IMAGES, archive_files
from care_train.reporting.page import write_page

_ROUNDS = 5
_SETTLE_MS = 600


def main() -> int:
    """Measure, print a table and the figures."""
    options = _options()
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        print(json.dumps({"error": "no Chromium: apt-get install chromium"}))
        return 1
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "many"
        groups = _repeated(options.run, run, options.groups)
        page = Path(folder) / "report.html"
        start = time.perf_counter()
        write_page([run], page, options.max_mib)
        figures: dict[str, Any] = {
            "groups": groups,
            "archive_mib": _mib(file.path.stat().st_size for file in archive_files(run)),
            "page_mib": _mib([page.stat().st_size]),
            "build_s": round(time.perf_counter() - start, 2),
        }
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
    parser.add_argument("--max-mib", type=int, default=64)
    parser.add_argument("--pictures", type=Path, metavar="FOLDER", help="where to write pictures")
    return parser.parse_args()


def _repeated(run: Path, target: Path, groups: int) -> int:
    """A run's folder with at least so many groups; how many."""
    files = [file for file in archive_files(run) if file.kind == "step"]
    if not files:
        raise SystemExit(f"{run}: no archive of steps")
    (target / ARCHIVE).mkdir(parents=True)
    for name in ("config.yaml", "metrics.jsonl", "summary.json"):
        shutil.copy(run / name, target / name)
    shutil.copytree(run / "final", target / "final", ignore=shutil.ignore_patterns("*.safetensors"))
    (target / ARCHIVE / IMAGES).symlink_to((run / ARCHIVE / IMAGES).resolve())
    total = 0
    for step, file in enumerate(cycle(files), start=1):
        rows = parquet.read_table(file.path)
        place = rows.column_names.index("step")
        steps = pa.array([step] * len(rows), rows.schema.field(place).type)
        rows = rows.set_column(place, "step", steps)
        parquet.write_table(rows, target / ARCHIVE / f"step-{step:06d}-rank-00.parquet")
        total += len(rows)
        if total >= groups:
            return total
    raise AssertionError


def _used(browser: str, url: str) -> dict[str, float]:
    """Milliseconds of what a reader does."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"])
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
            before = page.url
            page.keyboard.press("j")
            page.wait_for_url(lambda now: now != before)
            page.wait_for_selector("#group-title")

        def to_search() -> None:
            page.locator("#in-texts").check()
            page.locator("#search").fill("no response says this")
            status.get_by_text("0 groups", exact=True).wait_for(timeout=120_000)

        found = {"open_ms": _time(open_page), "list_ms": _time(to_list)}
        found["next_group_ms"] = sorted(_time(to_next) for _ in range(_ROUNDS))[_ROUNDS // 2]
        found["search_responses_ms"] = _time(to_search)
        page.get_by_role("button", name="Clear").click()
        page.locator(".groups a").first.wait_for()
        found["filter_and_sort_ms"] = _time(to_filter)
        chromium.close()
    return found


def _take_pictures(browser: str, url: str, folder: Path) -> None:
    """A group whose reflection succeeded, and the curves, on a desktop's screen and a phone's."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"])
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
        chromium.close()


def _time(action: Callable[[], None]) -> float:
    start = time.perf_counter()
    action()
    return round(1000 * (time.perf_counter() - start))


def _mib(sizes: Any) -> float:
    return round(sum(sizes) / 2**20, 1)


if __name__ == "__main__":
    sys.exit(main())
