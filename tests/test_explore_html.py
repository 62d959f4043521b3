"""The page in a real browser: what it shows, how it is used, and that nothing in it can act.

Needs chromium and chromedriver on the PATH (Debian: chromium chromium-driver) and selenium; the
browser tests are skipped with that reason where they are missing. With SCREENSHOTS=DIR the pages
are kept as pictures to look at.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_output import SETTINGS, random_rows, write_output

import explore_logits as explore
from explore_logits import (
    ConversationAnalysis,
    compute_dataset_stats,
    get_sample,
    render_page,
    visualize_conversation_probabilities,
)

HOSTILE = [
    "</script><script>window.hacked=1</script>",
    "<img src=x onerror='window.hacked=2'>",
    '"><svg onload=window.hacked=3>',
    "<!--<script>",
    "-->",
    "' onmouseover='window.hacked=4",
    "&lt;b&gt; &amp; &#60;",
    "\u202eltr\u202c",  # right-to-left override
    "\u2067שלום\u2069",
    "مرحبا",
    "\ud800",  # half of a surrogate pair
    "a\udfffb",
    "\u2028\u2029",
    "\x00\x1b[31m\x07",
    "⟨F0 9F⟩",
    "\r\n\t",
    "  two  spaces  ",
    "\u200b",
    "{{7*7}} ${7*7} %s",
    "日本語 🎉 👩‍👩‍👧",
    "javascript:window.hacked=5",
    "",
]
STORED = SETTINGS | {"store_tokens": True}
ARROWS = {"left": "\ue012", "up": "\ue013", "right": "\ue014", "down": "\ue015"}
HOME, END, ESCAPE = "\ue011", "\ue010", "\ue00c"


class Vocabulary:
    """A tokenizer whose first tokens are hostile; the others are words."""

    def __len__(self) -> int:
        return STORED["vocab_size"]

    def decode(self, ids: list[int]) -> str:
        return HOSTILE[ids[0]] if ids[0] < len(HOSTILE) else f" w{ids[0]}"

    def convert_ids_to_tokens(self, token: int) -> str:
        return f"<{token}>"


def analysis_of(row: dict[str, Any], **changes: Any) -> ConversationAnalysis:
    row = {**row, **changes}
    return explore.analyze_token_probabilities(get_sample([row]), None, Vocabulary())


@pytest.fixture(scope="module")
def hostile() -> ConversationAnalysis:
    """A conversation whose text is made of hostile tokens, in prompt and answer."""
    rows = random_rows(40, settings=STORED, tokens=60, seed=2)
    row = max(rows, key=lambda row: row["num_tokens"])
    n, bad = row["num_tokens"], np.arange(len(HOSTILE))
    ids = np.concatenate([bad, np.resize(bad, n)])
    positions = np.arange(bad.size, bad.size + n)
    return analysis_of(row, input_ids=ids.tolist(), token_positions=positions.tolist())


@pytest.fixture(scope="module")
def plain() -> list[ConversationAnalysis]:
    """Three ordinary conversations of some lines each."""
    rows = random_rows(20, settings=STORED, tokens=300, seed=9)
    longest = sorted(rows, key=lambda row: -row["num_tokens"])[:3]
    analyses = []
    for row in longest:
        ids = [max(token, len(HOSTILE)) for token in row["input_ids"]]
        analyses.append(analysis_of(row, input_ids=ids))
    return analyses


# Without a browser --------------------------------------------------------------------------------


def test_a_page_is_one_file_that_names_no_other(plain: list[ConversationAnalysis]) -> None:
    page = render_page(plain)
    assert not re.search(r"""(src|href)\s*=\s*["'](?!#)""", page)
    assert not re.search(r"https?://|@import|url\(|//cdn", page)
    assert page.startswith("<!doctype html>")
    assert "default-src &#39;none&#39;" in page


def test_data_in_a_script_cannot_end_it_or_break_it() -> None:
    nasty = ["</script>", "<!--", "]]>", "&amp;", "\u2028\u2029", "\ud800", '"\\', "\0"]
    text = explore.escape_json(nasty)
    assert not re.search("[<>&\u2028\u2029\ud800-\udfff]", text)
    assert json.loads(text) == nasty
    text.encode("utf-8")


def test_the_hostile_page_can_be_written_as_utf8(
    hostile: ConversationAnalysis, tmp_path: Path
) -> None:
    page = visualize_conversation_probabilities(hostile, return_html=True)
    explore.write_page(tmp_path / "page.html", page)
    written = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert written == page
    assert list(tmp_path.iterdir()) == [tmp_path / "page.html"]
    assert written.count("<script") == written.count("</script>") == 2


