"""A run whose page is looked at, and the browser that looks at it."""

import os
import shutil
from pathlib import Path

import pytest

from tests.train.runs import ROOT, run

_CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
_SETTINGS = (
    f"--config={ROOT / 'configs' / 'easy_vqa.yaml'}",
    "prompt.system=null",
    "rollout.group_size=6",
    "rollout.max_new_tokens=24",
    "train.steps=4",
    "train.prompts_per_step=4",
    "train.micro_batch_size=8",
    "train.learning_rate=2e-4",
    "train.warmup_steps=0",
    "sft.steps=90",
    "sft.batch_size=8",
    "sft.learning_rate=5e-3",
    "sft.slip_share=0",
    "logging.report_to=[]",
)


@pytest.fixture(scope="session")
def quickstart_run(tiny_folder, color_rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a short `care-train quickstart` on drawn images."""
    output = tmp_path_factory.mktemp("page")
    data = [f"{key}={color_rows}" for key in ("data.path", "sft.data.path", "eval.data")]
    more = [f"model.path={tiny_folder()}", f"output_dir={output}", "name=colors"]
    run("quickstart", *_SETTINGS, *data, *more)
    return output / "colors"


@pytest.fixture(scope="module")
def chromium():
    """Headless Chromium, as the distribution has it.

    Of a module: its event loop runs in this thread, where tests of other files start their own.
    """
    if _CHROMIUM is None:
        pytest.skip("no Chromium: apt-get install chromium")
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        # Its sandbox needs what root in a container may not have.
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=_CHROMIUM, args=arguments)
        yield browser
        browser.close()
