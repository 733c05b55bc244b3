"""Rows converted per second and core: this converter, a plain pass, and CPython's `ast` for the calls, in one run.

    python benchmarks/convert.py [rows]

All sides read the same generated file. There are two: rows in Dolci-Instruct-SFT's proportions (227,579 of 2,152,112
rows have tools; 3.3 KB each on average, like the dataset's 7.11 GB), and tool rows alone (about 6 KB each: three tools,
one to three calls a turn, results in bundles, two exchanges on average). Both are written as 00_download writes them,
UTF-8 without ASCII escapes. The sides are

- `convert_file` with everything on: calls parsed, checked against their tools, results paired, ledger, hashes, report;
  one and two processes;
- the plain pass: `json.loads`, dict surgery (roles renamed, calls read by a regular expression and `json.loads`,
  nothing checked), `json.dumps`;
- the same pass with `ast.parse` and `ast.literal_eval` for the calls.

Rows per second depend on the machine; the ratios are what counts. The first round starts the helpers' server; the best
of three does not hold it. """
import ast
import json
import random
import re
import sys
import tempfile
import time
from pathlib import Path

import psutil

from proxy_sft.data.conversion import convert_file

SYSTEM = (
    "You are a helpful function-calling AI assistant. You are provided with function signatures within "
    "<functions></functions> XML tags. You may call "
    "one or more functions to assist with the user query. Output any function calls within "
    "<function_calls></function_calls> XML tags. "
    "Don't make assumptions about what values to plug into functions."
)
WORDS = ("market data for the given city and date Zürich returns search results price list of items with an optional "
         "filter 2024-01-01 it's").split()
NAMES = "city date query limit currency symbol user_id language sort".split()


def spell(call):
    "A call in JSON's spelling, which all sides can read."
    arguments = [f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in call["arguments"].items()]
    return f"{call['name']}({', '.join(arguments)})"


def draw_row(number, chance):
    "One conversation of Dolci's shape; no two alike."
    def text(low, high): return " ".join(chance.choices(WORDS, k=chance.randrange(low, high)))
    def message(role, content=None, calls=None, functions=None):
        return {"content": content, "function_calls": calls, "functions": functions, "role": role}
    tools = []
    for i in range(chance.choice((1, 2, 3, 3, 4, 6))):
        kinds = {
            f"{chance.choice(NAMES)}_{j}": chance.choice(("string", "string", "string", "integer", "number", "boolean"))
            for j in range(chance.randrange(1, 6))
        }
        properties = {name: {"type": kind, "description": text(6, 18), "default": ""} for name, kind in kinds.items()}
        tools.append(
            {
                "type": "function",
                "function": {
                    "name": f"api_{number % 997}.get_{i}",
                    "description": text(8, 25),
                    "parameters": {"type": "object", "properties": properties, "required": list(kinds)[:1]},
                },
            }
        )
    def value(kind):
        if kind == "string": return text(1, 6)
        return {"integer": chance.randrange(10**6), "number": chance.random() * 100, "boolean": chance.random() < 0.5}[
            kind
        ]
    def call():
        function = chance.choice(tools)["function"]
        return {
            "name": function["name"],
            "arguments": {name: value(p["type"]) for name, p in function["parameters"]["properties"].items()},
        }
    messages = [message("system", SYSTEM, None, json.dumps(tools))]
    for _ in range(chance.choice((1, 1, 2, 4))):
        calls = [call() for _ in range(chance.choice((1, 1, 2, 3)))]
        results = [
            json.dumps(
                {"results": [{"name": text(2, 6), "value": chance.random()} for _ in range(chance.randrange(1, 6))]}
            )
            for _ in calls
        ]
        messages += [
            message("user", text(10, 60)),
            message("assistant", None, "\n".join(map(spell, calls))),
            message("environment", "\n".join(results)),
            message("assistant", text(30, 150)),
        ]
    return {
        "id": f"row_{number}",
        "messages": messages,
        "source_dataset": "Dolci Instruct Tool Use",
        "domain": "Tool Use",
    }


def draw_chat(number, chance):
    "One plain chat, as nine of ten rows are."
    def text(low, high):
        return " ".join(chance.choices(WORDS, k=chance.randrange(low, high))) + "\n\n- " * chance.randrange(3)
    def message(role, content): return {"content": content, "function_calls": None, "functions": None, "role": role}
    turns = [
        message(role, text(*size))
        for _ in range(chance.choice((1, 1, 1, 1, 2, 3)))
        for role, size in (("user", (10, 120)), ("assistant", (60, 400)))
    ]
    return {"id": f"chat_{number}", "messages": turns, "source_dataset": "Wildchat", "domain": "Chat"}


CALL = re.compile(r"([\w.]+)\((.*)\)")
ARGUMENT = re.compile(r'(\w[\w-]*)=("(?:[^"\\]|\\.)*"|[^,"]+)')