def test_every_string_from_data_is_escaped_wherever_it_stands() -> None:
    bad = "<b>&\u202e\x1b"
    analysis = ConversationAnalysis(7, [], [(bad, None)], model=bad, note=bad)
    page = render_page([analysis], title=bad, about=bad)
    assert "<b>" not in page
    assert not re.search("[\u202e\x1b]", page)
    assert page.count("&lt;b&gt;&amp;") == 6


def test_invisible_characters_become_visible() -> None:
    assert explore.show_text("a\x1b[0m\x7f\u202e\ud800") == "a␛[0m␡⟨U+202E⟩⟨U+D800⟩"
    assert explore.show_text("a\tb\nc") == "a\tb\nc"
    assert explore.show_token(" a\n\t") == "·a↵⇥"
    assert explore.show_text("👩‍👩‍👧") == "👩‍👩‍👧"


def test_a_notebook_shows_the_page_in_a_frame_of_its_own(hostile: ConversationAnalysis) -> None:
    shown = hostile._repr_html_()
    assert shown.startswith('<iframe srcdoc="&lt;!doctype html&gt;')
    assert 'sandbox="allow-scripts"' in shown
    assert shown.count('"') == 6  # the page's own quotes cannot end the attribute


def test_figures_that_json_has_no_word_for_are_written_as_numbers() -> None:
    assert explore.round_to(float("-inf")) < -1e300
    assert explore.round_to(float("nan")) == 0
    assert explore.round_to(0.123456) == 0.1235


def test_a_page_without_conversations_still_shows_the_figures(tmp_path: Path) -> None:
    stats = compute_dataset_stats(write_output(tmp_path, random_rows(4)))
    page = render_page([], stats=stats)
    assert "covered by nucleus" in page
    assert "<section id=" not in page


# In a browser -------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A headless chromium with a fresh profile."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    chromedriver = shutil.which("chromedriver")
    if chromium is None or chromedriver is None:
        pytest.skip("no chromium with chromedriver on the PATH (apt install chromium-driver)")
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (
        "headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run",
        "disable-background-networking", "disable-component-update", "disable-sync",
        "disable-dev-shm-usage", "window-size=1000,900",
        f"user-data-dir={tmp_path_factory.mktemp('profile')}",
    ):  # fmt: skip
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(executable_path=chromedriver)
    driver = webdriver.Chrome(options=options, service=service)
    yield driver
    driver.quit()


@pytest.fixture
def show(browser: Any, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Any]:
    """Load a page, and make sure at the end that nothing in it failed, fetched or ran wild."""

    def load(page: str, *, theme: str = "light", width: int = 1000) -> Any:
        emulate = {"features": [{"name": "prefers-color-scheme", "value": theme}]}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", emulate)
        browser.set_window_size(width, 900)
        explore.write_page(tmp_path / "page.html", page)
        browser.get((tmp_path / "page.html").as_uri())
        return browser

    yield load
    keep_screenshot(browser, request.node.name)
    assert browser.get_log("browser") == []
    assert browser.execute_script("return window.hacked") is None
    fetched = "return performance.getEntriesByType('resource').map(entry => entry.name)"
    assert browser.execute_script(fetched) == []


def keep_screenshot(browser: Any, name: str) -> None:
    folder = os.environ.get("SCREENSHOTS")
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        browser.save_screenshot(str(Path(folder) / f"{re.sub(r'[^a-z0-9]+', '_', name)}.png"))


def find(browser: Any, selector: str) -> Any:
    return browser.find_elements("css selector", selector)


def focused(browser: Any) -> int:
    return int(browser.switch_to.active_element.get_attribute("data-t") or -1)


def press(browser: Any, *keys: str) -> int:
    for key in keys:
        browser.switch_to.active_element.send_keys(key)
    return focused(browser)


def focus(browser: Any, t: int, section: int = 0) -> Any:
    node = find(browser, f'#s{section} .tok[data-t="{t}"]')[0]
    script = "arguments[0].scrollIntoView({block: 'center'}); arguments[0].focus()"
    browser.execute_script(script, node)
    return node


