"""The report page in headless Chromium: it renders, filters, navigates, and asks for nothing."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from care_train.reporting.page import LiveServer, write_page
from tests.reporting.archives import (
    group,
    invented_groups,
    write_evaluation,
    write_metrics,
    write_run,
)
from tests.train.runs import python

_DESKTOP, _PHONE = {"width": 1280, "height": 800}, {"width": 390, "height": 844}
_SECTIONS = ("overview", "curves", "diagnostics", "groups", "answers", "settings")


@contextmanager
def _opened(
    browser: Any, url: str, viewport: dict[str, int] = _DESKTOP, **options: Any
) -> Iterator[Any]:
    """The page at `url`, which must ask for nothing else and complain of nothing."""
    context = browser.new_context(viewport=viewport, **options)
    page = context.new_page()
    problems: list[str] = []
    page.on("console", lambda message: problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.goto(url)
    page.wait_for_selector("#main[data-ready]")
    yield page
    assert problems == []
    home = url.partition("#")[0]
    others = [one for one in requests if not one.startswith((home, "data:"))]
    assert others == []
    context.close()


@contextmanager
def _page_of(browser: Any, *runs: Path, fragment: str = "") -> Iterator[Any]:
    """The page of these runs, written beside them."""
    path = runs[0].parent / "report.html"
    write_page(runs, path)
    with _opened(browser, path.as_uri() + fragment) as page:
        yield page


@pytest.fixture(scope="module")
def page_url(quickstart_run: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("pages") / "report.html"
    write_page([quickstart_run], path)
    return path.as_uri()


@pytest.mark.parametrize(
    ("viewport", "scheme"),
    [(_DESKTOP, "light"), (_PHONE, "dark")],
    ids=["desktop-light", "phone-dark"],
)
def test_every_section_is_accessible(chromium, page_url, viewport, scheme):
    """axe-core finds nothing in any section, and nothing is wider than the screen."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    # axe-core is put into the page, which the page's policy forbids.
    options = {"color_scheme": scheme, "bypass_csp": True}
    with _opened(chromium, page_url, viewport, **options) as page:
        for section in _SECTIONS:
            page.evaluate(f"location.hash = '{section}'")
            page.wait_for_selector(f"#main[data-ready={section}]")
            if section in ("groups", "answers") and viewport is _DESKTOP:
                page.locator(".groups a").first.click()
                page.wait_for_selector("#group-title")
            found = axe.run(page).response["violations"]
            assert found == [], json.dumps(found, indent=1)[:4000]
            assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0


def test_a_run_is_shown(chromium, page_url, quickstart_run):
    """Scores, charts with words for those who cannot see them, and every setting."""
    summary = json.loads((quickstart_run / "summary.json").read_text())
    with _opened(chromium, page_url) as page:
        assert f"{summary['accuracy_after']:.1%}" in page.locator(".tiles").inner_text()
        assert page.locator(".chart canvas").count() == page.locator(".chart:visible").count() > 3
        label = page.get_by_role("img", name="Accuracy.").get_attribute("aria-label")
        assert "training:" in label and "at step 1" in label
        page.get_by_role("link", name="Settings").click()
        assert summary["versions"]["torch"] in page.locator("#section-settings .card").inner_text()
        page.get_by_text("Every setting").click()
        assert page.locator("pre").inner_text() == (quickstart_run / "config.yaml").read_text()


def test_a_group_is_shown_as_a_case_study(chromium, page_url):
    """Image, question, reference, rollouts in their roles, shaded tokens; the link leads back."""
    with _opened(chromium, f"{page_url}#groups") as page:
        page.locator("#filter-role").select_option("hard_negative")
        page.locator(".groups a").first.click()
        page.wait_for_selector("#group-title")
        url, text = page.url, page.locator(".group").inner_text()
        assert "what color is the image?" in text and "Reference answer" in text
        assert page.locator(".images img").evaluate("image => image.naturalWidth") > 0
        assert page.get_by_role("heading", name="Anchor", exact=True).is_visible()
        assert page.locator(".rollout .above").count() > 0
        negatives = page.locator(".part", has=page.get_by_role("heading", name="Hard negatives"))
        wrong = negatives.locator(".rollout.wrong").count()
        assert wrong == negatives.locator(".rollout").count() > 0
        page.locator(".rollout .text span").first.hover()
        assert "token 1 of" in page.locator(".readout").first.inner_text()
        page.get_by_text("Tokens", exact=True).first.click()
        page.locator(".rollout tbody tr").nth(3).wait_for()
    with _opened(chromium, url) as page:
        assert page.locator(".group").inner_text().splitlines()[0] == text.splitlines()[0]


