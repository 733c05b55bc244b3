"""`make picture`: the README's picture, the inspector over demo rows in headless Chromium, written to
docs/inspector.png."""
import io
import json
import sys
import tempfile
import threading
from base64 import b64decode
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
from browsers import BROWSER, DRIVER, Inspector, show_as, start_chromium
from PIL import Image

from proxy_sft.chat.inspector import open_inspector
from proxy_sft.chat.inspector_server import make_server
from proxy_sft.core.settings import load_settings
from proxy_sft.data.conversion import convert_file
from proxy_sft.demo.rows import demo_rows
from proxy_sft.demo.tokenizer import build_demo_tokenizer

TARGET, WIDTH, HEIGHT, COLOURS = ROOT / "docs" / "inspector.png", 1180, 730, 32


def converted(folder):
    "The demo's rows as page 01 converts them."
    raw, target = folder / "rows.jsonl", folder / "converted" / "train.jsonl"
    raw.write_text("".join(json.dumps(row) + "\n" for row in demo_rows()), encoding="utf-8")
    convert_file(raw, target, progress=False)
    return raw, target


def asks_twice(row):
    "Whether a row asks for the weather of two places at once and answers."
    messages = json.loads(row["messages_json"])
    named = [call["function"]["name"] for message in messages for call in message.get("tool_calls") or []]
    return len(named) == 2 and len(messages) < 7 and all(name.startswith("weather.") for name in named)


def photograph(driver, state):
    "The page of a state as PNG, scrolled to the first call."
    server = make_server(state)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        show_as(driver, WIDTH, height=HEIGHT)
        driver.get(server.address)
        page = Inspector(driver)
        page.press(".facets [data-name=calls] summary")
        page.wait("!document.querySelector('.psft-app .rows').textContent.includes('…')", "the rows are measured")
        driver.execute_script("arguments[0].scrollTop += arguments[1].getBoundingClientRect().top - "
                              "arguments[0].getBoundingClientRect().top - 4", page.find(".panel"), page.find(".user"))
        clip = {"x": 0, "y": 0, "width": WIDTH, "height": HEIGHT, "scale": 1}
        return b64decode(driver.execute_cdp_cmd("Page.captureScreenshot", {"clip": clip})["data"])
    finally: server.shutdown()


def main():
    if not (BROWSER and DRIVER): sys.exit("make picture needs Chromium and its driver: apt-get install chromium "
                                          "chromium-driver")
    with tempfile.TemporaryDirectory() as name:
        raw, target = converted(Path(name))
        lines = target.read_text(encoding="utf-8").splitlines()
        state = open_inspector(target, build_demo_tokenizer(lines[:200]), load_settings("demo").template, raw=raw)
        state.handle({"do": "go", "value": next(row for row in range(len(lines))
                                                 if row % 25 < 12 and asks_twice(state.rows[row]))})
        driver = start_chromium()
        try: picture = photograph(driver, state)
        finally: driver.quit()
    image = Image.open(io.BytesIO(picture)).convert("RGB")
    image.quantize(COLOURS, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(TARGET, "PNG", optimize=True)
    print(f"{TARGET.relative_to(ROOT)}: {image.width} x {image.height}, {TARGET.stat().st_size / 1024:.0f} KB")


if __name__ == "__main__": main()
