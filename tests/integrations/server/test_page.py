"""The page, in a real browser."""

import re
import shutil

import pytest
from support.serving import running, served

from bayeslora.integrations.server import Limits

sync_api = pytest.importorskip("playwright.sync_api", reason="needs the extra 'browser'")
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="needs Chromium"),
]


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as play:
        found = play.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def page(browser, address):
    found = browser.new_page(bypass_csp=True)  # its policy allows no evaluated code, which the tests need
    wrong = []
    found.on("pageerror", lambda error: wrong.append(str(error)))
    found.on(
        "console", lambda said: wrong.append(said.text) if said.type == "error" and "400" not in said.text else None
    )
    found.on("request", lambda asked: wrong.append(asked.url) if not asked.url.startswith((address, "data:")) else None)
    found.goto(address)
    found.wait_for_function("document.getElementById('model').textContent === 'tiny'")
    yield found
    assert [text for text in wrong if "400 (Bad Request)" not in text] == []
    found.close()


def answered(page, kind, prompt):
    page.select_option("#kind", kind)
    page.fill("#prompt", prompt)
    page.fill("#longest", "9")
    page.keyboard.press("Control+Enter")
    page.wait_for_function(
        "document.querySelectorAll('.token').length === 9 && !document.getElementById('go').disabled"
    )


def test_tokens_are_coloured_and_told(page):
    answered(page, "text", "bag holds 3 red")
    assert "9 tokens" in page.inner_text("#said")
    colours = page.eval_on_selector_all(".token", "all => all.map(t => t.style.backgroundColor)")
    full = page.evaluate("FULL")
    for place, colour in enumerate(colours):
        page.hover(f".token >> nth={place}")
        told = re.search(r"disagreement of the draws\s+([\d.]+)", page.inner_text("#tip"))
        opacity = float(re.fullmatch(r"rgba\(var\(--warm\), ([\d.]+)\)", colour)[1])
        assert opacity > 0
        assert opacity == pytest.approx(0.85 * min(1, float(told[1]) / full), abs=2e-3)  # both are rounded
    page.hover(".token >> nth=0")
    assert page.locator("#tip table:last-child tr").count() == 5


def test_the_keyboard_is_enough(page):
    answered(page, "chat", "bag holds 3 red")
    page.focus("#answer")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.dataset.at") == "1"
    assert page.is_visible("#tip")
    page.keyboard.press("Escape")
    assert not page.is_visible("#tip")
    page.focus("#draws")
    page.keyboard.press("ArrowRight")
    assert page.inner_text("#drawn") == "4"


def test_one_draw_agrees_with_itself(page):
    page.evaluate("document.getElementById('draws').value = 1")
    answered(page, "text", "bag holds 3 red")
    assert "disagreement 0.000 on average" in page.inner_text("#said")


def test_choosing(page):
    page.select_option("#kind", "choose")
    page.fill("#prompt", "bag holds 3 red, 5 blue.")
    page.fill("#options", "red\nblue\n")
    page.click("#go")
    page.wait_for_selector("#choices tr")
    assert page.locator("#choices tr").count() == 2
    assert "%" in page.inner_text("#said")


def test_errors_are_said(page):
    page.select_option("#kind", "choose")
    page.fill("#prompt", "bag")
    page.fill("#options", "red")
    with page.expect_response("**/v1/classify"):
        page.click("#go")
    page.wait_for_selector("#said.wrong")
    assert "two different" in page.inner_text("#said")


def test_a_long_answer_can_be_stopped(page):
    page.select_option("#kind", "text")
    page.fill("#prompt", "bag")
    page.fill("#longest", "120")
    page.click("#go")
    page.wait_for_selector(".token")
    page.click("#stop")
    page.wait_for_function("!document.getElementById('go').disabled")
    assert page.locator(".token").count() <= 120


def test_a_key_is_asked_for(browser, tokenizer):
    with running(served(tokenizer), Limits(api_key="secret")) as (address, _):
        page = browser.new_page(bypass_csp=True)
        page.goto(address)
        page.wait_for_selector("#key", state="visible")
        page.fill("#key", "secret")
        page.fill("#prompt", "bag")
        page.fill("#longest", "3")
        page.click("#go")
        page.wait_for_function("document.querySelectorAll('.token').length === 3")
        page.close()