def calls_by_pattern(text):
    "Calls with JSON's spelling of values, checked by nobody."
    return [{"name": name, "arguments": {key: json.loads(value) for key, value in ARGUMENT.findall(arguments)}}
            for name, arguments in (CALL.fullmatch(line).groups() for line in text.split("\n"))]


def calls_by_ast(text):
    "Calls read by CPython's own parser; JSON's words are put into Python's."
    text = re.sub(
        r"=(true|false|null)\b", lambda m: "=" + {"true": "True", "false": "False", "null": "None"}[m[1]], text
    )
    return [
        {
            "name": ast.unparse(node.value.func),
            "arguments": {word.arg: ast.literal_eval(word.value) for word in node.value.keywords},
        }
        for node in ast.parse(text).body
    ]


def plain_pass(source, target, read_calls):
    "json.loads, dict surgery, json.dumps."
    with open(source, encoding="utf-8") as old, open(target, "w", encoding="utf-8") as new:
        for line in old:
            row, tools, messages = json.loads(line), [], []
            for message in row["messages"]:
                if message["functions"]: tools = json.loads(message["functions"])
                if message["role"] == "environment":
                    messages += [{"role": "tool", "content": part} for part in message["content"].split("\n")]
                    continue
                turned = {"role": message["role"], "content": message["content"] or ""}
                if message["function_calls"]:
                    turned["tool_calls"] = [
                        {"type": "function", "function": c} for c in read_calls(message["function_calls"])
                    ]
                messages.append(turned)
            texts = {
                "messages_json": json.dumps(messages, ensure_ascii=False),
                "tools_json": json.dumps(tools, ensure_ascii=False),
            }
            new.write(json.dumps(texts, ensure_ascii=False) + "\n")


def main():
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 20_000
    for name, share in (("Dolci's mix", 227_579 / 2_152_112), ("tool rows alone", 1.0)):
        compare_sides(name, count, share)


def compare_sides(name, count, share):
    "One table."
    chance = random.Random(5)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "rows.jsonl"
        with open(source, "w", encoding="utf-8") as stream:
            for number in range(count):
                row = draw_row(number, chance) if chance.random() < share else draw_chat(number, chance)
                stream.write(json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n")
        print(f"{name}: {count:,} rows, {source.stat().st_size / count / 1000:.1f} KB each")
        sides = {
            "json + pattern, unchecked": lambda: plain_pass(source, Path(folder) / "plain.jsonl", calls_by_pattern),
            "json + ast, unchecked": lambda: plain_pass(source, Path(folder) / "ast.jsonl", calls_by_ast),
            "convert_file, 1 process": lambda: convert_file(
                source, Path(folder) / "one" / "train.jsonl", num_proc=1, heldout_fraction=0.01, progress=False
            ),
            "convert_file, 2 processes": lambda: convert_file(
                source, Path(folder) / "two" / "train.jsonl", num_proc=2, heldout_fraction=0.01, progress=False
            ),
        }
        wall, core = measure(sides, count)
        compare(folder)
    base = core["json + pattern, unchecked"]
    for name, rate in wall.items():
        own = (
            f"{core[name]:>7,.0f} rows/s and core, {core[name] / base:.2f} of the plain pass"
            if "2 proc" not in name
            else ""
        )
        print(f"  {name:28} {own:46} {rate:>7,.0f} rows/s by the clock")
    one, two = "convert_file, 1 process", "convert_file, 2 processes"
    print(
        f"  two processes over one: {wall[two] / wall[one]:.2f} by the clock, {2 * core[two] / core[one]:.2f} by "
        "processor time if two idle cores share it evenly"
    )


def processor_time():
    "Seconds of this process, of its helpers' server, and of the helpers that have ended."
    return time.process_time() + sum(sum(child.cpu_times()[:4]) for child in psutil.Process().children())


def measure(sides, count):
    "Best of three: rows per second by the clock, and per second of processor time, which other work changes less."
    wall, core = {}, {}
    for _ in range(3):
        for name, run in sides.items():
            clock, used = time.perf_counter(), processor_time()
            run()
            seconds = processor_time() - used
            wall[name] = max(wall.get(name, 0), count / (time.perf_counter() - clock))
            core[name] = max(core.get(name, 0), count / seconds)
    return wall, core


def compare(folder):
    "All sides must have made the same conversations, but for the system text that only this converter mends."
    def read(*names):
        rows = (json.loads(line) for name in names for line in open(Path(folder) / name, encoding="utf-8"))
        return sorted(
            json.dumps(
                [[m for m in json.loads(row["messages_json"]) if m["role"] != "system"], json.loads(row["tools_json"])]
            )
            for row in rows
        )
    sides = [
        read("plain.jsonl"),
        read("ast.jsonl"),
        read("one/train.jsonl", "one/heldout.jsonl"),
        read("two/train.jsonl", "two/heldout.jsonl"),
    ]
    assert all(side == sides[0] for side in sides), "the sides differ"


if __name__ == "__main__":
    main()
