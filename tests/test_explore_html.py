"""The page in a real browser: what it shows, how it is used, and that nothing in it can act.

Needs chromium and chromedriver on the PATH (Debian: chromium chromium-driver) and selenium; the
browser tests are skipped with that reason where they are missing.
"""

import re
import shutil
import socket
from typing import Any

import numpy as np
import pytest
from small_output import STORED, Vocabulary, random_rows, write_output

import explore_logits as explore
from explore_logits import ConversationAnalysis, get_sample, render_page

HOSTILE = [
    "</script><script>window.hacked=1</script>", "<img src=x onerror='window.hacked=2'>",
    '"><svg onload=window.hacked=3>', "<!--<script>", "-->", "' onmouseover='window.hacked=4",
    "&lt;b&gt; &amp; &#60;", "\u202eltr\u202c", "\u2067שלום\u2069", "مرحبا",
    "\ud800", "a\udfffb",  # halves of surrogate pairs
    "\u2028\u2029", "\x00\x1b[31m\x07", "⟨F0 9F⟩", "\r\n\t", "  two  spaces  ", "\u200b",
    "{{7*7}} ${7*7} %s", "日本語 🎉 👩‍👩‍👧", "javascript:window.hacked=5", "",
]  # fmt: skip
LEFT, RIGHT, ESCAPE = "\ue012", "\ue014", "\ue00c"


def analysis_of(row: dict[str, Any], **changes: Any) -> ConversationAnalysis:
    sample = get_sample([row | changes])
    return explore.analyze_token_probabilities(sample, None, Vocabulary(HOSTILE))


@pytest.fixture(scope="module")
def hostile():
    """A conversation whose text is made of hostile tokens, in prompt and answer."""
    rows = random_rows(40, settings=STORED, tokens=60, seed=2)
    row = max(rows, key=lambda row: row["num_tokens"])
    bad, size = [*range(len(HOSTILE))], row["num_tokens"]
    positions = [*range(len(bad), len(bad) + size)]
    ids = bad + np.resize(bad, size).tolist()
    return analysis_of(row, input_ids=ids, token_positions=positions)


@pytest.fixture(scope="module")
def plain():
    """Three ordinary conversations of some lines each."""
    rows = random_rows(20, settings=STORED, tokens=300, seed=9)
    longest = sorted(rows, key=lambda row: -row["num_tokens"])[:3]
    texts = [[max(token, len(HOSTILE)) for token in row["input_ids"]] for row in longest]
    return [analysis_of(row, input_ids=ids) for row, ids in zip(longest, texts, strict=True)]


def test_a_page_is_one_file_that_names_no_other(plain):
    page = render_page(plain)
    assert not re.search(r"""(src|href)\s*=\s*["'](?!#)""", page)
    assert not re.search(r"https?://|@import|url\(|//cdn", page)
    assert page.startswith("<!doctype html>")
    assert "default-src &#39;none&#39;" in page
    assert page.count("<section id=") == 3


def test_every_string_from_data_is_escaped_wherever_it_stands(plain):
    bad = "\"'<b>&\u202e\x1b"
    tail = [explore.Prediction(1, bad, 0.0, 0.1)]
    token = explore.replace(plain[0].tokens[0], text=bad, tail=tail, t=0)
    analysis = ConversationAnalysis(7, [token], [(bad, None), (bad, 0)], model=bad, note=bad)
    page = render_page([analysis], title=bad, about=bad)
    assert page.encode()
    assert "<b>" not in page
    assert not re.search("[\u202e\x1b]", page)
    assert page.count("&#34;&#39;&lt;b&gt;&amp;⟨U+202E⟩␛") == 9


def test_a_bound_says_that_it_is_one(plain):
    token = next(t for t in plain[0].tokens if t.where == "not stored")
    told = explore.describe_token(token)
    for said in (f"%, rank ≥ {token.rank}, not stored", ": ≤", "log p ≤ ",
                 "tail sample, in the order drawn, 6 of 24"):  # fmt: skip
        assert said in told
    stored = next(t for t in plain[0].tokens if t.where == "nucleus" and t.rank > 1)
    lines = explore.list_predictions(stored.predictions, stored.id, bar=8)
    assert [line[0] for line in lines].index("▸") == stored.rank - 1
    assert "≤" not in explore.describe_token(stored)


