"""The page at `/` in a real browser, against a model that really resizes."""

from __future__ import annotations

import shutil

import pytest

from pliant.ladder.cache_record import CacheRecord, write_record
from pliant.run import load
from pliant.serve.batching import BatchingEngine
from pliant.serve.gate import Limits

from .conftest import serving

playwright = pytest.importorskip("playwright.sync_api")
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(BROWSER is None, reason="there is no Chromium; install chromium")

FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        found = started.chromium.launch(executable_path=BROWSER, args=FLAGS)
        yield found
        found.close()


@pytest.fixture(scope="module")
def engine(artifact, tmp_path_factory):
    copy = tmp_path_factory.mktemp("dashboard") / "tiny"
    shutil.copytree(artifact, copy)
    write_record(copy, CacheRecord(damage={8: 0.0, 4: 0.01}, text="none", tokens=1, window=1))
    model = load(copy, weights=190_000, context=200, batch=1)
    made = BatchingEngine(model, model.artifact.tokenizer(), most=4)
    made.room.governor.calm = 0.1
    return made


@pytest.fixture(scope="module")
def url(engine):
    with serving(engine) as found:
        yield found


@pytest.fixture
def page(browser, url):
    """The page, open; it must say nothing on the console and ask nobody else."""
    said, asked = [], []
    found = browser.new_page()
    found.on("console", lambda message: said.append(message.text))
    found.on("pageerror", lambda error: said.append(str(error)))
    found.on("request", lambda request: asked.append(request.url))
    found.goto(url)
    found.wait_for_selector("#ladder .cells span")
    yield found
    found.close()
    assert [text for text in said if "400" not in text] == []  # a refused budget is told there
    assert all(one.startswith((url, "data:")) for one in asked)


def text_of(page, selector: str, contains: str) -> str:
    page.wait_for_function(
        "([where, what]) => document.querySelector(where).textContent.includes(what)",
        arg=[selector, contains], timeout=20_000,
    )  # fmt: skip
    return page.text_content(selector)


def test_it_shows_where_the_budget_is(page, engine):
    text_of(page, "#legend", "weights")
    assert "free" in page.text_content("#legend")
    assert page.locator("#ladder .cells span").count() == len(engine.ladder())
    assert page.locator("#ladder .row").count() > 2  # kinds of weights
    text_of(page, "#log", "as started")
    assert page.text_content("#model") == "tiny"


def test_the_slider_moves_the_model_by_keyboard(page, engine):
    before = page.text_content("#total")
    rungs = page.eval_on_selector_all("#ladder span", "all => all.map(one => one.title)")
    page.focus("#slider")
    page.keyboard.press("Home")  # the least
    text_of(page, "#budget-words", "moved in")
    assert engine.status().memory == pytest.approx(engine.status().least, abs=2**20)
    page.wait_for_function(
        "was => document.querySelector('#total').textContent != was", arg=before, timeout=20_000
    )
    page.wait_for_function(
        "was => [...document.querySelectorAll('#ladder span')].some((o, i) => o.title != was[i])",
        arg=rungs, timeout=20_000,
    )  # fmt: skip
    text_of(page, "#log", "PUT /v1/budget")


def test_a_budget_typed_in_is_taken_or_refused_in_words(page, engine):
    page.fill("#size", "1KiB")
    page.press("#size", "Enter")
    text_of(page, "#budget-words", "smallest weights")
    page.fill("#size", f"{engine.status().most}")
    page.press("#size", "Enter")
    text_of(page, "#budget-words", "moved in")
    assert engine.status().memory == engine.status().most


def test_it_chats_and_escape_stops(page, engine):
    page.fill("#say", "abc")
    page.press("#say", "Enter")
    page.wait_for_function(
        "() => document.querySelector('#talk .assistant')?.textContent.length > 3"
    )
    assert page.text_content("#talk .user") == "abc"
    page.keyboard.press("Escape")
    page.wait_for_function(
        "async () => { const now = await (await fetch('/v1/budget')).json();"
        " return now.running == 0 && now.waiting == 0 }",
        timeout=20_000,
    )
    assert page.text_content("#trouble") == ""


def test_it_fits_a_narrow_window(page):
    page.set_viewport_size({"width": 360, "height": 700})
    text_of(page, "#legend", "weights")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


def test_it_asks_for_a_key_and_keeps_it(browser, artifact):
    model = load(artifact, weights=120_000, context=200, batch=1)
    made = BatchingEngine(model, model.artifact.tokenizer(), most=2)
    with serving(made, limits=Limits(keys=("secret",))) as url:
        found = browser.new_page()
        found.goto(url)
        found.wait_for_selector("#key-form:not([hidden])")
        assert "API key" in text_of(found, "#trouble", "key")
        found.fill("#key", "secret")
        found.press("#key", "Enter")
        found.wait_for_selector("#ladder .cells span")
        assert not found.is_visible("#key-form")
        found.reload()
        found.wait_for_selector("#ladder .cells span")
        found.close()
