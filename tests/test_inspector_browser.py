"""The page of `proxy-sft inspect --serve` in headless Chromium, as a person uses it: many rows, long rows, rejected
rows, a telephone, the dark, and copies that nobody trusts. `PROXY_SFT_SOAK=1` takes 50,000 rows and 100,000 tokens."""
import json
import os
import re
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest
from browsers import contrasts, Inspector, needs_chromium, show_as, start_chromium

from proxy_sft.chat.inspector import open_inspector, static_html
from proxy_sft.chat.inspector_server import make_server
from proxy_sft.chat.views import PIECE, show_row
from proxy_sft.data.conversion import convert_file
from proxy_sft.demo.rows import demo_rows
from proxy_sft.demo.tokenizer import build_demo_tokenizer

pytestmark = needs_chromium
LONG_FORM = os.environ.get("PROXY_SFT_SOAK") == "1"
MANY, LONG = (50_000, 100_000) if LONG_FORM else (3_000, 6_000)  # rows; tokens
TABS = ("text", "tokens", "parity", "compare", "messages", "raw", "block")


@pytest.fixture(scope="module")
def browser():
    driver = start_chromium()
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def tokenizer(): return build_demo_tokenizer(["Weather in Lisbon? rain sunny umbrella"] * 3)


@pytest.fixture(autouse=True)
def window(browser): show_as(browser, 1440)


@contextmanager
def served(browser, state):
    "The page over a state, in the browser."
    server = make_server(state)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": .05})
    thread.start()
    try:
        browser.get(server.address)
        page = Inspector(browser)
        page.find(".rows tbody tr")
        yield page
    finally:
        browser.get("about:blank")  # no message is on its way any more
        server.shutdown()
        server.server_close()
        thread.join()


def call(city): return {"type": "function", "function": {"name": "weather.now", "arguments": {"city": city}}}


def conversation(number, text="rain"):
    "A question, with a call where the number is odd."
    calls = [{"role": "assistant", "content": "", "tool_calls": [call("Lisbon")]}, {"role": "tool", "content": text}]
    return [{"role": "user", "content": f"Weather in Lisbon? {number}"}, *(calls if number % 2 else []),
            {"role": "assistant", "content": f"Take an umbrella, {number}."}]


TOOLS = [{"type": "function", "function": {"name": "weather.now", "description": "", "parameters": {
    "type": "object", "properties": {"city": {"type": "string"}}}}}]


def on_disk(number, **more):
    return json.dumps({"id": f"row_{number}", "source": f"source {number % 5}", "tools_json": json.dumps(TOOLS),
                       "messages_json": json.dumps(conversation(number, **more))}) + "\n"


@pytest.fixture(scope="module")
def command(tmp_path_factory, tokenizer):
    "The address that the command prints, over a file of many rows."
    folder = tmp_path_factory.mktemp("many")
    tokenizer.save_pretrained(folder / "tokenizer")
    (folder / "rows.jsonl").write_text("".join(map(on_disk, range(MANY))))
    words = ["inspect", str(folder / "rows.jsonl"), "--serve", "--no-browser", "--tokenizer", str(folder / "tokenizer")]
    with subprocess.Popen([str(Path(sys.executable).parent / "proxy-sft"), *words], text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE) as process:
        address = re.search(r"http://\S+", process.stdout.readline())
        yield address[0] if address else pytest.fail(process.stderr.read())
        process.terminate()


def test_many_rows(browser, command):
    "First view, page, sort, filter, search: what the table says is what the rows are."
    from selenium.webdriver.common.keys import Keys
    browser.get(command)
    page = Inspector(browser)
    page.find(".rows tbody tr")
    def column(number): return page.texts(f".rows tbody tr > :nth-child({number + 1})")
    assert page.text(".rows caption").startswith(f"1–25 of {MANY:,} rows") and page.row() == 0
    page.press("button[title='next page']")
    assert column(0) == [f"{row}" for row in range(25, 50)]
    page.press(".rows thead th:nth-child(5) button")
    page.wait("!document.querySelector('.psft-app .rows caption').textContent.includes('·')", "all rows are read")
    assert column(4) == ["0"] * 25
    page.press(".rows thead th:nth-child(5) button")
    assert column(4) == ["1"] * 25 and column(0)[0] == f"{MANY - 1:,}"
    page.press(".facets [data-name=source] summary")
    page.press(".facets [data-name=source] button")
    assert len(set(column(2))) == 1 and f"of {MANY // 5:,} rows" in page.text(".rows caption")
    page.press(".rows tbody tr:nth-child(3)")
    assert f"{page.row():,}" == column(0)[2] and f"row_{page.row()}" in page.text(".right > p")
    page.keys("input[name=text]", f"umbrella, {MANY - 10}.", Keys.ENTER)
    page.wait(f"document.querySelector('.psft-app [aria-label=Row]').value === '{MANY - 10}'", "the search arrives")
    assert page.text(".hits") == "match 1 of 1"


