"""The page: everything from the data is escaped; in a real browser nothing in it can act.

Needs chromium and chromedriver on the PATH (Debian: chromium chromium-driver) and selenium; the
browser tests are skipped with that reason where they are missing.
"""

import re
import shutil
import socket

import numpy as np
import pytest
from small_output import STORED, Vocabulary, random_rows

import explore_logits as explore
from explore_logits import ConversationAnalysis, render_page

HOSTILE = [
    "</script><script>window.hacked=1</script>", "<img src=x onerror='window.hacked=2'>",
    '"><svg onload=window.hacked=3>', "<!--<script>", "' onmouseover='window.hacked=4",
    "&lt;b&gt; &amp;", "\u202eltr\u202c", "مرحبا", "\ud800", "a\udfffb",  # halves of pairs
    "\u2028\u2029", "\x00\x1b[31m\x07", "⟨F0 9F⟩", "\r\n\t", "  two  spaces  ", "\u200b",
    "{{7*7}} ${7*7} %s", "日本語 🎉 👩‍👩‍👧", "javascript:window.hacked=5", "",
]  # fmt: skip
RIGHT, ESCAPE = "\ue014", "\ue00c"


def analysis_of(row, **changes):
    sample = explore.get_sample([row | changes])
    return explore.analyze_token_probabilities(sample, None, Vocabulary(HOSTILE))


@pytest.fixture(scope="module")
def hostile():
    """A conversation whose text is made of hostile tokens, in prompt and answer."""
    row = max(random_rows(9, settings=STORED, tokens=60), key=lambda row: row["num_tokens"])
    bad, size = [*range(len(HOSTILE))], row["num_tokens"]
    positions = [*range(len(bad), len(bad) + size)]
    ids = bad + np.resize(bad, size).tolist()
    return analysis_of(row, input_ids=ids, token_positions=positions)


@pytest.fixture(scope="module")
def plain():
    """Two ordinary conversations of some lines each."""
    rows = random_rows(20, settings=STORED, tokens=300, seed=9)
    longest = sorted(rows, key=lambda row: -row["num_tokens"])[:2]
    texts = [[max(token, len(HOSTILE)) for token in row["input_ids"]] for row in longest]
    return [analysis_of(row, input_ids=ids) for row, ids in zip(longest, texts, strict=True)]


def test_a_page_is_one_file_that_names_no_other(plain):
    page = render_page(plain)
    assert not re.search(r"""(src|href)\s*=\s*["'](?!#)""", page)
    assert not re.search(r"https?://|@import|url\(|//cdn", page)
    assert page.startswith("<!doctype html>")
    assert "default-src &#39;none&#39;" in page
    assert page.count("<section id=") == 2
    framed = plain[0]._repr_html_()
    assert framed.startswith('<iframe srcdoc="&lt;!doctype html&gt;')
    assert 'sandbox="allow-scripts"' in framed
    assert framed.count('"') == 6  # the page's own quotes cannot end the attribute


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
    for said in (f"%, rank ≥ {token.rank}, not stored", ": ≤", "log p ≤ "):
        assert said in told
    stored = next(t for t in plain[0].tokens if t.where == "nucleus")
    assert "≤" not in explore.describe_token(stored)


def test_invisible_characters_become_visible():
    assert explore.show_text("a\x1b[0m\x7f\u202e\ud800") == "a␛[0m⟨U+007F⟩⟨U+202E⟩⟨U+D800⟩"
    assert explore.show_text("a\tb\nc 👩‍👩‍👧") == "a\tb\nc 👩‍👩‍👧"
    assert explore.show_token(" a\n\t") == "·a↵⇥"
    line = " a\n\x1b[31m b\u202e hf_abcDEF123456 "  # of the log, which holds no token
    assert explore.show_line(line) == "a ␛[31m b⟨U+202E⟩ ***"


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
def load(browser, tmp_path):
    """Load a page, and make sure at the end that nothing in it acted or was fetched."""

    def load(page):
        explore.write_page(tmp_path / "page.html", page)
        browser.get((tmp_path / "page.html").as_uri())
        return browser

    yield load
    assert browser.execute_script("return window.hacked") is None
    fetched = "return performance.getEntriesByType('resource').map(entry => entry.name)"
    assert browser.execute_script(fetched) == []


def find(browser, selector):
    return browser.find_elements("css selector", selector)


def press(browser, *keys):
    """Press keys; return what the box says then, nothing when it is hidden."""
    for key in keys:
        find(browser, "body")[0].send_keys(key)
    script = "const it = document.getElementById('box'); return it.hidden ? '' : it.textContent"
    return browser.execute_script(script)


def test_hostile_tokens_are_shown_and_never_act(load, hostile):
    browser = load(render_page([hostile]))
    whole = browser.execute_script("return document.querySelector('.text').textContent")
    for token in hostile.tokens[: len(HOSTILE)]:
        assert explore.show_text(token.text).replace("\n", "↵\n") in whole
        assert press(browser, RIGHT) == explore.describe_token(token)
    assert len(find(browser, "script")) == 1
    assert not find(browser, "main img, main svg[onload], main b, #box *")
    assert browser.get_log("browser") == []


def test_pointing_keys_and_links_show_a_token(load, plain):
    browser = load(render_page(plain))
    expected = [explore.describe_token(token) for token in plain[0].tokens]
    assert not press(browser)
    find(browser, "#s0-t5")[0].click()
    assert press(browser) == expected[5]
    browser.refresh()
    assert press(browser, RIGHT, RIGHT) == expected[1]
    assert not press(browser, ESCAPE)
    page = browser.current_url
    for place, said in (("#s0-t30", expected[30]), ("#s9-t1", ""), ("#s0-t1]", "")):
        browser.get("about:blank")
        browser.get(page + place)
        assert press(browser) == said
    assert browser.get_log("browser") == []


def test_the_page_needs_no_script_and_runs_none_but_its_own(load, plain):
    page = render_page(plain[:1])
    browser = load(re.sub(r"<script>.*?</script>", "", page, flags=re.S))
    assert plain[0].tokens[4].text.strip() in find(browser, ".text")[0].text
    browser = load(page.replace("</main>", "<script>hacked=1</script></main>"))
    log = browser.get_log("browser")
    assert any("Content Security Policy" in entry["message"] for entry in log)
