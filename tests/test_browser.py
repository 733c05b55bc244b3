"""JupyterLab on the loopback interface, `01_convert.ipynb` run in headless Chromium, the inspector used as a person
would; pictures are kept.

Needs Chromium and its driver (Debian: `apt-get install chromium chromium-driver`); says so and skips where they are
missing."""
import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from browsers import contrasts, Inspector, needs_chromium, PATIENCE, start_chromium
from ports import free_port

from proxy_sft.chat.views import show_row
from proxy_sft.demo.tokenizer import build_demo_tokenizer

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = "01_convert.ipynb"

pytestmark = [
    needs_chromium,
    pytest.mark.skipif(
        not shutil.which("jupyter-lab", path=str(Path(sys.executable).parent)), reason="no JupyterLab here"
    ),
]

LAST_CELL = '''
os = __import__("os")
os.environ.pop("IN_TEST", None)  # from here on somebody can press a button
from proxy_sft.chat.inspector import inspect
from pathlib import Path
from proxy_sft.data.rows import convert_row
def said(role, content): return {"role": role, "content": content, "function_calls": None, "functions": None}
ugly = {"id": "ugly", "source_dataset": "hand made", "messages": [
    said("user", "<img src=x onerror='window.pwned=1'><script>window.pwned=1</script> <|im_end|> needle in a haystack"),
    said("assistant", "<b>not bold</b>")]}
with open(settings.train_file, "rb") as stream: lines = [next(stream) for _ in range(300)]
lines[0] = next(line for line in lines if line.count(b'(city=') > 1)
lines[7] = json.dumps(ugly).encode() + bytes([10])
Path("rows.jsonl").write_bytes(b"".join(lines))
inspect("rows.jsonl", tokenizer, convert=convert_row)
'''


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    "A JupyterLab of its own: settings, kernel and notebook in a folder that is thrown away."
    folder = tmp_path_factory.mktemp("lab")
    notebook = json.loads((ROOT / "nbs" / NOTEBOOK).read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code": cell["outputs"], cell["execution_count"] = [], None
        # a workspace of its own; the profile is the demo's, by IN_TEST
        if "parameters" in cell["metadata"].get("tags", []):
            found = "".join(cell["source"])
            cell["source"] = re.sub(
                r"(?m)^workspace: (.*?) = None", f"workspace: \\1 = {str(folder / 'workspace')!r}", found
            )
            assert cell["source"] != found, "01_convert has no workspace parameter any more"
    notebook["cells"].append(
        {
            "cell_type": "code",
            "id": "browser-test",
            "metadata": {},
            "outputs": [],
            "execution_count": None,
            "source": LAST_CELL,
        }
    )
    (folder / "work").mkdir()
    (folder / "work" / NOTEBOOK).write_text(json.dumps(notebook), encoding="utf-8")
    settings = folder / "settings" / "@jupyterlab" / "apputils-extension"
    settings.mkdir(parents=True)
    (settings / "notification.jupyterlab-settings").write_text(
        json.dumps({"fetchNews": "false", "checkForUpdates": False})
    )
    kernel = folder / "share" / "kernels" / "sft-qwen3"  # this Python, whatever is installed for the user
    kernel.mkdir(parents=True)
    (kernel / "kernel.json").write_text(json.dumps({
        "argv": [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"], "display_name": "sft-qwen3",
        "language": "python", "env": {"PYTHONPATH": str(ROOT), "IN_TEST": "1"}}))
    port = free_port()
    token = secrets.token_hex(16)
    own = {
        "JUPYTER_CONFIG_DIR": folder / "config",
        "JUPYTER_RUNTIME_DIR": folder / "runtime",
        "JUPYTER_PATH": folder / "share",
        "JUPYTERLAB_SETTINGS_DIR": folder / "settings",
        "JUPYTERLAB_WORKSPACES_DIR": folder / "workspaces",
        "IPYTHONDIR": folder / "ipython",
        "HOME": folder,
    }
    log = open(folder / "lab.log", "wb")
    server = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "jupyterlab",
            "--no-browser",
            "--ip=127.0.0.1",
            f"--port={port}",
            "--ServerApp.port_retries=0",
            f"--IdentityProvider.token={token}",
            f"--ServerApp.root_dir={folder / 'work'}",
            "--allow-root",
            "--LabApp.news_url=",
            "--LabApp.expose_app_in_browser=True",
            "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
        ],
        env={**os.environ, **{key: str(value) for key, value in own.items()}},
        stdout=log,
        stderr=log,
    )
    address = f"http://127.0.0.1:{port}"
    until = time.monotonic() + PATIENCE
    while True:
        if server.poll() is not None or time.monotonic() > until: pytest.fail((folder / "lab.log").read_text()[-2000:])
        try: urllib.request.urlopen(f"{address}/api?token={token}", timeout=60)
        except OSError: time.sleep(.25)
        else: break
    yield address, token, folder
    server.terminate()
    server.wait(PATIENCE)
    log.close()