def test_keys_names_and_empty_fields(browser, tokenizer):
    "Keys, help, emptied number fields; each control has a name, each head a scope, each tab its panel."
    from selenium.webdriver.common.keys import Keys
    rows = [{"messages": conversation(number), "tools": TOOLS} for number in range(30)]
    with served(browser, open_inspector(rows, tokenizer)) as page:
        for key, row in (("j", 1), ("n", 2), ("k", 1)):
            page.keys(".panel", key)
            assert page.row() == row
        page.keys(".panel", "?")
        assert page.wait("document.querySelector('.psft-app dialog').open") and "next row" in page.text("dialog")
        browser.switch_to.active_element.send_keys(Keys.ESCAPE)
        page.wait("!document.querySelector('.psft-app dialog').open")
        for selector in ("[aria-label=Row]", "input[name=calls]", "input[name=longer]"):
            page.keys(selector, Keys.CONTROL, "a", Keys.NULL, Keys.DELETE, Keys.TAB)
            assert page.text(".note") == "" and page.row() == 1, selector
        nameless = """return [...document.querySelectorAll('.psft-app :is(button, input, select)')].filter(node =>
          !node.textContent.trim() && !node.ariaLabel && !(node.labels || []).length).map(node => node.outerHTML)"""
        assert browser.execute_script(nameless) == []
        assert browser.execute_script("return document.querySelectorAll('.psft-app th:not([scope])').length") == 0
        for tab in browser.execute_script("return Array.from(document.querySelectorAll('.psft-app [role=tab]'))"):
            assert browser.execute_script("return document.getElementById(arguments[0]).role",
                                          tab.get_attribute("aria-controls")) == "tabpanel"


@pytest.fixture(scope="module")
def long_row(tokenizer):
    "A row of many tokens that the stock template renders otherwise than a server, in each turn but the last."
    per_turn = len(tokenizer.encode("rain " * 500))
    turns = [message for number in range(1, 2 * LONG // per_turn, 2) for message in conversation(number, "rain " * 500)]
    return {"id": "long", "messages": turns, "tools": TOOLS}


def test_long_rows(browser, tokenizer, long_row):
    "Tokens come in pieces as one scrolls, to the last; the views of parity and of two templates show what differs."
    state = open_inspector([long_row], tokenizer, "stock")
    with served(browser, state) as page:
        tokens = len(state.current().reading.ids)
        assert tokens > LONG
        page.press("[data-tab=tokens]")
        count = "document.querySelectorAll('.psft-app .panel ruby').length"
        assert page.wait(count) == PIECE
        shown = PIECE
        while shown < tokens:
            browser.execute_script("arguments[0].scrollTop = arguments[0].scrollHeight", page.find(".panel"))
            shown = page.wait(f"{count} > {shown} && {count}", "scrolling loads the next piece")
        assert shown == tokens and page.texts(".panel rt")[-1].startswith(f"{tokens - 1}·")
        page.press("[data-tab=parity]")
        assert "✘" in page.text(".panel tr:nth-child(2)")
        assert browser.execute_script("return document.querySelectorAll('.psft-app .panel del').length") > 2
        page.choose("beside (B)", "nothink")
        page.press("[data-tab=compare]")
        assert page.find(".panel ins, .panel del") and "difference" in page.text(".panel > p")


def test_servers_beside_each_other(browser, tokenizer):
    tools = [{"type": "function", "function": {"name": "weather.now", "description": "", "parameters": {
        "type": "object", "properties": {"city": {"type": "text"}}}}}]
    state = open_inspector([{"id": "1", "messages": conversation(1), "tools": tools}], tokenizer, "stock")
    with served(browser, state) as page:
        page.press("[data-tab=compare]")
        assert "Choose" in page.text(".panel")
        for side, server in (("A as", "vLLM"), ("B as", "SGLang")):
            page.choose(side, next(name for key, name in state.view()["servers"] if name.startswith(server)))
        assert "weather.now(city) differs" in page.text(".panel") and page.find(".panel ins")


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    "Converted demo rows, with those that were rejected beside them."
    folder = tmp_path_factory.mktemp("rejected")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in demo_rows(180)))
    convert_file(folder / "rows.jsonl", folder / "converted" / "train.jsonl", progress=False)
    return folder


