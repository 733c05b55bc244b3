"""How long a person waits for the inspector, beside reading the file once: first row, keys, sort, filter, search.

    python benchmarks/inspect_rows.py [rows] [--record]

The rows, two million of them unless told otherwise, are short (about 1 KB, two sources, one in two with a call), with
the facts that a conversion writes beside them. Everything but the first reading finds the file in the system's cache.
`python` is the time until the view is made; `Chromium`, where it is installed, the time inside the page of `proxy-sft
inspect --serve` from the key, or the click, to the row that is shown. Seconds depend on the machine; the ratios are
what counts. `--record` appends the table to benchmarks/RESULTS.md."""
import argparse
import json
import statistics
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from datetime import date
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
from browsers import BROWSER, DRIVER, Inspector, start_chromium

from proxy_sft.chat.inspector import open_inspector
from proxy_sft.chat.inspector_server import make_server
from proxy_sft.data.ledger import facts_file, FactsWriter
from proxy_sft.demo.tokenizer import build_demo_tokenizer

TOOL = {"type": "function", "function": {"name": "weather.now", "description": "The weather of a city.", "parameters": {
    "type": "object", "properties": {"city": {"type": "string", "description": "name of the city"}}}}}


def conversation(number):
    "Messages and tools; one in two makes a call."
    function = {"name": "weather.now", "arguments": {"city": "Lisbon"}}
    calls = [{"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]},
             {"role": "tool", "content": '{"sky": "rain", "degrees": 17}'}]
    return [{"role": "user", "content": f"What is the weather in Lisbon tomorrow? NUMBER {'word ' * 60}"},
            *(calls if number % 2 else []), {"role": "assistant", "content": "Rain: take an umbrella with you."}]


def write_rows(path, count):
    "A converted file and its facts."
    lines = [json.dumps({"messages_json": json.dumps(conversation(kind)), "tools_json": json.dumps([TOOL] * kind)})
             .encode() + b"\n" for kind in (0, 1)]
    writer = FactsWriter(facts_file(path))
    with open(path, "wb") as file:
        for first in range(0, count, 50_000):
            numbers = range(first, min(count, first + 50_000))
            file.write(b"".join(lines[number % 2].replace(b"NUMBER", b"%d" % number) for number in numbers))
            writer.add([[f"row_{n}" for n in numbers], [f"source {n % 2}" for n in numbers], [n + 1 for n in numbers],
                        [n % 2 for n in numbers], [[] for _ in numbers]])
    writer.close(path.stat().st_size)


def read_through(path):
    with open(path, "rb") as file:
        while file.read(1 << 24): pass


def seconds(act):
    began = time.perf_counter()
    act()
    return time.perf_counter() - began


def in_python(path, tokenizer, count):
    "Seconds of what a person does, until its view is made."
    found, states = {}, []
    def opened():
        states.append(open_inspector(path, tokenizer))
        states[-1].view()
    found["inspect(…) to the first row, best of 3"] = min(seconds(opened) for _ in range(3))
    state = states[-1]
    def answered(message): return seconds(lambda: state.handle(message) or state.view())
    found["a key to the next row, median of 30"] = statistics.median(answered({"do": "find"}) for _ in range(30))
    found["to the last row"] = answered({"do": "go", "value": count - 1})
    found["back to the first row"] = answered({"do": "go", "value": 0})
    found["sorted by calls"] = answered({"do": "sort", "value": "calls"})
    found["sorted by id"] = answered({"do": "sort", "value": "id"})
    state.handle({"do": "sort", "value": "row"})
    found["filtered by source"] = answered({"do": "facet", "value": ["source", "source 1"]})
    state.handle({"do": "facet", "value": ["source", ""]})
    state.handle({"do": "query", "value": {"text": f"tomorrow? {count // 10} word"}})
    found["search for a text, for each 50,000 rows"] = answered({"do": "find"}) * 50_000 / min(50_000, count // 10)
    return found


@contextmanager
def page_of(path, tokenizer):
    server, driver = make_server(open_inspector(path, tokenizer)), start_chromium()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try: yield server, driver
    finally:
        driver.quit()
        server.shutdown()


SHOWN = """const [act, done] = arguments, root = document.querySelector('.psft-app'), began = performance.now();
const row = root.querySelector('[aria-label=Row]'), before = row.value;
new MutationObserver((_, watcher) => { if (row.value === before || root.ariaBusy === 'true') return;
  watcher.disconnect(); requestAnimationFrame(() => setTimeout(() => done((performance.now() - began) / 1000))); })
  .observe(root, {subtree: true, childList: true, attributes: true, characterData: true});
const panel = root.querySelector('.panel');
if (act === 'j') panel.dispatchEvent(new KeyboardEvent('keydown', {key: 'j', bubbles: true}));
else root.querySelector('.rows tbody tr:nth-child(20)').click();"""


def in_chromium(path, tokenizer):
    "Seconds inside the page."
    with page_of(path, tokenizer) as (server, driver):
        page = Inspector(driver)
        first = seconds(lambda: driver.get(server.address) or page.find(".rows tbody tr"))
        page.wait("document.querySelector('.psft-app').getAttribute('aria-busy') !== 'true'")
        keys = [driver.execute_async_script(SHOWN, "j") for _ in range(30)]
        click = driver.execute_async_script(SHOWN, "click")
    return {"opened page to the first row": first, "a key to the row that is shown, median of 30":
            statistics.median(keys), "a click on a row of the table": click}


def table(found, reading, path, count):
    lines = [f"{count:,} rows, {path.stat().st_size / 1e9:.2f} GB; reading the file: {reading:.2f} s, best of 3", "",
             f"{'':64} seconds  of reading"]
    for where, times in found.items():
        lines += [f"{where + ': ' + what:64} {value:7.3f}  {value / reading:10.4f}" for what, value in times.items()]
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="?", type=int, default=2_000_000)
    parser.add_argument("--record", action="store_true", help="append to benchmarks/RESULTS.md")
    given = parser.parse_args()
    tokenizer = build_demo_tokenizer([json.dumps([conversation(1), TOOL])] * 3)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "train.jsonl"
        write_rows(small := Path(folder) / "small.jsonl", 100)
        open_inspector(small, tokenizer).view()  # what is done once in a process: libraries are loaded
        write_rows(path, given.rows)
        read_through(path)
        reading = min(seconds(lambda: read_through(path)) for _ in range(3))
        found = {"python": in_python(path, tokenizer, given.rows)}
        if BROWSER and DRIVER: found["Chromium"] = in_chromium(path, tokenizer)
        text = table(found, reading, path, given.rows)
    print(text)
    if not given.record: return
    about = (f"\n## {date.today()}: the inspector\n\n- command: `python benchmarks/inspect_rows.py {given.rows} "
             f"--record`\n- versions: Python {sys.version.split()[0]}, transformers {version('transformers')}\n\n")
    with (ROOT / "benchmarks" / "RESULTS.md").open("a", encoding="utf-8") as file:
        file.write(f"{about}```text\n{text}\n```\n")


if __name__ == "__main__": main()
