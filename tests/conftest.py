"""Fixtures of the test suite: a seeded generator, a JupyterLab server on a copy of the notebooks, and one browser."""

import os

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if not os.environ.get(
    "DIFFCLASS_BENCH"
):  # the benchmark measures what a reader gets, with all cores
    os.environ.setdefault(
        "OMP_NUM_THREADS", "1"
    )  # float sums depend on the number of threads; set before torch loads

import browser as helpers
import pytest


@pytest.fixture
def generator():
    """A torch generator with seed 0: the only source of randomness that a test uses."""
    import torch

    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A JupyterLab server on a copy of notebooks/ and assets/: nothing is written into the repository."""
    folder = tmp_path_factory.mktemp("lab")
    with helpers.serve_lab(folder) as server:
        yield server


@pytest.fixture(scope="module")
def browser():
    """One Chromium for the module: two playwright instances in one process do not work, and while there is one, an event
    loop runs in this thread, in which other tests' jobs would wait."""
    if not helpers.CHROMIUM:
        message = "expected Chromium for these tests, found none: `apt-get install chromium` or name it in CHROMIUM."
        (pytest.fail if os.environ.get("DIFFCLASS_REQUIRE_BROWSER") else pytest.skip)(message)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=helpers.CHROMIUM, headless=True, args=helpers.ARGUMENTS
        )
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser):
    """A fresh page that remembers requests to other hosts in `page.offsite` and console errors in `page.complaints`."""
    context = browser.new_context(viewport={"width": 1280, "height": 1000})
    page = helpers.watched(context.new_page())
    yield page
    context.close()


@pytest.fixture
def interrupt(monkeypatch):
    """Call it to have Ctrl-C pressed during the second training step from then on; it returns the steps begun."""
    import signal

    from diffclass.training.loop import Training

    def armed() -> list[int]:
        step = Training._one_step
        begun = []

        def pressed(self):
            begun.append(self.step)
            if len(begun) == 2:
                signal.raise_signal(signal.SIGINT)
            return step(self)

        monkeypatch.setattr(Training, "_one_step", pressed)
        return begun

    return armed