def test_rejected_rows(browser, tokenizer, converted):
    "Each opens on its reason, the place in the raw row marked; a converted row is shown beside its raw one."
    from selenium.webdriver.common.keys import Keys
    state = open_inspector(converted / "converted" / "rejected.jsonl", tokenizer, raw=converted / "rows.jsonl")
    with served(browser, state) as page:
        first = {state.rows[number]["reason"]: number for number in reversed(range(len(state.rows)))}
        for reason, number in first.items():
            page.keys("[aria-label=Row]", Keys.CONTROL, "a", Keys.NULL, str(number), Keys.TAB)
            assert page.row() == number and page.text(".panel > p").startswith(f"rejected: {reason}")
            place = state.rows[number].get("excerpt", "").strip("… \n")
            assert not place or set(page.texts(".panel pre mark")) == {place}, state.rows[number]
        assert len(first) > 5
        page.choose("File", "train.jsonl")
        page.press("[data-tab=raw]")
        assert page.text(".beside > div:first-child > strong") == "raw"
        assert page.text(".beside > div:last-child > strong") == "converted"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_telephone_shows_everything(browser, tokenizer, converted, scheme):
    "420 pixels: nothing is cut and nothing scrolls sideways, in any view; text stands out from its background."
    show_as(browser, 420, scheme)
    state = open_inspector(converted / "converted" / "train.jsonl", tokenizer, "stock", raw=converted / "rows.jsonl")
    with served(browser, state) as page:
        page.choose("beside (B)", "nothink")
        for tab in TABS[:-1]:
            page.press(f"[data-tab={tab}]")
            wide = browser.execute_script("""return [document.documentElement, ...document.querySelectorAll(
              '.psft-app, .psft-app :is(div, table, tr, td, th, pre, p, button, select, details)')].filter(node =>
              node.scrollWidth > node.clientWidth + 1 && getComputedStyle(node).display !== 'inline' && node.clientWidth
              || node.getBoundingClientRect().right > 420.5).map(node => node.outerHTML.slice(0, 120))""")
            assert not wide, (tab, wide)
            found = contrasts(browser, *(f".psft-app {part}" for part in (
                ".panel .t", ".panel mark", ".panel del", ".panel ins", ".panel rt", ".bar button", ".bar select",
                "[role=tab]", ".rows td", ".rows caption", ".right > p")))
            assert len(found) > 6 and min(found.values()) >= 4.5, (tab, found)
        dark = browser.execute_script("return matchMedia('(prefers-color-scheme: dark)').matches")
        assert dark == (scheme == "dark")


def test_a_static_copy_without_styles_and_scripts(browser, tokenizer, tmp_path):
    "As an untrusted notebook shows it: lines stay lines, and what is trained is marked, the stop token with it."
    view = show_row({"id": "1", "messages": conversation(1), "tools": TOOLS}, tokenizer)
    bare = re.sub(r'(?s)<style>.*?</style>| (?:class|style)="[^"]*"', "", static_html(view))
    assert "<script" not in bare and "http" not in bare
    (tmp_path / "copy.html").write_text(bare, encoding="utf-8")
    browser.get((tmp_path / "copy.html").as_uri())
    marks = browser.execute_script("""return Array.from(document.querySelectorAll('details[open] mark')).map(mark =>
      [mark.innerText, getComputedStyle(mark).backgroundColor])""")
    answers = [text for text, _ in marks]
    assert len(marks) == 2 and all(text.endswith("<|im_end|>") for text in answers) and "umbrella" in answers[1]
    assert {color for _, color in marks}.isdisjoint({"rgba(0, 0, 0, 0)", "transparent"})
    lines = browser.execute_script("return document.querySelector('pre').innerText").splitlines()
    assert "# Tools" in lines and any("weather.now(city)" in line for line in lines)