def test_keys_move_from_group_to_group(chromium, page_url):
    """j and k go on and back, / searches, and neither does so while somebody types."""
    with _opened(chromium, f"{page_url}#groups") as page:
        page.keyboard.press("j")
        page.wait_for_selector("#group-title")
        first = page.url
        page.keyboard.press("j")
        page.wait_for_url(lambda url: url != first)
        page.keyboard.press("k")
        page.wait_for_url(first)
        page.wait_for_selector("#group-title:focus")
        page.keyboard.press("/")
        page.wait_for_selector("#search:focus")
        page.keyboard.type("jjj")
        assert page.locator("#search").input_value() == "jjj" and page.url == first
        page.get_by_text("0 groups").wait_for()


@pytest.fixture(scope="module")
def large_url(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("large")
    rows = list(invented_groups(400))
    rows[7] = group(7, ["fine", "hidden needle", "no", "no"], outcome="skipped", reason="odd")
    write_page([write_run(folder / "large", rows)], folder / "report.html")
    return (folder / "report.html").as_uri()


def test_filters_and_search_narrow_the_list(chromium, large_url):
    """By outcome, source, step and reward; a search looks at questions, or at responses too."""
    with _opened(chromium, f"{large_url}#groups") as page:
        status = page.locator(".side [role=status]")
        status.get_by_text("1\u201350 of 400 groups").wait_for()
        page.get_by_role("button", name="Next", exact=True).click()
        status.get_by_text("51\u2013100 of 400 groups").wait_for()
        page.locator("#filter-outcome").select_option("odd")
        status.get_by_text("1 group").wait_for()
        page.get_by_role("button", name="Clear").click()
        page.locator("#filter-source").select_option("charts")
        status.get_by_text("of 200 groups").wait_for()
        page.locator("#filter-step-to").fill("1")
        status.get_by_text("8 groups").wait_for()
        page.get_by_role("button", name="Clear").click()
        page.locator("#search").fill("number 39")
        status.get_by_text("11 groups").wait_for()
        page.locator("#search").fill("needle")
        status.get_by_text("0 groups").wait_for()
        page.locator("#in-texts").check()
        status.get_by_text("1 group").wait_for()


def test_evaluated_answers_are_shown(chromium, tmp_path):
    """A question with the answers of each evaluation; filters, search, keys, a link."""
    run = write_run(tmp_path / "run", list(invented_groups(4)))
    for step, words in ((0, "baba"), (20, "aabc")):
        for decoding in ("sampled", "greedy"):
            write_evaluation(run, step, decoding, words)
    with _page_of(chromium, run, fragment="#answers") as page:
        status = page.locator(".side [role=status]")
        status.get_by_text("8 answers").wait_for()
        page.locator("#filter-outcome").select_option("became wrong")
        status.get_by_text("2 answers").wait_for()
        page.locator("#filter-decoding").select_option("greedy")
        status.get_by_text("1 answer", exact=True).wait_for()
        page.locator(".groups a").click()
        page.wait_for_selector("#group-title:focus")
        link, shown = page.url, page.locator(".group").inner_text()
        assert link.endswith("#answer=run/greedy/row-3")
        for text in ("Answers, greedy, row row-3", "what is number 3?", "Reference answer"):
            assert text in shown
        assert page.locator(".images img").evaluate("image => image.naturalWidth") == 40
        assert page.locator("h4").all_inner_texts() == ["Before training", "After 20 steps"]
        outcomes = page.locator(".outcome").all_inner_texts()
        assert outcomes == ["✓ correct: exact match", "✗ wrong: got another answer"]
        page.get_by_role("button", name="Difference to the first answer").click()
        assert page.locator("del, ins").all_inner_texts() == ["a", "c"]
        page.get_by_role("button", name="Clear").click()
        page.locator("#search").fill("another")
        status.get_by_text("4 answers").wait_for()
        page.get_by_role("link", name="Groups").click()
        status.get_by_text("4 groups").wait_for()
        page.keyboard.press("j")
        page.wait_for_url("**#group=run/**")
        page.get_by_role("link", name="Answers").click()
        status.get_by_text("4 answers").wait_for()
    with _opened(chromium, link) as page:
        assert page.locator(".group").inner_text().splitlines()[0] == shown.splitlines()[0]


def test_differences_to_the_anchor_are_marked(chromium, large_url):
    """What a negative says in other words stands beside the anchor's words."""
    with _opened(chromium, f"{large_url}#group=large/1/row-0") as page:
        page.get_by_role("button", name="Difference to the anchor").first.click()
        assert page.locator("del").all_inner_texts() == ["a", "a"]
        assert page.locator("ins").all_inner_texts() == ["b", "b"]


def test_a_baselines_group_has_no_anchor(chromium, tmp_path):
    """All of its rollouts stand side by side, with their advantages."""
    rows = [group(0, ["a", "b", "c", "d"], roles=["trained"] * 4, outcome="trained")]
    run = write_run(tmp_path / "grpo", rows)
    with _page_of(chromium, run, fragment="#group=grpo/1/row-0") as page:
        titles = page.locator(".rollout h4").all_inner_texts()
        assert titles == [f"Rollout {number}: trained" for number in range(1, 5)]
        assert "advantage" in page.locator(".rollout .pairs").last.inner_text()
        assert page.get_by_role("button", name="Difference").count() == 0


def test_hostile_text_is_shown_as_text(chromium, tmp_path):
    """Markup, scripts, controls, half characters and megabytes change nothing but the text."""
    hostile = "</script><script>document.title='gone'</script><img src=x onerror=alert(1)><!--"
    turned = "abc\u202edcba\u2066 \u0007\u2028 end"
    broken = "cut \udcff pair"
    rows = [group(0, [hostile, turned, broken, "x" * 3_000_000], prompt=hostile, answer=hostile)]
    run = write_run(tmp_path / "run<b>'\"&", rows)
    (run / "config.yaml").write_text(f"name: {json.dumps(hostile)}\n")
    with _page_of(chromium, run) as page:
        assert (tmp_path / "report.html").stat().st_size < 1_000_000
        page.get_by_role("link", name="Groups").click()
        page.locator(".groups a").first.click()
        page.get_by_text("Other rollouts").click()
        texts = page.locator(".rollout .text").all_inner_texts()
        assert texts[0] == hostile
        assert texts[1] == "abc⟨U+202E⟩dcba⟨U+2066⟩ ⟨U+0007⟩⟨U+2028⟩ end"
        assert texts[2] == "cut ? pair"
        assert len(texts[3]) == 60_000 and "more characters" in page.locator(".group").inner_text()
        assert page.title() == run.name
        assert page.locator("script").count() == 6 and page.locator("img[onerror]").count() == 0


def test_a_run_that_goes_on_is_watched(chromium, tmp_path):
    """The served page takes in new steps, but not under somebody who reads a group."""
    run = write_run(tmp_path / "run", list(invented_groups(32)))
    with LiveServer([run]) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with _opened(chromium, server.url) as page:
            assert page.locator(".chart").count() > 0
            page.get_by_role("link", name="Groups").click()
            page.get_by_text("32 groups").wait_for()
            write_run(run, list(invented_groups(48)))
            page.get_by_role("button", name="Show new steps").click(timeout=60_000)
            page.get_by_text("48 groups").wait_for()
        server.shutdown()


def test_runs_are_compared(chromium, tmp_path):
    """Seeds of one configuration are one band; the settings that differ are a table."""
    runs = [
        write_metrics(tmp_path / name, f"name: {name}\nseed: {seed}\nalgorithm: {name[:4]}\n", seed)
        for name, seed in (("care-0", 0), ("care-1", 1), ("grpo", 0))
    ]
    with (runs[2] / "metrics.jsonl").open("a") as file:
        file.write('{"phase": "train", "step": 31, "reward": 1}\n')
    with _page_of(chromium, *runs) as page:
        legend = page.locator(".legend").first.inner_text()
        assert legend.split() == ["care,", "2", "seeds", "grpo"]
        figure = page.locator(".chart:visible", has=page.get_by_role("heading", name="Reward"))
        assert figure.locator(".legend").inner_text() == "grpo"
        page.get_by_role("link", name="Settings").click()
        differing = page.locator("#section-settings table").first.inner_text()
        assert "algorithm\tcare\tcare\tgrpo" in differing


@pytest.mark.slow
def test_archive_and_page_are_measured_with_many_groups(chromium, quickstart_run, tmp_path):
    """`python -m bench.archive` writes a run's groups again, times readers and takes pictures."""
    options = ("--groups=20", "--pictures", tmp_path)
    done = python("-m", "bench.archive", quickstart_run, *options)
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["groups"] >= 20 and figures["search_responses_ms"] > 0
    assert 0 < figures["step_share_waited_percent"] < figures["step_share_total_percent"]
    assert figures["bytes_per_group"] > 0 and figures["filter_ms"] > 0
    assert len(list(tmp_path.glob("report-*.webp"))) == 3