def test_invisible_characters_become_visible():
    assert explore.show_text("a\x1b[0m\x7f\u202e\ud800") == "a␛[0m⟨U+007F⟩⟨U+202E⟩⟨U+D800⟩"
    assert explore.show_text("a\tb\nc") == "a\tb\nc"
    assert explore.show_token(" a\n\t") == "·a↵⇥"
    assert explore.show_text("👩‍👩‍👧") == "👩‍👩‍👧"
    line = " a\n\x1b[31m b\u202e hf_abcDEF123456 "  # of the log, which holds no token
    assert explore.show_line(line) == "a ␛[31m b⟨U+202E⟩ ***"


def test_a_notebook_shows_the_page_in_a_frame_of_its_own(hostile):
    shown = hostile._repr_html_()
    assert shown.startswith('<iframe srcdoc="&lt;!doctype html&gt;')
    assert 'sandbox="allow-scripts"' in shown
    assert shown.count('"') == 6  # the page's own quotes cannot end the attribute


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    """A headless chromium with a fresh profile."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    chromedriver = shutil.which("chromedriver")
    if chromium is None or chromedriver is None:
        pytest.skip("no chromium with chromedriver on the PATH (apt install chromium-driver)")
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (
        "headless=new no-sandbox disable-gpu disable-quic no-first-run disable-sync "
        "disable-background-networking disable-component-update disable-dev-shm-usage "
        f"window-size=1000,900 user-data-dir={tmp_path_factory.mktemp('profile')}"
    ).split():
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(executable_path=chromedriver)
    socket.setdefaulttimeout(60)  # the driver takes it over; by itself it waits for ever
    driver = webdriver.Chrome(options=options, service=service)
    socket.setdefaulttimeout(None)
    yield driver
    driver.quit()


@pytest.fixture
def show(browser, tmp_path):
    """Load a page, and make sure at the end that nothing in it failed, fetched or ran wild."""

    def load(page: str, *, theme: str = "light") -> Any:
        emulate = {"features": [{"name": "prefers-color-scheme", "value": theme}]}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", emulate)
        explore.write_page(tmp_path / "page.html", page)
        browser.get((tmp_path / "page.html").as_uri())
        return browser

    yield load
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert browser.get_log("browser") == []
    assert browser.execute_script("return window.hacked") is None
    fetched = "return performance.getEntriesByType('resource').map(entry => entry.name)"
    assert browser.execute_script(fetched) == []


def find(browser: Any, selector: str) -> Any:
    return browser.find_elements("css selector", selector)


def point(browser: Any, selector: str, *, click: bool = False) -> None:
    """Bring an element into view and move the mouse there."""
    from selenium.webdriver import ActionChains

    node = find(browser, selector)[0]
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", node)
    moves = ActionChains(browser).move_to_element(node)
    (moves.click() if click else moves).perform()


def told(browser: Any) -> str:
    """Return what the box says, nothing when it is hidden."""
    script = "const it = document.getElementById('box'); return it.hidden ? '' : it.textContent"
    return str(browser.execute_script(script))


def press(browser: Any, *keys: str) -> str:
    for key in keys:
        find(browser, "body")[0].send_keys(key)
    return told(browser)


def test_hostile_tokens_are_shown_and_never_act(show, hostile):
    browser = show(explore.visualize_conversation_probabilities(hostile, return_html=True))
    script = "return [...document.querySelectorAll('.tok')].map(node => node.textContent)"
    shown = browser.execute_script(script)
    boxes = [explore.show_text(token.text).lstrip(" ") or "∅" for token in hostile.tokens]
    assert shown == [text.replace("\n", "↵\n").removesuffix("\n") for text in boxes]
    whole = browser.execute_script("return document.querySelector('.text').textContent")
    for token in hostile.tokens:  # what stands outside of the boxes is there too
        assert explore.show_text(token.text).replace("\n", "↵\n") in whole
    assert len(find(browser, "script")) == 1
    assert not find(browser, "main img, main svg[onload], main b")
    for token in hostile.tokens[: len(HOSTILE)]:
        assert press(browser, RIGHT) == explore.describe_token(token)
    assert not find(browser, "#box *")


def test_pointing_tapping_keys_and_links_show_a_token(show, plain):
    browser = show(render_page(plain[:2]))
    assert not told(browser)
    point(browser, "#s0-t5")
    assert told(browser) == explore.describe_token(plain[0].tokens[5])
    point(browser, "#s1-t7", click=True)
    point(browser, "h1")
    assert told(browser) == explore.describe_token(plain[1].tokens[7])
    point(browser, "#s1-t7", click=True)
    assert not told(browser)
    expected = [explore.describe_token(token) for token in plain[0].tokens]
    browser.refresh()
    assert press(browser, RIGHT, RIGHT, RIGHT) == expected[2]
    assert press(browser, LEFT) == expected[1]
    assert not press(browser, ESCAPE)
    page = browser.current_url
    for place, said in (("#s0-t30", expected[30]), *((n, "") for n in ("#s9-t1", "#s0-t1]", "#"))):
        browser.get("about:blank")
        browser.get(page + place)
        assert told(browser) == said


def test_the_page_needs_no_script_and_runs_none_but_its_own(browser, plain, tmp_path):
    page, path = render_page(plain[:1]), tmp_path / "page.html"
    explore.write_page(path, re.sub(r"<script>.*?</script>", "", page, flags=re.S))
    browser.get(path.as_uri())
    assert len(find(browser, ".tok")) == len(plain[0].tokens)
    assert plain[0].tokens[4].text.strip() in find(browser, ".text")[0].text
    explore.write_page(path, page.replace("</main>", "<script>hacked=1</script></main>"))
    browser.get(path.as_uri())
    assert browser.execute_script("return window.hacked") is None
    log = browser.get_log("browser")
    assert any("Content Security Policy" in entry["message"] for entry in log)


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
const shown = "h1, .dim, .legend span, .tok, .text, dt, dd, #box";
return [...document.querySelectorAll(shown)].map(node => {
  const one = light(getComputedStyle(node).color), two = light(back(node));
  return [(Math.max(one, two) + .05) / (Math.min(one, two) + .05), node.className];
});
"""


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_has_contrast_in_both_themes(show, plain, theme, tmp_path):
    stats = explore.compute_dataset_stats(write_output(tmp_path / "out", random_rows(6)))
    browser = show(render_page(plain[:1], stats=stats), theme=theme)
    press(browser, RIGHT)
    ratios = browser.execute_script(CONTRAST)
    assert len(ratios) > 50
    assert min(ratios)[0] >= 4.5, min(ratios)
    background = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(255, 255, 255)") == (theme == "light")
    levels = {name for _, name in ratios if name.startswith("b")}
    assert levels >= {f"b{level}" for level in range(7)}