def test_hostile_tokens_are_shown_and_never_act(show: Any, hostile: ConversationAnalysis) -> None:
    browser = show(visualize_conversation_probabilities(hostile, return_html=True))
    script = "return [...document.querySelectorAll('.tok')].map(node => node.textContent)"
    shown = browser.execute_script(script)
    boxes = [explore.show_text(token.text).lstrip(" ") or "∅" for token in hostile.tokens]
    assert shown == [text.replace("\n", "↵\n").removesuffix("\n") for text in boxes]
    whole = browser.execute_script("return document.querySelector('.text').textContent")
    for token in hostile.tokens:  # what stands outside of the boxes is there too
        assert explore.show_text(token.text).replace("\n", "↵\n") in whole
    assert "".join(explore.show_text(text) for text in HOSTILE[:4]) in (
        find(browser, ".text .out")[0].text
    )
    assert len(find(browser, "script")) == 2
    assert not find(browser, "main img, main svg[onload], main b")
    for t in range(len(HOSTILE)):
        focus(browser, t)
        popped = browser.execute_script("return document.querySelector('#pop code').textContent")
        assert popped == explore.show_token(hostile.tokens[t].text)
    assert not find(browser, "#pop img, #pop svg, #pop script")


def test_text_in_both_directions_keeps_to_its_own_token(
    show: Any, hostile: ConversationAnalysis
) -> None:
    browser = show(render_page([hostile]))
    focus(browser, 8)
    isolated = find(browser, "#pop bdi")
    assert len(isolated) > 5
    body = find(browser, ".text")[0]
    assert body.value_of_css_property("unicode-bidi") == "isolate"
    assert not re.search("[\u202a-\u202e\u2066-\u2069]", body.text)


def test_pointing_at_a_token_shows_what_the_teacher_thought(
    show: Any, plain: list[ConversationAnalysis]
) -> None:
    from selenium.webdriver import ActionChains

    browser = show(render_page(plain[:1]))
    token = next(t for t in plain[0].tokens if t.where == "nucleus" and t.rank > 1)
    node = find(browser, f'.tok[data-t="{token.t}"]')[0]
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", node)
    assert not find(browser, "#pop")[0].is_displayed()
    ActionChains(browser).move_to_element(node).perform()
    popup = find(browser, "#pop")[0]
    assert popup.is_displayed()
    assert f"id {token.id}, token {token.t}" in popup.text
    assert f"rank {token.rank}" in popup.text
    assert f"log p {token.log_probability:.3f}" in popup.text
    assert f"nucleus of {token.nucleus_size} tokens" in popup.text
    assert "Tail sample, in the order drawn" in popup.text
    assert "and 18 more" in popup.text
    names = [row.text for row in find(browser, "#pop .row bdi")]
    assert names[:5] == [explore.show_token(p.text) for p in token.predictions[:5]]
    bars = [bar.size["width"] for bar in find(browser, "#pop .bar")][:5]
    assert bars == sorted(bars, reverse=True)
    heading = find(browser, "h1")[0]
    ActionChains(browser).move_to_element(heading).perform()
    assert not popup.is_displayed()


def test_a_bound_says_that_it_is_one(show: Any, plain: list[ConversationAnalysis]) -> None:
    browser = show(render_page(plain[:1]))
    token = next(t for t in plain[0].tokens if t.where == "not stored")
    node = focus(browser, token.t)
    assert "bound" in node.get_attribute("class")
    text = find(browser, "#pop")[0].text
    assert "p ≤ " in text
    assert f"rank ≥ {token.rank}, not stored" in text


def test_tapping_pins_and_tapping_again_lets_go(
    show: Any, plain: list[ConversationAnalysis]
) -> None:
    from selenium.webdriver import ActionChains

    browser = show(render_page(plain[:1]))
    node, popup = focus(browser, 7), find(browser, "#pop")[0]
    node.click()
    ActionChains(browser).move_to_element(find(browser, "h2")[0]).perform()
    assert popup.is_displayed()
    node.click()
    assert not popup.is_displayed()
    node.click()
    browser.execute_script("document.querySelector('h1').click()")
    assert not popup.is_displayed()


def test_arrow_keys_walk_through_the_tokens(show: Any, plain: list[ConversationAnalysis]) -> None:
    browser = show(render_page(plain[:1]))
    last = len(plain[0].tokens) - 1
    focus(browser, 0)
    assert press(browser, ARROWS["right"], ARROWS["right"], ARROWS["right"]) == 3
    assert press(browser, ARROWS["left"]) == 2
    top = "return document.activeElement.getClientRects()[0].top + scrollY"
    first_line = browser.execute_script(top)
    below = press(browser, ARROWS["down"])
    assert below > 3
    second_line = browser.execute_script(top)
    assert second_line > first_line + 10
    press(browser, ARROWS["down"])
    assert browser.execute_script(top) - second_line == pytest.approx(
        second_line - first_line, abs=3
    )
    assert press(browser, ARROWS["up"], ARROWS["up"]) < below
    assert browser.execute_script(top) == pytest.approx(first_line, abs=3)
    assert press(browser, END) == last
    assert press(browser, ARROWS["right"]) == last  # stays
    assert press(browser, HOME) == 0
    assert press(browser, ARROWS["up"], ARROWS["left"]) == 0
    assert find(browser, "#pop")[0].is_displayed()
    press(browser, ESCAPE)
    assert not find(browser, "#pop")[0].is_displayed()


