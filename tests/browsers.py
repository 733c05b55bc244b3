"""Headless Chromium for tests, with waits for states: no test sleeps for a while and hopes."""
import json
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PICTURES = Path(__file__).resolve().parents[1] / "test-artifacts"
DRIVER = shutil.which("chromedriver")
PATIENCE = 600  # seconds until something counts as stuck; nothing is awaited that long
needs_chromium = pytest.mark.skipif(
    BROWSER is None or DRIVER is None, reason="no Chromium with chromedriver here: nothing was tried in a browser"
)


def start_chromium(*arguments: str):
    "A browser without a window."
    from selenium import webdriver
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for word in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--hide-scrollbars",
                 *arguments): options.add_argument(word)
    service = webdriver.chrome.service.Service(DRIVER, log_output=subprocess.DEVNULL)
    driver = webdriver.Chrome(options=options, service=service)
    driver.command_executor.client_config.timeout = PATIENCE
    driver.set_page_load_timeout(PATIENCE)
    driver.set_script_timeout(PATIENCE)
    return driver


def show_as(driver, width: int, scheme: str = "light", height: int = 900) -> None:
    "A window of so many pixels, and what its owner prefers."
    feature = {"name": "prefers-color-scheme", "value": scheme}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


class Inspector:
    "What a person does with the inspector, wherever it is shown."
    def __init__(self, driver): self.driver = driver

    def wait(self, script, why=""):
        "Until a script gives something."
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            if found := self.driver.execute_script("return " + script): return found
            time.sleep(.05)
        self.picture("stuck")
        raise AssertionError(f"not within {PATIENCE} s: {why or script}")

    def picture(self, name): # kept for a person to look at
        PICTURES.mkdir(exist_ok=True)
        self.driver.save_screenshot(str(PICTURES / f"inspector-{name}.png"))

    def find(self, selector):
        return self.wait(f"document.querySelector({json.dumps('.psft-app ' + selector)})")

    def text(self, selector): # in one step: a table may be drawn anew at any time
        self.find(selector)
        script = "return document.querySelector(arguments[0]).innerText"
        return self.driver.execute_script(script, f".psft-app {selector}")

    def texts(self, selector): # of all that fit, in one step
        script = "return Array.from(document.querySelectorAll(arguments[0])).map(node => node.textContent)"
        return self.driver.execute_script(script, f".psft-app {selector}")

    def row(self): return int(self.find("[aria-label=Row]").get_property("value"))
    def idle(self):
        "Until the last message of the page is answered; what is read in the background is answered apart."
        self.wait("document.querySelector('.psft-app').getAttribute('aria-busy') !== 'true'")

    def press(self, selector):
        from selenium.common.exceptions import StaleElementReferenceException
        while True:
            try: self.find(selector).click()
            except StaleElementReferenceException: continue  # drawn anew since it was found
            return self.idle()

    def keys(self, selector, *keys):
        self.find(selector).send_keys(*keys)
        self.idle()

    def choose(self, label, name):
        from selenium.webdriver.support.ui import Select
        box = self.wait("Array.from(document.querySelectorAll('.psft-app label')).find(l => "
                        f"l.textContent.startsWith({json.dumps(label)}))?.nextElementSibling")
        Select(box).select_by_visible_text(name)
        self.idle()


def contrasts(driver, *selectors: str) -> dict[str, float]: # selector -> ratio, of those that there are
    "Text against its background, as the browser computes it."
    shades = driver.execute_script("""
      const solid = node => { for (let n = node; n; n = n.parentElement) {
        const c = getComputedStyle(n).backgroundColor;
        if (!/rgba|transparent/.test(c)) return c; } return 'rgb(255, 255, 255)'; };
      return arguments[0].map(s => [s, document.querySelector(s)]).filter(([s, node]) => node).map(([s, node]) =>
        [s, getComputedStyle(node).color, solid(node)]);""", list(selectors))
    def light(color):
        parts = [int(float(c)) / 255 for c in re.findall(r"[\d.]+", color)[:3]]
        parts = [c / 12.92 if c <= .03928 else ((c + .055) / 1.055) ** 2.4 for c in parts]
        return .2126 * parts[0] + .7152 * parts[1] + .0722 * parts[2]
    def ratio(front, back):
        low, high = sorted((light(front), light(back)))
        return (high + .05) / (low + .05)
    return {selector: ratio(front, back) for selector, front, back in shades}