BOXES = """
const box = document.getElementById("box").getBoundingClientRect();
const node = document.querySelector(".on").getBoundingClientRect();
return [box.top, box.bottom, box.left, box.right, node.top, node.bottom];
"""


def test_the_box_stays_on_the_screen_and_off_its_token(show, browser, plain):
    phone = {"width": 390, "height": 700, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    long = explore.replace(plain[0].tokens[3], text=" many words that wrap" * 6)
    tokens = [*plain[0].tokens[:3], long, *plain[0].tokens[4:]]
    pieces = [(long.text if t == 3 else text, t) for text, t in plain[0].pieces]
    show(render_page([explore.replace(plain[0], tokens=tokens, pieces=pieces)]))
    wide = browser.execute_script("return document.documentElement.clientWidth")
    assert browser.execute_script("return document.documentElement.scrollWidth") <= wide == 390
    for t in (0, 3, 5, 40, len(tokens) - 1):
        for block in ("start", "center", "end"):
            scroll = f"document.getElementById('s0-t{t}').scrollIntoView({{block: '{block}'}})"
            browser.execute_script(f"pin(document.getElementById('s0-t{t}')); {scroll}; place()")
            top, bottom, left, right, above, below = browser.execute_script(BOXES)
            assert 0 <= left < right <= wide
            assert bottom <= above or top >= below, (t, block)
            assert 0 <= top < bottom <= 700
