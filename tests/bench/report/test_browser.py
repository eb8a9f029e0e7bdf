"""The page in a real Chromium: no network, no error, tables that sort, a phone's width, text that stays text."""

import os
import shutil

import pytest
from playwright.sync_api import sync_playwright

from tests.bench.report.conftest import SCRIPT

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="there is no Chromium: `apt-get install chromium` on Debian, or run `make test` as root"
)


@pytest.fixture(scope="module")
def browser():
    sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=sandbox)
        yield chromium
        chromium.close()


@pytest.fixture
def visit(browser, report):
    """Opens the page as a device does; after the test nothing may have gone wrong or out."""
    contexts, wrong, page_url = [], [], report.page.as_uri()

    def open_page(width=1280, height=900, scheme="light"):
        context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("dialog", lambda dialog: (wrong.append(dialog.message), dialog.dismiss()))
        page.on(
            "request",
            lambda request: (
                wrong.append(request.url) if request.url != page_url and not request.url.startswith("data:") else None
            ),
        )
        page.goto(page_url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert wrong == []


def column(page, index):
    return page.locator(f"#encoders-quality-grouped tbody tr > :nth-child({index})").all_inner_texts()


def numbers(page, index):
    cells = page.locator(f"#encoders-quality-grouped tbody tr > :nth-child({index})")
    return [
        None if value is None else float(value)
        for value in cells.evaluate_all("all => all.map(c => c.dataset.value ?? null)")
    ]


def test_a_click_sorts_a_table_down_up_and_back(visit):
    page = visit()
    before = column(page, 1)
    header = page.locator("#encoders-quality-grouped thead th:nth-child(2)")
    assert header.get_attribute("aria-sort") == "none"
    for order, reverse in (("descending", True), ("ascending", False)):
        header.get_by_role("button").click()
        assert header.get_attribute("aria-sort") == order
        values = numbers(page, 2)
        known = [value for value in values if value is not None]
        assert known == sorted(known, reverse=reverse)
        assert values == known + [None] * (len(values) - len(known))
        assert sorted(column(page, 1)) == sorted(before)
    header.get_by_role("button").click()
    assert header.get_attribute("aria-sort") == "none"
    assert column(page, 1) == before


def test_the_keyboard_sorts_and_only_one_column_says_so(visit):
    page = visit()
    headers = page.locator("#encoders-quality-grouped thead th")
    headers.nth(0).get_by_role("button").focus()
    page.keyboard.press("Enter")
    assert column(page, 1) == sorted(column(page, 1), key=str.casefold)
    page.keyboard.press("Tab")
    page.keyboard.press("Space")
    told = headers.evaluate_all("all => all.map(h => h.getAttribute('aria-sort'))")
    assert told[:2] == ["none", "descending"]
    assert set(told[2:]) == {"none"}
    assert "sorted by SRCC, descending" in page.locator("#said").inner_text()


CUT = """[...document.querySelectorAll('.scroll')].filter(box => box.scrollWidth > box.clientWidth)
  .map(box => box.closest('section').id)"""
OUTSIDE = """[...document.querySelectorAll('main *')]
  .filter(e => !e.closest('.unseen, svg') && e.getBoundingClientRect().right > innerWidth + 1)
  .map(e => e.outerHTML.slice(0, 80))"""


@pytest.mark.parametrize("width", [320, 390, 768, 1280, 1600])
def test_no_column_is_cut_at_any_width_whatever_is_switched_on(visit, width):
    page = visit(width=width, height=900)
    switches = page.locator("#encoders-quality-grouped input[data-switches]")
    assert switches.count() >= 5
    for is_on in (False, True):
        if is_on:
            page.locator("#encoders-quality-grouped summary").click()
            for number in range(switches.count()):
                switches.nth(number).check()
            page.locator("#encoders-quality-grouped summary").click()
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate(CUT) == []
        assert page.evaluate(OUTSIDE) == []
        shown = page.locator("#encoders-quality-grouped tbody tr:first-child [data-switch=krcc]")
        assert shown.is_visible() == is_on
        cards = page.evaluate("document.querySelectorAll('table.cards').length")
        assert (cards > 0) if width < 500 else (cards == 0 or width < 1280)


def test_a_switch_shows_a_column_in_all_tables_and_hides_it_again(visit):
    page = visit()
    headers = page.locator("th[data-switch=rmse]")
    box = page.locator("#encoders-quality-grouped input[data-switches=rmse]")
    assert headers.count() >= 4
    page.locator("#encoders-quality-grouped summary").click()
    for is_on in (True, False):
        box.set_checked(is_on)
        assert [headers.nth(k).is_visible() for k in range(headers.count())] == [is_on] * headers.count()
        others = page.locator("input[data-switches=rmse]")
        assert others.evaluate_all("all => all.map(box => box.checked)") == [is_on] * others.count()


def test_printed_tables_fit_the_paper(visit):
    page = visit(width=700, height=1000)  # A4 without its margins
    page.emulate_media(media="print")
    assert (
        page.evaluate("Math.max(...[...document.querySelectorAll('table')].map(t => t.getBoundingClientRect().right))")
        <= 701
    )


def test_a_script_in_a_prompt_is_shown_and_not_run(visit):
    page = visit()
    assert page.get_by_text(f"Mind {SCRIPT}").is_visible()
    assert page.evaluate("document.scripts.length") == 1


def test_dark_and_light_are_readable(visit):
    """The contrast of text with what is behind it, by the formula of WCAG 2: at least 4.5."""
    for scheme in ("light", "dark"):
        page = visit(scheme=scheme)
        colours = page.evaluate(
            "['--ink', '--muted', '--accent', '--warn', '--bg', '--card', '--soft'].map(name => {"
            " const e = document.createElement('i'); e.style.color = `var(${name})`; document.body.append(e);"
            " return getComputedStyle(e).color.match(/[0-9.]+/g).slice(0, 3).map(Number) })"
        )
        *texts, page_back, card, soft = [luminance(colour) for colour in colours]
        assert min(contrast(text, back) for text in texts for back in (page_back, card, soft)) >= 4.5
        assert (page_back > 0.5) == (scheme == "light")


def test_pictures_have_their_size_and_thumbnails_load(visit):
    page = visit(width=360, height=740)
    boxes = page.evaluate("[...document.querySelectorAll('.picture svg')].map(e => [e.clientWidth, e.clientHeight])")
    assert len(boxes) > 10
    assert all(width > 250 and height > 100 for width, height in boxes)
    page.locator(".item img").first.scroll_into_view_if_needed()
    assert page.locator(".item img").first.evaluate("image => image.decode().then(() => image.naturalWidth)") > 0


def luminance(colour):
    parts = [value / 255 for value in colour]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in parts]
    return sum(weight * value for weight, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one, other):
    return (max(one, other) + 0.05) / (min(one, other) + 0.05)