def test_the_tab_key_enters_each_conversation_once(
    show: Any, plain: list[ConversationAnalysis]
) -> None:
    browser = show(render_page(plain))
    reachable = find(browser, '.tok[tabindex="0"]')
    assert [node.get_attribute("data-t") for node in reachable] == ["0", "0", "0"]
    focus(browser, 0)
    press(browser, ARROWS["right"], ARROWS["right"])
    assert len(find(browser, '#s0 .tok[tabindex="0"]')) == 1
    described = browser.switch_to.active_element.get_attribute("aria-describedby")
    assert described == "pop"


def test_several_conversations_are_linked_and_keep_their_own_data(
    show: Any, plain: list[ConversationAnalysis], tmp_path: Path
) -> None:
    stats = compute_dataset_stats(write_output(tmp_path / "out", random_rows(6)))
    browser = show(render_page(plain, about="a small output", stats=stats))
    links = find(browser, "nav a")
    assert [link.text for link in links] == [f"conversation {a.index}" for a in plain]
    assert len(find(browser, "section svg.spark")) == 3
    assert "covered by nucleus" in find(browser, "dl")[0].text
    for number, analysis in enumerate(plain):
        focus(browser, 5, number)
        assert f"id {analysis.tokens[5].id}, token 5" in find(browser, "#pop")[0].text