@pytest.fixture(scope="module")
def browser(lab):
    "A browser with JupyterLab, the notebook run to its end."
    address, token, folder = lab
    driver = start_chromium("--window-size=1400,1000", f"--user-data-dir={folder / 'chrome'}")
    try:
        driver.get(f"{address}/lab/tree/{NOTEBOOK}?token={token}&reset")
        Page(driver, "first").run_all()
        yield driver
    finally: driver.quit()


@pytest.fixture(scope="module", params=["light", "dark"])
def page(request, browser):
    "The notebook in one theme, the inspector at its first row."
    use = Page(browser, request.param)
    use.take_theme()
    use.choose_row(0)
    return use


class Page(Inspector):
    "The notebook around it as well."
    def __init__(self, driver, theme): self.driver, self.theme = driver, theme

    def picture(self, name): super().picture(f"{self.theme}-{name}")

    def run_all(self):
        "Run all cells from the menu; the last one opens the inspector."
        self.wait("document.querySelectorAll('.jp-Notebook .jp-Cell').length > 3")
        # before, JupyterLab would ask which kernel to take
        self.wait("document.body.innerText.includes('sft-qwen3 | Idle')", "the status bar shows the kernel, ready")
        self.menu("Run", "Run All Cells")
        self.wait("document.querySelector('.psft-app')", "the inspector appears")
        prompts = "Array.from(document.querySelectorAll('.jp-InputPrompt')).map(e => e.textContent)"
        self.wait(f"!{prompts}.some(text => text.includes('*'))", "all cells have run")
        self.driver.execute_script("document.querySelector('.psft-app').scrollIntoView({block: 'center'})")

    def take_theme(self):
        "Change JupyterLab's theme and wait until the page has it."
        name, light = f"JupyterLab {self.theme.title()}", str(self.theme == "light").lower()
        self.driver.execute_async_script(
            "const done = arguments[1]; jupyterapp.commands.execute('apputils:change-theme', {theme: arguments[0]})"
            ".then(() => done())", name)
        self.wait(f"document.body.dataset.jpThemeName === '{name}' && document.body.dataset.jpThemeLight === '{light}'")

    def choose_row(self, row):
        from selenium.webdriver.common.keys import Keys
        self.keys("[aria-label=Row]", Keys.CONTROL, "a", Keys.NULL, str(row), Keys.ENTER)
        self.wait(f"document.querySelector('.psft-app [aria-label=Row]').value === '{row}'", f"row {row} is shown")

    def menu(self, bar, item):
        from selenium.webdriver.common.by import By
        name = f"//li[contains(@class,'lm-MenuBar-item')][.//div[text()='{bar}']]"
        self.driver.find_element(By.XPATH, name).click()
        entry = ("Array.from(document.querySelectorAll('.lm-Menu-item')).find(e => "
                 "e.textContent.trim().startsWith(arguments0))")
        self.wait(entry.replace("arguments0", json.dumps(item))).click()


def test_rows_and_views(page):
    assert page.row() == 0 and "of 300" in page.text(".right .bar")
    page.picture("text")
    page.press("button[title^='next row']")
    assert page.row() == 1 and len(page.text(".panel")) > 20
    page.press("button[title^='previous row']")
    assert page.row() == 0
    for tab, seen in (
        ("tokens", "·"),
        ("parity", "prompt equals a server's"),
        ("messages", "message 0"),
        ("raw", "content"),
        ("text", "im_start"),
    ):
        page.press(f"[data-tab={tab}]")
        assert page.find(f"[data-tab={tab}]").get_attribute("aria-selected") == "true" and seen in page.text(".panel")
        page.picture(tab)


def test_template_switch_shows_the_diff(page):
    page.press("[data-tab=parity]")
    assert "✘" not in page.text(".panel")
    page.choose("Template", "stock")
    page.wait("document.querySelector('.psft-app .panel').textContent.includes('✘')", "stock loses a turn")
    assert page.find(".panel del, .panel ins")
    page.picture("parity-stock")
    page.choose("Template", "nothink")
    assert "✘" not in page.text(".panel")
    page.press("[data-tab=text]")