def test_the_sparkline_leads_to_a_token(show: Any, plain: list[ConversationAnalysis]) -> None:
    from selenium.webdriver import ActionChains

    browser = show(render_page(plain[:1]))
    spark, n = find(browser, ".spark")[0], len(plain[0].tokens)
    width = spark.size["width"]
    ActionChains(browser).move_to_element_with_offset(spark, width // 4, 0).click().perform()
    at = focused(browser)
    assert at == pytest.approx(0.75 * n, abs=2)
    marker = find(browser, ".now")[0]
    assert float(marker.get_attribute("x1")) == at + 0.5
    assert marker.get_attribute("visibility") is None


CONTRAST = """
function channel(c) { c /= 255; return c <= .03928 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4; }
function light(text) {
  const [r, g, b] = text.match(/[0-9.]+/g).map(Number);
  return .2126 * channel(r) + .7152 * channel(g) + .0722 * channel(b);
}
function back(node) {
  for (; node; node = node.parentElement) {
    const colour = getComputedStyle(node).backgroundColor;
    if (!/^rgba.*, 0\\)$/.test(colour)) return colour;
  }
}
const shown = "h1, .dim, .legend span, .tok, .out, dt, dd, #pop :not(.bar)";
return [...document.querySelectorAll(shown)].map(node => {
  const one = light(getComputedStyle(node).color), two = light(back(node));
  return [(Math.max(one, two) + .05) / (Math.min(one, two) + .05), node.className];
});
"""


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_has_contrast_in_both_themes(
    show: Any, plain: list[ConversationAnalysis], theme: str, tmp_path: Path
) -> None:
    stats = compute_dataset_stats(write_output(tmp_path / "out", random_rows(6)))
    browser = show(render_page(plain[:1], stats=stats), theme=theme)
    focus(browser, 3)
    ratios = browser.execute_script(CONTRAST)
    assert len(ratios) > 50
    assert min(ratios)[0] >= 4.5, min(ratios)
    background = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(255, 255, 255)") == (theme == "light")
    levels = {name for _, name in ratios if name.startswith("b")}
    assert levels >= {f"b{level}" for level in range(7)}


def test_levels_differ_in_lightness_and_not_in_hue_alone() -> None:
    for block in re.findall(r"--b1: .*?--t5", explore.PAGE_CSS, flags=re.S):
        colours = re.findall(r"--b[1-6]: #([0-9a-f]{6})", block)
        light = [
            sum(weight * int(colour[i : i + 2], 16) for weight, i in ((0.3, 0), (0.6, 2), (0.1, 4)))
            for colour in colours
        ]
        steps = np.diff(light)
        assert len(colours) == 6
        assert (steps > 8).all() or (steps < -8).all(), light


@pytest.fixture
def phone(browser: Any) -> Iterator[None]:
    """A screen of 390 by 700 pixels."""
    size = {"width": 390, "height": 700, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    yield
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


BOXES = """
const pop = document.getElementById("pop").getBoundingClientRect();
const node = document.activeElement;
return [[pop.top, pop.bottom, pop.left, pop.right],
        [...node.getClientRects()].map(box => [box.top, box.bottom])];
"""


def test_the_popup_stays_on_the_screen_and_off_its_token(
    show: Any, plain: list[ConversationAnalysis], phone: None
) -> None:
    long = explore.replace(plain[0].tokens[3], text=" many words that wrap" * 6)
    tokens = [*plain[0].tokens[:3], long, *plain[0].tokens[4:]]
    pieces = [(long.text if t == 3 else text, t) for text, t in plain[0].pieces]
    browser = show(render_page([explore.replace(plain[0], tokens=tokens, pieces=pieces)]))
    wide = browser.execute_script("return document.documentElement.clientWidth")
    assert browser.execute_script("return document.documentElement.scrollWidth") <= wide == 390
    for t in (0, 3, 5, 40, len(tokens) - 1):
        for block in ("start", "center", "end"):
            node = find(browser, f'.tok[data-t="{t}"]')[0]
            script = "document.activeElement.blur();"
            script += f"arguments[0].scrollIntoView({{block: '{block}'}}); arguments[0].focus()"
            browser.execute_script(script, node)
            (top, bottom, left, right), lines = browser.execute_script(BOXES)
            assert 0 <= left < right <= wide
            for above, below in lines:
                assert bottom <= above + 1 or top >= below - 1, (t, block)


def test_a_token_that_wraps_leaves_no_coloured_stub(
    show: Any, plain: list[ConversationAnalysis], phone: None
) -> None:
    browser = show(render_page(plain[:1]))
    script = """
      return [...document.querySelectorAll(".tok")].map(node =>
        [node.textContent, [...node.getClientRects()].map(box => box.width)]);
    """
    wrapped = browser.execute_script(script)
    assert len(wrapped) > 100
    for text, widths in wrapped:
        assert not text.startswith(" ")
        assert all(width > 4 for width in widths), (text, widths)


def test_a_link_leads_to_a_token(
    browser: Any, plain: list[ConversationAnalysis], tmp_path: Path
) -> None:
    explore.write_page(tmp_path / "page.html", render_page(plain))
    browser.get((tmp_path / "page.html").as_uri() + "#s2-t30")
    assert focused(browser) == 30
    assert f"id {plain[2].tokens[30].id}, token 30" in find(browser, "#pop")[0].text
    for nowhere in ("#s9-t1", "#s0-t99999", "#s0-t1]", "#"):
        browser.get((tmp_path / "page.html").as_uri() + nowhere)
        assert browser.get_log("browser") == []


def test_without_scripts_the_text_and_its_colours_are_there(
    browser: Any, plain: list[ConversationAnalysis], tmp_path: Path
) -> None:
    page = re.sub(r"<script>.*?</script>", "", render_page(plain[:1]), flags=re.S)
    explore.write_page(tmp_path / "page.html", page)
    browser.get((tmp_path / "page.html").as_uri())
    assert len(find(browser, ".tok")) == len(plain[0].tokens)
    assert plain[0].tokens[4].text.strip() in find(browser, ".text")[0].text


def test_a_script_that_is_not_ours_is_refused_by_the_page_itself(
    browser: Any, plain: list[ConversationAnalysis], tmp_path: Path
) -> None:
    page = render_page(plain[:1]).replace("</main>", "<script>window.hacked=1</script></main>")
    explore.write_page(tmp_path / "page.html", page)
    browser.get((tmp_path / "page.html").as_uri())
    assert browser.execute_script("return window.hacked") is None
    assert any(
        "Content Security Policy" in entry["message"] for entry in browser.get_log("browser")
    )


def test_a_long_conversation_opens_quickly(show: Any) -> None:
    rows = random_rows(1, settings=STORED, tokens=2, seed=1)
    short = analysis_of(rows[0]).tokens
    tokens = [explore.replace(short[i % len(short)], t=i, text=" word") for i in range(5_000)]
    long = ConversationAnalysis(1, tokens, [(" word", t) for t in range(5_000)])
    browser = show(render_page([long]))
    ready = browser.execute_script(
        "const it = performance.getEntriesByType('navigation')[0]; return it.domComplete"
    )
    print(f"5,000 tokens: complete after {ready:.0f} ms")
    assert ready < 10_000
    focus(browser, 4_000)
    assert press(browser, ARROWS["right"]) == 4_001