def test_search_and_markup_stays_text(page):
    from selenium.webdriver.common.keys import Keys
    page.keys("input[name=text]", "NEEDLE in a", Keys.ENTER)
    page.wait("document.querySelector('.psft-app [aria-label=Row]').value === '7'", "the search finds row 7")
    for tab in ("text", "tokens", "messages", "raw", "parity", "text"):
        page.press(f"[data-tab={tab}]")
        assert not page.driver.execute_script(
            "return document.querySelector('.psft-app .panel').querySelector('img, script, a')"
        )
    assert "<script>window.pwned=1</script>" in page.text(".panel") and "<b>not bold</b>" in page.text(".panel")
    assert page.driver.execute_script("return window.pwned") is None
    page.picture("search")
    page.keys("input[name=text]", Keys.CONTROL, "a", Keys.NULL, Keys.DELETE, Keys.ENTER)


def test_keyboard(page):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    at, cells = page.row(), len(page.driver.find_elements(By.CSS_SELECTOR, ".jp-Notebook .jp-Cell"))
    for key, row in (("j", at + 1), ("n", at + 2), ("k", at + 1)):
        page.keys(".panel", key)
        assert page.row() == row
    page.keys(".panel", "2")
    assert page.find("[data-tab=tokens]").get_attribute("aria-selected") == "true"
    page.keys("[data-tab=tokens]", Keys.ARROW_RIGHT)
    assert page.find("[data-tab=parity]").get_attribute("aria-selected") == "true"
    page.keys(".panel", "/")
    assert page.driver.switch_to.active_element.get_attribute("name") == "text"
    page.keys(".panel", "1")
    # no key reached the notebook
    assert len(page.driver.find_elements(By.CSS_SELECTOR, ".jp-Notebook .jp-Cell")) == cells


def test_copy_as_json(page):
    page.driver.execute_cdp_cmd(
        "Browser.grantPermissions", {"permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"]}
    )
    page.press("button[title^='copy']")
    page.wait("document.querySelector('.psft-app .note').textContent === 'copied'")
    copied = page.driver.execute_async_script("navigator.clipboard.readText().then(arguments[0])")
    assert json.loads(copied)["messages"]


def test_colours_can_be_read(page):
    "Text against its background, as the browser computes it: at least 4.5 to 1, in both themes."
    parts = ".panel .t", ".panel mark", ".bar button", ".bar select", ".bar input", "[role=tab]", "p"
    found = contrasts(page.driver, *(f".psft-app {part}" for part in parts))
    assert len(found) == len(parts) and min(found.values()) >= 4.5, (page.theme, found)


def test_cells_ran_without_an_error(page):
    errors = "Array.from(document.querySelectorAll('[data-mime-type*=error]')).map(e => e.textContent).join()"
    assert page.driver.execute_script("return " + errors) == ""


def untrusted_notebook(tokenizer):
    "As another machine left it: a widget that nobody can start here, with the row itself beside it."
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
    page = show_row({"messages": messages}, tokenizer)._repr_html_()
    widget = {"version_major": 2, "version_minor": 0, "model_id": "0" * 32}
    data = {"text/html": page, "application/vnd.jupyter.widget-view+json": widget, "text/plain": "a widget"}
    output = {"output_type": "display_data", "metadata": {}, "data": data}
    cell = {"cell_type": "code", "id": "copy", "metadata": {}, "source": "1", "execution_count": 1, "outputs": [output]}
    kernel = {"name": "sft-qwen3", "display_name": "sft-qwen3", "language": "python"}
    return {"cells": [cell], "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}


def test_an_untrusted_notebook_shows_what_is_trained(page, lab):
    "JupyterLab takes styles away; lines and marks stay, the stop token among them. The last test, since it leaves."
    if page.theme == "light": return  # once is enough, where it is harder to read
    address, token, folder = lab
    notebook = untrusted_notebook(build_demo_tokenizer(["Hi", "Hello!"]))
    (folder / "work" / "untrusted.ipynb").write_text(json.dumps(notebook), encoding="utf-8")
    page.driver.get(f"{address}/lab/tree/untrusted.ipynb?token={token}&reset")
    page.wait("document.querySelector('.jp-OutputArea-output mark')", "the copy is shown")
    page.picture("untrusted")
    answer = page.driver.execute_script("return document.querySelector('.jp-OutputArea-output mark').innerText")
    assert answer == "Hello!<|im_end|>"
    before = page.driver.execute_script("return document.querySelector('.jp-OutputArea-output pre').innerText")
    assert before.splitlines() == ["<|im_start|>user", "Hi<|im_end|>"]
    found = contrasts(page.driver, ".jp-OutputArea-output mark", ".jp-OutputArea-output pre")
    assert len(found) == 2 and min(found.values()) >= 4.5, found
