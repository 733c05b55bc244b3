"""Rows, files and ledgers: everything planned comes out as planned, nothing is lost, nothing half-written stays."""
import gzip
import json
import os
import random
import re
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

from proxy_sft.data import files, ledger
import pytest
import zstandard
from transformers import AutoTokenizer


from proxy_sft.data.calls import format_calls
from proxy_sft.chat.templates import render_chat
from proxy_sft.convert import convert
from proxy_sft.data.conversion import convert_file
from proxy_sft.data.ledger import row_facts
from proxy_sft.data.rows import convert_row, ConvertError, read_usual, usual_row
from proxy_sft.demo.model import write_demo_model
from proxy_sft.demo.rows import demo_plan, demo_rows
from proxy_sft.core.settings import load_settings

SHARED = Path(__file__).resolve().parents[2] / "shared"
TAGS = ("You are provided with function signatures within <functions></functions> XML tags. ",
        "Output any function calls within <function_calls></function_calls> XML tags. ")
SYSTEM = (
    "You are a helpful function-calling AI assistant. "
    + TAGS[0]
    + "You may call one or more functions. "
    + TAGS[1]
    + "Be brief."
)
TOOL = {
    "type": "function",
    "function": {
        "name": "stock.quote",
        "description": "Latest price.",
        "parameters": {
            "type": "object",
            "properties": {"symbol": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["symbol"],
        },
    },
}
CALL = 'stock.quote(symbol="AAPL")'


def shared_lines(name):
    "Rows of a file that is not part of the project; the test is skipped where it is missing."
    path = SHARED / "dolci" / name
    if not path.is_file(): pytest.skip(f"{name} is not here: it is reference data beside the project, not part of it")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def message(role, content=None, calls=None, functions=None):
    return {"role": role, "content": content, "function_calls": calls, "functions": functions}


def talk(*messages, tools=(TOOL,), system=SYSTEM):
    "A tool row around some messages; a pair is a role and its content, or `call` and its calls."
    turns = [message("assistant", None, m[1]) if m[0] == "call" else message(*m) for m in messages]
    return {"id": "t", "messages": [message("system", system, functions=json.dumps(list(tools))), *turns],
            "source_dataset": "Dolci Instruct Tool Use", "domain": "Tool Use"}


def chat(question="Hi", answer="Hello!"):
    return {
        "id": "c",
        "messages": [message("user", question), message("assistant", answer)],
        "source_dataset": "Wildchat",
        "domain": "Chat",
    }


def simple(): return talk(("user", "AAPL?"), ("call", CALL), ("environment", '{"price": 1}'), ("assistant", "It is 1."))


def messages_of(row, **options): return json.loads(convert_row(row, **options)["messages_json"])


def calls_of(messages): return [[c["function"] for c in m["tool_calls"]] for m in messages if m.get("tool_calls")]


def reason_of(row, **options):
    try: convert_row(row, **options)
    except ConvertError as error: return error.reason
    return None


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_rows(path): return [json.loads(line) for line in path.read_bytes().splitlines()]


def contents(folder): return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def demo_file(tmp_path_factory): return write_rows(tmp_path_factory.mktemp("rows") / "train.jsonl", demo_rows())


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    real = SHARED / "qwen3-8b"
    return AutoTokenizer.from_pretrained(
        real if real.is_dir() else write_demo_model(tmp_path_factory.mktemp("model"), seed=1, n=200)
    )


# One row

def test_a_row_in_the_form_of_qwen3():
    out = convert_row(simple())
    assert list(out) == ["messages_json", "tools_json"] and json.loads(out["tools_json"]) == [TOOL]
    assert json.loads(out["messages_json"]) == [
        {
            "role": "system",
            "content": "You are a helpful function-calling AI assistant. You may call one or more functions. Be brief.",
        },
        {"role": "user", "content": "AAPL?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "function": {"name": "stock.quote", "arguments": {"symbol": "AAPL"}}}],
        },
        {"role": "tool", "content": '{"price": 1}'},
        {"role": "assistant", "content": "It is 1."},
    ]


def test_real_rows_come_out_as_expected():
    for row, expected in zip(shared_lines("real_rows.jsonl"), shared_lines("real_expected.jsonl"), strict=True):
        messages, results = messages_of(row), []
        assert calls_of(messages) == expected["calls"]
        for i, m in enumerate(messages):
            if m.get("tool_calls"):
                results.append(
                    [r["content"] for r in messages[i + 1 : i + 1 + len(m["tool_calls"])] if r["role"] == "tool"]
                )
        assert results == expected["results_per_call"]
        assert "<function" not in messages[0]["content"] and "Don't make assumptions" in messages[0]["content"]


def test_berkeley_rows_come_out_as_expected_but_for_the_argued_four():
    rejected = {}
    for row, expected in zip(shared_lines("bfcl_rows.jsonl"), shared_lines("bfcl_expected.jsonl"), strict=True):
        try: out = convert_row(row)
        except ConvertError as error: rejected[row["id"]] = error.reason
        else: assert calls_of(json.loads(out["messages_json"])) == [expected["calls"]], row["id"]
        assert calls_of(messages_of(row, strictness="lenient")) == [expected["calls"]], row["id"]
    numbers = ("87-38-4", "301-131-0", "507-149-4", "737-167-8")  # the answer breaks the tool, see nbs/01_convert.ipynb
    assert rejected == {f"bfcl_live_multiple_{number}": "schema_violation" for number in numbers}


def test_everything_the_demo_plants_comes_out_as_planned(demo_file, tmp_path):
    report = convert_file(demo_file, tmp_path / "out" / "train.jsonl")
    plan = {p["id"]: p for p in demo_plan()}
    found = {
        e["id"]: ("repaired", {r["code"] for r in e["repairs"]}) for e in read_rows(tmp_path / "out" / "repaired.jsonl")
    }
    found |= {e["id"]: ("rejected", {e["reason"]}) for e in read_rows(tmp_path / "out" / "rejected.jsonl")}
    for row_id, p in plan.items():
        outcome, codes = found.get(row_id, ("kept", {p["reason"]}))
        assert outcome == p["outcome"] and (outcome == "kept" or p["reason"] in codes), (p, outcome, codes)
    flags = {p["reason"] for p in plan.values() if p["outcome"] == "kept" and p["reason"]}
    assert flags <= set(report.flags)
    assert report.rejected == Counter(p["reason"] for p in plan.values() if p["outcome"] == "rejected")


@pytest.mark.parametrize("row, reason", [
    ({"id": 1}, "no_messages"), ({"messages": []}, "no_messages"), ({"messages": "x"}, "no_messages"),
    ([], "no_messages"),
    ({"messages": ["x"]}, "bad_message"), ({"messages": [message("narrator", "x")]}, "bad_message"),
    ({"messages": [message("user", "x"), message("assistant", 3)]}, "bad_message"),
    ({"messages": [message("user", "x")]}, "no_assistant"), ({"messages": [message("assistant", "x")]}, "no_user"),
    (talk(("user", "a"), ("call", "f(x=")), "malformed_calls"),
    (talk(("user", "a"), ("call", "other(a=1)")), "undeclared_function"),
    (talk(("user", "a"), ("call", "stock.quote(symbol=1)")), "schema_violation"),
    (talk(("user", "a"), ("call", 'stock.quote("A", 1, 2, 3)')), "positional_arguments"),
    (talk(("user", "a"), ("environment", "1"), ("assistant", "b")), "count_mismatch"),
    (talk(("user", "a"), ("call", CALL), ("environment", "1"), ("environment", "2"), ("assistant", "b")),
     "count_mismatch"),
    (talk(("user", "a"), ("call", CALL), ("assistant", "b")), "count_mismatch"),
    (talk(("user", "a"), ("call", CALL), ("user", "b"), ("assistant", "c")), "count_mismatch"),
    (talk(("user", "a"), ("call", CALL + "\n" + CALL), ("environment", "oh\nno"), ("assistant", "b")),
     "unsplittable_results"),
    (talk(("user", "a"), ("assistant", None), ("user", "b"), ("assistant", "c")), "empty_answer"),
    (talk(("user", "a"), ("assistant", "so</think>b")), "stray_think"),
])
def test_defects_without_a_safe_reading_are_rejected(row, reason):
    with pytest.raises(ConvertError) as caught: convert_row(row)
    error = caught.value
    assert error.reason == reason and reason in str(error) and isinstance(error, ValueError) and len(str(error)) < 700


def test_the_error_names_the_row_and_survives_a_trip_between_processes():
    import pickle
    with pytest.raises(ConvertError) as caught: convert_row({**simple(), "messages": None})
    again = pickle.loads(pickle.dumps(caught.value))
    assert (
        caught.value.row_id == again.row_id == "t" and str(again) == str(caught.value) and again.reason == "no_messages"
    )


def test_turns_of_the_assistant_are_joined():
    row = talk(
        ("user", "a"),
        ("assistant", "Let me look."),
        ("call", CALL),
        ("environment", "1"),
        ("assistant", "x"),
        ("assistant", "y"),
    )
    messages = messages_of(row)
    assert [m["role"] for m in messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert (
        messages[2]["content"] == "Let me look."
        and len(messages[2]["tool_calls"]) == 1
        and messages[4]["content"] == "x\n\ny"
    )
    both = talk(("user", "a"), ("assistant", "Text.", CALL), ("environment", "1"), ("assistant", "b"))
    assert messages_of(both)[2]["content"] == "Text." and calls_of(messages_of(both))


def test_results_are_slices_of_the_text():
    parts = '[{"type":"text","text":"a\\nb","annotations":null,"meta":null}]'
    assert (
        messages_of(talk(("user", "a"), ("call", CALL), ("environment", parts), ("assistant", "b")))[3]["content"]
        == parts
    )
    two = talk(
        ("user", "a"), ("call", CALL + "\n" + CALL), ("environment", '{"p": 1.50}\n{"p": 1e400}'), ("assistant", "b")
    )
    assert [m["content"] for m in messages_of(two) if m["role"] == "tool"] == ['{"p": 1.50}', '{"p": 1e400}']
    cut = talk(("user", "a"), ("call", CALL), ("environment", '{"p": [1, '), ("assistant", "b"))
    assert messages_of(cut)[3]["content"] == '{"p": [1, '


@pytest.mark.parametrize("text, kept", [
    (SYSTEM, "You are a helpful function-calling AI assistant. You may call one or more functions. Be brief."),
    (TAGS[0] + TAGS[1], None), (TAGS[0].strip() + "\n" + TAGS[1].strip(), None),
    ("Today is 2024-02-21.\n\n" + TAGS[0] + "Be kind.", "Today is 2024-02-21.\n\nBe kind."),
    ("Use 3.5 apples, e.g. red ones. " + TAGS[1] + "Prices: $4.20.", "Use 3.5 apples, e.g. red ones. Prices: $4.20."),
    ("You help people.\n* be brief\n* be kind\n" + TAGS[1].strip(), "You help people.\n* be brief\n* be kind"),
    ("No tags here. Call functions when needed.", "No tags here. Call functions when needed."),
    ("Compare 1 < 2. " + TAGS[0].replace("</functions>", "...</functions>"), "Compare 1 < 2."),
    ("  Two spaces stay.  \n\n\nSo do lines.", "  Two spaces stay.  \n\n\nSo do lines."), ("", None), (None, None)])
def test_the_system_text_loses_the_sentences_about_tags_and_nothing_else(text, kept):
    first = messages_of(talk(("user", "a"), ("assistant", "b"), system=text))[0]
    assert (first["content"] if first["role"] == "system" else None) == kept


def test_chat_rows_are_kept_as_they_are():
    row = chat("What does <functions> mean? \n", " It is <b>a tag</b>.\n")
    assert convert_row(row) == {
        "messages_json": json.dumps(
            [
                {"role": "user", "content": "What does <functions> mean? \n"},
                {"role": "assistant", "content": " It is <b>a tag</b>.\n"},
            ],
            separators=(",", ":"),
        ),
        "tools_json": "[]",
    }


def test_nul_and_half_characters():
    row = talk(("user", "What\0s up \ud83d?"), ("call", CALL), ("environment", "1\0"), ("assistant", "b"))
    messages = messages_of(row)
    assert messages[1]["content"] == "Whats up \ufffd?" and messages[3]["content"] == "1"
    assert reason_of(talk(("user", "a"), ("call", r'stock.quote(symbol="\ud83d")'))) == "surrogate_in_call"
    whole = talk(("user", "a"), ("call", r'stock.quote(symbol="\ud83d\ude00")'))
    assert calls_of(messages_of(whole))[0][0]["arguments"] == {"symbol": "😀"}


def test_numbers_stay_exact():
    free = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {"x": {}}}}}
    for text in (str(2**64), str(-10**40), "0.1", "1.0", "1", "1e-07", "-0.0", "123456789012345678"):
        out = convert_row(talk(("user", "a"), ("call", f"f(x={text})"), tools=[free]))["messages_json"]
        value = json.loads(out)[-1]["tool_calls"][0]["function"]["arguments"]["x"]
        assert repr(value) == repr(json.loads(text))


def test_strictness():
    bad = talk(("user", "a"), ("assistant", "b"), ("user", "c"), ("call", "f(x="))
    assert reason_of(bad) == "malformed_calls" and [
        m["content"] for m in messages_of(bad, strictness="lenient")[1:]
    ] == ["a", "b"]
    wrong = talk(("user", "a"), ("call", "stock.quote(symbol=1)"))
    assert reason_of(wrong) == "schema_violation" and reason_of(wrong, strictness="lenient") is None
    two = talk(("user", "a"), ("assistant", "b"), ("assistant", "c"))
    assert reason_of(two) is None and reason_of(two, strictness="strict") == "two_texts"
    for row in demo_rows(300):
        assert reason_of(row, strictness="strict") or not reason_of(row), "strict keeps what default rejects"
    for row in demo_rows(300):
        assert reason_of(row) or not reason_of(row, strictness="lenient"), "default keeps what lenient rejects"


# What goes in comes back

def parse_back(text):
    "The calls that a server would read in the assistant's turns."
    turns = re.findall(r"<\|im_start\|>assistant\n(.*?)<\|im_end\|>", text, re.DOTALL)
    return [
        [json.loads(block) for block in re.findall(r"<tool_call>(.*?)</tool_call>", turn, re.DOTALL)] for turn in turns
    ]


def answers_read_back(messages, tools, tokenizer, template="nothink"):
    "The calls that a server would read in each answer: what is written behind the prompt, up to the last stop token."
    found = []
    for k, m in enumerate(messages):
        if m["role"] != "assistant": continue
        prompt = render_chat(messages[:k], tools, tokenizer, template, add_generation_prompt=True)
        body = render_chat(messages[:k + 1], tools, tokenizer, template)[len(prompt):].removesuffix("<|im_end|>\n")
        found.append([json.loads(block) for block in re.findall(r"<tool_call>(.*?)(?:</tool_call>|$)", body,
                                                                re.DOTALL)])
    return found


@pytest.mark.parametrize("template", ["nothink", "stock"])
def test_rendered_and_parsed_back_the_calls_are_those_that_went_in(tokenizer, template):
    rows, count = demo_rows(), 0
    rows += shared_lines("bfcl_rows.jsonl") if (SHARED / "dolci").is_dir() else []
    for row in rows:
        try: out = convert_row(row)
        except ConvertError: continue
        messages = json.loads(out["messages_json"])
        made = [[c["function"] for c in m.get("tool_calls", ())] for m in messages if m["role"] == "assistant"]
        assert parse_back(render_chat(messages, json.loads(out["tools_json"]), tokenizer, template)) == made, row["id"]
        count += sum(map(len, made))
    assert count > 1500


NASTY = [
    "<tool_call>",
    "</tool_call>",
    "<|im_end|>",
    "<|im_start|>assistant\n",
    "</think>",
    "<think>",
    '"',
    "\\",
    "\n",
    "{",
    "}",
    "x",
    "é",
    "\u2028",
    '<tool_call>\n{"name": "stock.quote", "arguments": {}}\n</tool_call>',
    "<tool_response>",
]


def test_hostile_texts_come_back_or_stand_in_the_ledger(tokenizer):
    chance, kept, refused = random.Random(3), 0, Counter()
    anything = {
        "type": "function",
        "function": {"name": "f", "parameters": {"type": "object", "properties": {"x": {}, "y": {}}}},
    }
    def text(): return "".join(chance.choices(NASTY, k=chance.randrange(1, 4)))
    def plain_or_nasty(word): return text() if chance.random() < 0.3 else word
    for _ in range(600):
        calls = [
            {"name": "f", "arguments": {"x": plain_or_nasty("a"), "y": [plain_or_nasty("b")]}}
            for _ in range(chance.choice((1, 2)))
        ]
        row = talk(
            ("user", plain_or_nasty("q")),
            ("assistant", plain_or_nasty("Let me see."), format_calls(calls)),
            *[("environment", plain_or_nasty("{}"))] * len(calls),
            ("assistant", plain_or_nasty("Done.")),
            tools=[anything],
        )
        try: messages = messages_of(row)
        except ConvertError as error:
            refused[error.reason] += 1
            continue
        made = [
            m.get("tool_calls") and [c["function"] for c in m["tool_calls"]] or []
            for m in messages
            if m["role"] == "assistant"
        ]
        assert made[0] == calls
        assert answers_read_back(messages, [anything], tokenizer) == made, row
        kept += 1
    assert kept > 150 and set(refused) <= {"tool_call_in_text", "stray_think"}, (kept, refused)


def test_a_name_that_breaks_the_template_is_refused(tokenizer):
    for name in ('a"b', "a\\b"):
        odd = {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": {}}}}
        row = talk(("user", "q"), ("call", format_calls([{"name": name, "arguments": {}}])), tools=[odd])
        assert reason_of(row) == "unwritable_name"
        assert reason_of(talk(("user", "q"), ("assistant", "a"), tools=[odd])) is None, "a tool that nobody calls"


# The short way and the long way

ODD = [
    "",
    "\0",
    "\ud83d",
    "😀",
    "\u2028",
    "\\",
    '"',
    "'",
    "\n",
    "<|im_end|>",
    "<tool_call>",
    "</think>",
    "<think>x</think>",
    "null",
    "\u3000",
    "[]",
    "<functions>",
    "=",
    ")",
    "(",
    ", ",
    "1e999",
    "123456789012345678901234567890",
    "007",
    "None",
    "**x",
    "# c",
    "\x1f",
    "\ufeff",
]
ANYTHING = [None, "", " ", "null", 0, 1.5, True, [], {}, "x", ["x"], 10**30]


def changed(row, chance):
    "A row with one thing changed in it, now and then beyond recognition."
    row = json.loads(json.dumps(row))
    messages, what = row["messages"], chance.random()
    one = chance.choice(messages)
    if what < 0.5:
        column = chance.choice(
            [name for name in ("content", "function_calls", "functions") if one.get(name)] or ["content"]
        )
        text, at = str(one.get(column) or ""), chance.randrange(1 + len(str(one.get(column) or "")))
        one[column] = text[:at] + chance.choice(ODD) + text[at + chance.choice((0, 0, 1, 5)):]
    elif what < 0.6: messages.remove(one)
    elif what < 0.7: messages.insert(chance.randrange(len(messages)), one)
    elif what < 0.8:
        one["role"] = chance.choice(["system", "user", "assistant", "environment", "tool", "narrator", None, ["user"]])
    elif what < 0.93:
        one[chance.choice(["role", "content", "function_calls", "functions", "extra"])] = chance.choice(ANYTHING)
    else:
        row[chance.choice(["id", "source_dataset", "dataset_source", "domain", "extra", "messages"])] = chance.choice(
            ANYTHING + [2**63, 1.0, "\ud83d"]
        )
    return row


@pytest.mark.parametrize("strictness", ["strict", "default", "lenient"])
def test_the_short_way_and_the_long_way_agree(tmp_path, strictness):
    "A file's rows are read the short way where that is possible, a single row never is: both must say the same."
    chance, rows = random.Random(11), demo_rows(600)
    rows += [
        changed(chance.choice(rows), chance) for _ in range(900 if not os.environ.get("PROXY_SFT_SOAK") else 20_000)
    ]
    source, out = write_rows(tmp_path / "in.jsonl", rows), tmp_path / "out"
    report = convert_file(source, out / "train.jsonl", strictness=strictness)
    kept = dict(zip(row_facts(out / "train.jsonl")["line"].to_pylist(), read_rows(out / "train.jsonl"), strict=True))
    rejected = {entry["line"]: (entry["reason"], entry["message"]) for entry in read_rows(out / "rejected.jsonl")}
    assert len(kept) + len(rejected) == len(rows) == report.rows and min(len(kept), len(rejected)) > 300
    for line, row in enumerate(rows, 1):
        try: assert kept.get(line) == convert_row(row, strictness=strictness), (line, row)
        except ConvertError as error: assert rejected.get(line) == (error.reason, error.found[:200]), (line, row)
    lines = [line for line in source.read_bytes().splitlines() if b"extra" not in line and b"narrator" not in line]
    short = sum(read_usual(usual_row(line), strictness) is not None for line in lines[:500])
    assert short > 300, "the short way is hardly ever taken"


def test_rows_of_a_strange_shape_are_one_row_s_fault(tmp_path):
    strange = [
        {**chat(), "messages": [message(["user"], "x"), message("assistant", "y")]},
        {**chat(), "messages": [message({}, "x")]},
        {**chat("odd"), "source_dataset": "half \ud83d", "messages": [3]},
    ]
    nothing = {
        **chat("none"),
        "messages": [{**m, "functions": [], "function_calls": []} for m in chat("none")["messages"]],
    }
    report = convert_file(
        write_rows(tmp_path / "in.jsonl", [*strange, nothing, {**chat("7"), "id": 7}, {**chat("big"), "id": 2**70}]),
        tmp_path / "out" / "train.jsonl",
    )
    assert (report.kept, report.rejected) == (3, {"bad_message": 3}) and "half ?" in report.by_source
    assert row_facts(tmp_path / "out" / "train.jsonl")["id"].to_pylist() == ["c", "7", str(2**70)]


def test_an_integer_that_json_cannot_carry_is_one_row_s_fault(tmp_path):
    free = {
        "type": "function",
        "function": {"name": "f", "parameters": {"type": "object", "properties": {"x": {}, "y": {"type": "string"}}}},
    }
    rows = [
        talk(("user", "a"), ("call", f"f({text})"), tools=[free])
        for text in (
            "x=" + "9" * 4299,
            "x=" + "9" * 5000,
            "x=[{'a': 0x" + "f" * 4000 + "}]",
            "y=" + "9" * 5000,
            "y='" + "9" * 5000 + "'",
        )
    ]
    report = convert_file(write_rows(tmp_path / "in.jsonl", rows), tmp_path / "out" / "train.jsonl")
    assert (report.kept, report.rejected) == (2, {"malformed_calls": 3})


# Files

def test_rows_in_are_rows_kept_and_rows_rejected(demo_file, tmp_path):
    report = convert_file(demo_file, tmp_path / "train.jsonl", heldout_fraction=0.1)
    written = {name: len(read_rows(tmp_path / f"{name}.jsonl")) for name in ("train", "heldout", "rejected")}
    assert report.rows == len(demo_rows()) == report.kept + sum(report.rejected.values())
    assert written["train"] + written["heldout"] == report.kept and written["rejected"] == sum(report.rejected.values())
    assert {tuple(row) for row in read_rows(tmp_path / "train.jsonl")} == {("messages_json", "tools_json")}
    by_source = json.loads((tmp_path / "report.json").read_text())["by_source"]
    assert sum(s["rows"] for s in by_source.values()) == report.rows
    assert "count_mismatch" in repr(report) and "<table>" in report._repr_html_()
    entry = read_rows(tmp_path / "rejected.jsonl")[0]
    assert {"id", "line", "source", "reason", "message", "excerpt"} <= entry.keys()
    assert read_rows(demo_file)[entry["line"] - 1]["id"] == entry["id"]


def test_same_bytes_for_any_number_of_processes(demo_file, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "BLOCK_BYTES", 100_000)  # many parts
    monkeypatch.setattr(files, "SMALL", 0)  # not too small for several processes
    for num_proc in (1, 3):
        convert_file(
            demo_file,
            tmp_path / str(num_proc) / "train.jsonl",
            heldout_fraction=0.1,
            drop_duplicates=True,
            num_proc=num_proc,
        )
    assert contents(tmp_path / "1") == contents(tmp_path / "3")


def test_a_script_without_a_guard_is_not_run_again_by_its_processes(tmp_path):
    source, script = write_rows(tmp_path / "in.jsonl", demo_rows(200)), tmp_path / "script.py"
    script.write_text(
        "import proxy_sft.data.conversion as c, proxy_sft.data.files as s\nprint('begin')\ns.SMALL, s.BLOCK_BYTES = 0, "
        "100_000\n"
        f"print(c.convert_file({str(source)!r}, {str(tmp_path / 'out' / 'train.jsonl')!r}, num_proc=2).rows)\n"
    )
    for options in ({"args": [sys.executable, str(script)]}, {"args": [sys.executable, "-"], "stdin": script.open()}):
        run = subprocess.run(**options, capture_output=True, text=True, timeout=900)
        assert (run.returncode, run.stdout.split()) == (0, ["begin", "200"]), run.stderr[-2000:]


def test_inputs_of_all_kinds_give_the_same_rows(tmp_path):
    import pyarrow
    import pyarrow.parquet
    rows = demo_rows(200)
    text = "".join(json.dumps(row) + "\n" for row in rows if "\ud83d" not in json.dumps(row, ensure_ascii=False))
    rows = [json.loads(line) for line in text.splitlines()]
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.jsonl").write_text(text)
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    (folder / "c.jsonl.zst").write_bytes(zstandard.compress(text.encode()))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "d.parquet", row_group_size=70)
    made = {}
    for path in sorted(folder.iterdir()):
        report = convert_file(path, tmp_path / path.name / "train.jsonl")
        made[path.name] = [
            contents(tmp_path / path.name)[name] for name in ("train.jsonl", "rejected.jsonl", "repaired.jsonl")
        ]
        assert report.rows == len(rows)
    assert all(files == made["a.jsonl"] for files in made.values())
    several = convert_file(sorted(folder.iterdir())[:2], tmp_path / "two" / "train.jsonl")
    all_of_them = convert_file(folder, tmp_path / "all" / "train.jsonl")
    assert (several.rows, all_of_them.rows) == (2 * len(rows), 4 * len(rows))


def test_the_held_out_part_follows_content_and_seed(demo_file, tmp_path):
    lines = demo_file.read_text().splitlines(True)
    random.Random(1).shuffle(lines)
    (tmp_path / "turned.jsonl").write_text("".join(lines))
    def heldout(source, name, **options):
        convert_file(source, tmp_path / name / "train.jsonl", heldout_fraction=0.2, **options)
        held, train = ((tmp_path / name / f"{side}.jsonl").read_text().splitlines() for side in ("heldout", "train"))
        assert not set(held) & set(train), "a duplicate on both sides"
        assert 0.12 < len(held) / (len(held) + len(train)) < 0.28
        return sorted(held)
    assert heldout(demo_file, "a") == heldout(tmp_path / "turned.jsonl", "b") != heldout(demo_file, "c", split_seed=7)


def declared(path): return [{t["function"]["name"] for t in json.loads(row["tools_json"])} for row in read_rows(path)]


def test_some_tools_are_never_seen_in_training(demo_file, tmp_path):
    lines, out = demo_file.read_text().splitlines(True), tmp_path / "out"
    random.Random(1).shuffle(lines)
    (tmp_path / "turned.jsonl").write_text("".join(lines))
    def run(source, **options):
        report = convert_file(source, out / "train.jsonl", **options)
        train, held = declared(out / "train.jsonl"), declared(out / "heldout.jsonl")
        names = set(report.facts["unseen_tools"])
        assert names and not any(names & row for row in train) and names <= set().union(*held)
        return report, names, train, held
    report, names, train, held = run(
        demo_file, heldout_tools=["taxi.order", "parcels.track", "no.such"], heldout_fraction=0.1
    )
    assert names == {"taxi.order", "parcels.track"} and len(held) > sum(bool(names & row) for row in held) >= 12
    assert "2 tools in held-out rows only" in repr(report) and "no row that is kept: no.such" in repr(report)
    split = json.loads((out / "report.json").read_text())["split"]
    assert (split["split_seed"], split["heldout_fraction"], split["heldout_tools"]) == (
        42,
        0.1,
        ["taxi.order", "parcels.track", "no.such"],
    )
    by_share = run(demo_file, heldout_tools=0.15)
    assert all(by_share[1] & row for row in by_share[3]), "without a fraction, only rows with such tools are held out"
    assert 0 < len(by_share[1]) < len(set().union(*by_share[2], *by_share[3])) / 2
    assert (
        run(tmp_path / "turned.jsonl", heldout_tools=0.15)[1]
        == by_share[1]
        != run(demo_file, heldout_tools=0.15, split_seed=7)[1]
    )
    for wrong in (1.0, -0.1, "taxi.order"):
        with pytest.raises(ConvertError, match="heldout_tools"):
            convert_file(demo_file, out / "train.jsonl", heldout_tools=wrong)


def test_a_repetition_never_crosses_from_one_side_to_the_other(tmp_path):
    rows = [
        {**talk(("user", f"q{i}"), ("call", CALL), ("environment", "1"), ("assistant", "a")), "id": str(i)}
        for i in range(60)
    ]
    other = json.loads(json.dumps(rows[0]["messages"][0]).replace("stock.quote", "taxi.order"))
    rows += [{**chat(f"q{i}"), "id": f"c{i}"} for i in range(60)] + [
        {**row, "id": row["id"] + "t", "messages": [other, row["messages"][1], message("assistant", "a")]}
        for row in rows[:20]
    ]
    again = [{**row, "id": "again " + row["id"], "source_dataset": "elsewhere"} for row in reversed(rows)]
    source = write_rows(tmp_path / "in.jsonl", rows + again)
    for options in ({}, {"heldout_tools": ["taxi.order"]}, {"heldout_tools": 0.5}):
        convert_file(source, tmp_path / "out" / "train.jsonl", heldout_fraction=0.3, **options)
        held, train = (
            Counter(map(str, read_rows(tmp_path / "out" / f"{side}.jsonl"))) for side in ("heldout", "train")
        )
        assert not set(held) & set(train) and set(held.values()) == set(train.values()) == {2}, options


def test_beside_every_converted_file_stands_who_its_rows_were(demo_file, tmp_path, monkeypatch):
    monkeypatch.setattr(ledger, "GROUP_ROWS", 500)  # several groups
    source, out = read_rows(demo_file), tmp_path / "out"
    convert_file(demo_file, out / "train.jsonl", heldout_fraction=0.2, drop_duplicates=True, tool_chat_ratio=4.0)
    repairs = {e["line"]: sorted({r["code"] for r in e["repairs"]}) for e in read_rows(out / "repaired.jsonl")}
    for side in ("train", "heldout"):
        rows, facts = read_rows(out / f"{side}.jsonl"), row_facts(out / f"{side}.jsonl").to_pylist()
        assert len(rows) == len(facts) > 200 and list(facts[0]) == ["id", "source", "line", "calls", "repairs"]
        for row, fact in zip(rows, facts):
            origin = source[fact["line"] - 1]
            assert convert_row(origin) == row and (fact["id"], fact["source"]) == (
                origin["id"],
                origin["source_dataset"],
            )
            assert fact["calls"] == sum(map(len, calls_of(json.loads(row["messages_json"])))), fact
            assert fact["repairs"] == repairs.get(fact["line"], []), fact


def test_facts_of_another_file_are_refused(tmp_path):
    source = write_rows(tmp_path / "in.jsonl", [{**simple(), "id": i} for i in (7, None, "half \ud83d")])
    target = tmp_path / "out" / "mine.jsonl"
    convert_file(source, target)
    assert row_facts(target)["id"].to_pylist() == ["7", None, "half ?"] and not list(tmp_path.glob("out/heldout*"))
    target.write_text(target.read_text().split("\n")[0] + "\n")
    with pytest.raises(ConvertError, match="3 rows in .* has 1 in"): row_facts(target)
    (target.parent / "mine.rows.parquet").write_bytes(b"no parquet at all")
    with pytest.raises(ConvertError, match="mine.rows.parquet: .* convert it anew"): row_facts(target)
    (target.parent / "mine.rows.parquet").unlink()
    with pytest.raises(ConvertError, match="there is no .*mine.rows.parquet.*01_convert"): row_facts(target)
    with pytest.raises(ConvertError, match="there is no .*none.jsonl"): row_facts(target.parent / "none.jsonl")


def test_choices_of_rows(tmp_path):
    tool_rows = [talk(("user", f"q{i}"), ("assistant", "a")) for i in range(10)]
    chat_rows = [chat(f"q{i}") for i in range(30)]
    source = write_rows(tmp_path / "in.jsonl", tool_rows + chat_rows + tool_rows[:3])
    def run(**options): return convert_file(source, tmp_path / "out" / "train.jsonl", **options)
    assert (run().kept, run().rejected) == (43, {})
    assert (run(tool_rows_only=True).kept, sum(run(tool_rows_only=True).rejected.values())) == (13, 30)
    assert run(include_sources=["Wildchat"]).kept == 30 and run(exclude_sources=["Wildchat"]).kept == 13
    assert run(drop_duplicates=True).kept == 40 and sum(run(drop_duplicates=True).rejected.values()) == 3
    mixed = run(drop_duplicates=True, tool_chat_ratio=0.5)
    assert mixed.kept == 30 and mixed.rows == 43 == mixed.kept + sum(mixed.rejected.values())
    assert {tuple(row) for row in read_rows(tmp_path / "out" / "train.jsonl")} == {("messages_json", "tools_json")}
    assert (
        len(read_rows(tmp_path / "out" / "train.jsonl")) == 30
        and len(read_rows(tmp_path / "out" / "rejected.jsonl")) == 13
    )


# Bad input: one clear error, nothing half-written

def make_bad(folder):
    good = json.dumps(simple()) + "\n"
    (folder / "empty.jsonl").write_text("")
    (folder / "blank.jsonl").write_text("\n \n")
    (folder / "cut.jsonl").write_text(good + '{"id": "b", "mess')
    (folder / "prose.jsonl").write_text(good + "hello\n" + good)
    (folder / "list.jsonl").write_text("[1, 2]\n")
    (folder / "other.jsonl").write_text('{"text": "no conversation"}\n' * 3)
    (folder / "bad.jsonl.gz").write_bytes(b"no gzip at all")
    (folder / "short.jsonl.gz").write_bytes(gzip.compress(good.encode() * 999)[:-20])
    (folder / "bad.jsonl.zst").write_bytes(b"no zstd at all")
    (folder / "bad.parquet").write_bytes(b"no parquet at all")
    (folder / "none").mkdir()


@pytest.mark.parametrize("name, words", [
    ("missing.jsonl", "00_download"), ("missing.jsonl", "-p profile demo"), ("empty.jsonl", "is empty"),
    ("blank.jsonl", "no rows"),
    ("cut.jsonl", "line 2"), ("prose.jsonl", "line 2"), ("prose.jsonl", "hello"), ("list.jsonl", "line 1"),
    ("other.jsonl", "no_messages"),
    ("bad.jsonl.gz", "bad.jsonl.gz"), ("short.jsonl.gz", "short.jsonl.gz"), ("bad.jsonl.zst", "bad.jsonl.zst"),
    ("bad.parquet", "bad.parquet"),
    ("none", "none")])
def test_files_that_cannot_be_used(tmp_path, name, words):
    make_bad(tmp_path)
    with pytest.raises(ConvertError) as caught: convert_file(tmp_path / name, tmp_path / "out" / "train.jsonl")
    assert words in str(caught.value) and name in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_a_fault_in_another_process_is_told_as_well(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "SMALL", 0)
    good = json.dumps(simple()) + "\n"
    (tmp_path / "in.jsonl").write_text(good * 2_000 + "oh no\n" + good * 500)
    with pytest.raises(ConvertError, match="line 2001"):
        convert_file(tmp_path / "in.jsonl", tmp_path / "out" / "train.jsonl", num_proc=2)
    assert not list((tmp_path / "out").glob("*")) and not list((tmp_path / "out").glob(".*"))


def test_of_several_faults_the_first_is_told_whoever_meets_it(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "SMALL", 0)
    monkeypatch.setattr(files, "BLOCK_BYTES", 20_000)
    lines = [json.dumps(simple()) + "\n"] * 2_000
    for bad in range(100, 2_000, 60): lines[bad] = f"oh no {bad}\n"
    (tmp_path / "in.jsonl").write_text("".join(lines))
    for num_proc in (1, 2, 3):
        with pytest.raises(ConvertError, match="line 101: .*oh no 100"):
            convert_file(tmp_path / "in.jsonl", tmp_path / "out" / "train.jsonl", num_proc=num_proc)
        assert not list((tmp_path / "out").glob("*")) and not list((tmp_path / "out").glob(".*"))


def test_a_bad_row_before_a_damaged_place_is_told_first(tmp_path, monkeypatch):
    "Parts are read ahead of where they are converted: what is met first in time is not what comes first in the file."
    monkeypatch.setattr(files, "SMALL", 0)
    monkeypatch.setattr(files, "BLOCK_BYTES", 20_000)
    lines = [json.dumps(chat(str(random.Random(i).random()))) + "\n" for i in range(3_000)]
    lines[900] = "oh no\n"
    (tmp_path / "in.jsonl.gz").write_bytes(gzip.compress("".join(lines).encode())[:-5_000])
    for num_proc in (1, 2, 3):
        with pytest.raises(ConvertError, match="line 901"):
            convert_file(tmp_path / "in.jsonl.gz", tmp_path / "out" / "train.jsonl", num_proc=num_proc)
        assert not list((tmp_path / "out").glob("*")) and not list((tmp_path / "out").glob(".*"))


def test_a_helper_that_dies_is_told(tmp_path, monkeypatch):
    import psutil
    monkeypatch.setattr(files, "BLOCK_BYTES", 20_000)
    source = write_rows(tmp_path / "in.jsonl", [chat(str(i)) for i in range(3_000)])
    (tmp_path / "aside").mkdir()
    pieces = files.converted_parts(files.parts_of([source]), ledger.Choices(), 2, tmp_path / "aside")
    before = set(psutil.Process().children(recursive=True))
    next(pieces)
    (helper,) = (
        p
        for p in set(psutil.Process().children(recursive=True)) - before
        if "forkserver" in " ".join(p.cmdline()) and p.ppid() != os.getpid()
    )
    helper.kill()
    with pytest.raises(ConvertError, match="process_died"): list(pieces)


def test_a_cut_zstd_file_is_not_a_shorter_one(tmp_path):
    "Cut behind a block that ends with a line, every row that is left is whole."
    writer, lines = (
        zstandard.ZstdCompressor().compressobj(),
        [json.dumps(chat(str(i))).encode() + b"\n" for i in range(300)],
    )
    pieces = [writer.compress(line) + writer.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK) for line in lines]
    path, out, end = tmp_path / "in.jsonl.zst", tmp_path / "out" / "train.jsonl", writer.flush()
    for left in (pieces[:1], pieces[:200], pieces):
        path.write_bytes(b"".join(left))
        with pytest.raises(ConvertError, match="inside a zstd frame"): convert_file(path, out)
    path.write_bytes((b"".join(pieces) + end) * 2 + zstandard.compress(b"".join(lines)))
    assert convert_file(path, out).kept == 900
    path.write_bytes(b"".join(pieces) + end + b"no frame")
    with pytest.raises(ConvertError, match="in.jsonl.zst"): convert_file(path, out)


def test_a_folder_that_cannot_be_written(tmp_path):
    source = write_rows(tmp_path / "in.jsonl", [simple()])
    with pytest.raises(ConvertError, match="cannot write"): convert_file(source, source / "below" / "train.jsonl")
    with pytest.raises(ConvertError, match="overwrite|overwritten"): convert_file(source, source)
    assert read_rows(source) == [simple()]


def test_a_row_that_fails_leaves_the_old_files_alone(tmp_path):
    good, bad = write_rows(tmp_path / "a.jsonl", [simple()]), write_rows(tmp_path / "b.jsonl", [{"text": "x"}])
    convert_file(good, tmp_path / "out" / "train.jsonl")
    before = contents(tmp_path / "out")
    with pytest.raises(ConvertError): convert_file(bad, tmp_path / "out" / "train.jsonl")
    assert contents(tmp_path / "out") == before


def test_a_killed_run_leaves_nothing_that_looks_finished(tmp_path):
    source = write_rows(tmp_path / "in.jsonl", demo_rows(400) * 8)
    # The system ends it in the middle of a write, as abruptly as kill -9: a file may have 100,000 bytes, and the signal
    # for more is not ignored, as Python would have it.
    code = (
        "import resource as r, signal; from proxy_sft.data.conversion import convert_file\n"
        "r.setrlimit(r.RLIMIT_CORE, (0, 0)); r.setrlimit(r.RLIMIT_FSIZE, (100_000, 100_000)); "
        "signal.signal(signal.SIGXFSZ, signal.SIG_DFL)\n"
        f"convert_file({str(source)!r}, {str(tmp_path / 'out' / 'train.jsonl')!r})"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == -signal.SIGXFSZ and [p.stat().st_size for p in tmp_path.glob("out/.*/train.jsonl")] == [
        100_000
    ], run.stderr
    assert not list((tmp_path / "out").glob("*.json*")), "a file that looks finished"
    report = convert_file(source, tmp_path / "out" / "train.jsonl")
    assert report.rows == 3200 and not list((tmp_path / "out").glob(".*")), "what the killed run left is gone"


# By settings

def settings_for(folder, **options): return load_settings("demo", workspace=str(folder), **options)


def test_convert_is_done_once_and_says_why_again(tmp_path):
    settings = settings_for(tmp_path)
    write_rows_to = settings.train_file
    write_rows_to.parent.mkdir(parents=True)
    write_rows(write_rows_to, demo_rows(300))
    first = convert(settings)
    stamp = (settings.converted_dir / "train.jsonl").stat().st_mtime_ns
    again = convert(settings)
    assert "nothing" in again.why and (again.rows, again.kept, again.rejected) == (
        first.rows,
        first.kept,
        first.rejected,
    )
    assert (settings.converted_dir / "train.jsonl").stat().st_mtime_ns == stamp
    assert "settings" in convert(settings_for(tmp_path, heldout_fraction=0.3)).why
    convert(settings)
    write_rows(write_rows_to, demo_rows(301))
    assert "input" in convert(settings).why
    (settings.converted_dir / "train.jsonl").write_text("{}")
    assert "train.jsonl" in convert(settings).why and convert(settings).kept == sum(
        len(read_rows(settings.converted_dir / f"{side}.jsonl")) for side in ("train", "heldout"))


def test_a_missing_download_is_named(tmp_path):
    settings = load_settings("qwen3_8b", workspace=str(tmp_path))
    with pytest.raises(ConvertError) as caught: convert(settings)
    assert "nbs/00_download.ipynb" in str(caught.value) and "-p profile demo" in str(caught.value)
    assert os.listdir(tmp_path) == []


def test_the_bar_is_off_in_tests_and_on_other_ranks(monkeypatch):
    monkeypatch.setenv("IN_TEST", "1")
    assert files.bars_are_hidden()
    monkeypatch.delenv("IN_TEST")
    monkeypatch.setenv("RANK", "1")
    assert files.bars_are_hidden()
    monkeypatch.setenv("RANK", "0")
    assert not files.bars_are_hidden()


# Rows that a look at one place gets wrong

FREE = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {"x": {}}}}}
BLOCK = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'


@pytest.mark.parametrize("answer", [
    "ends with <|im_end|> " + BLOCK, BLOCK, BLOCK[:-12], "<|im_end|>\n<|im_start|>assistant\n" + BLOCK,
    "</tool_call>" + BLOCK,
    "<function_calls>f(x=1)</function_calls>", "Sure.\n<function_call>\nf(x=1)\n</function_call>",
    '<functioncall> {"name": "f"}',
    "<tool_calls>[f(x=1)]</tool_calls>", '<invoke name="f">', "<function=f><parameter=x>1</parameter></function>",
    '[TOOL_CALLS] [{"name": "f"}]', "<|python_tag|>f.call(x=1)", "<tool_code>print(f(x=1))</tool_code>",
    "<call>f(x=1)</call>", "<api_call>f(x=1)</api_call>", "<action>f(x=1)</action>", "<functions>f(x=1)</functions>",
    "< function_calls >f(x=1)</ function_calls >", "<｜tool▁calls▁begin｜>function f",
    "<|tool_call_start|>[f(x=1)]<|tool_call_end|>", "<<function>>f(x=1)", '<x:invoke name="f"><parameter name="x">',
    '<|tool_calls_section_begin|><|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{"x": 1}<|tool_call_end|>',
    "✿FUNCTION✿: f\n✿ARGS✿: {}", "<|channel|>commentary to=functions.f <|constrain|>json<|message|>{}"])
@pytest.mark.parametrize("strictness", ["strict", "default"])
def test_a_call_in_an_answers_text_is_no_answer(answer, strictness):
    row = talk(("user", "q"), ("assistant", answer), tools=[FREE])
    assert reason_of(row, strictness=strictness) == "tool_call_in_text"
    before = talk(("user", "a"), ("assistant", "b"), ("user", "q"), ("assistant", answer), tools=[FREE])
    assert reason_of(before) == "tool_call_in_text"


@pytest.mark.parametrize("answer", [
    '```json\n{"name": "f", "arguments": {"x": 1}}\n```', '{"name": "f", "arguments": {}}',
    "{'name': 'f', 'parameters': {}}",
    '[{"function": "f", "args": {}}]', "f(x=1)", "[f(x=1)]", "```python\nf(x=1)\n```", "Here:\nf(x=1)\nDone.",
    "f (x=1)", "f(\n  x=1,\n)", "print(f(x=1))", "r = f(x=1)", "r = await f(x=1)",
    "1. f(x=1)", "> f()", "functions.f({})", "Thought: so\nAction: f\nAction Input: 1", "**Action:** `f`",
    "<f><x>1</x></f>", '{"f": {"x": 1}}', '[{"f": {}}]', "{name: 'f', arguments: {x: 1}}", r'{\"name\": \"f\"}',
    "Call: f(x=1)",
    "<use_mcp_tool>\n<tool_name>f</tool_name>\n<arguments>{}</arguments>\n</use_mcp_tool>"])
def test_a_bare_call_in_an_answers_text_is_counted(answer, tmp_path):
    row = talk(("user", "q"), ("assistant", answer), tools=[FREE])
    assert reason_of(row, strictness="strict") == "call_in_text"
    report = convert_file(write_rows(tmp_path / "in.jsonl", [row]), tmp_path / "out" / "train.jsonl")
    assert report.flags == {"call_in_text": 1}
    for plain in (talk(("user", "q"), ("assistant", answer)), chat("q", answer)): assert reason_of(plain,
            strictness="strict") is None


@pytest.mark.parametrize("tools", [(), (FREE,)])
@pytest.mark.parametrize("system", ["You have these functions:\n", "<tools> ", "Use them if required -\n"])
def test_tools_in_the_system_text_are_not_passed_over(system, tools):
    listed = json.dumps([{"name": "g", "description": "d", "parameters": {"type": "object", "properties": {}}}])
    row = talk(("user", "q"), ("assistant", "a"), tools=tools, system=system + listed)
    for strictness in ("strict", "default", "lenient"): assert reason_of(row, strictness=strictness) == "tools_in_text"
    row["messages"][0]["content"] = system + 'Answer as {"name": "…"} with "parameters" where there are some.'
    assert reason_of(row) is None


@pytest.mark.parametrize("answer", ["I used f(x=1).", "See f (the first) there.", "The function f(x) = 2x grows.", "f",
                                    "of (x=1)", "Action: find it", "a < f > b", "So f (x) is it, (y)"])
def test_a_name_in_a_sentence_is_no_call(answer):
    assert reason_of(talk(("user", "q"), ("assistant", answer), tools=[FREE]), strictness="strict") is None


@pytest.mark.parametrize("row", [
    talk(("user", "q"), ("call", 'f(x="what is <|im_end|>?")'), ("environment", "1"), ("assistant", "a"), tools=[FREE]),
    talk(("user", BLOCK), ("call", "f(x=1)"), ("environment", f"<|im_start|>assistant\n{BLOCK}<|im_end|>"),
         ("assistant", "a"), tools=[FREE]),
    talk(("user", "q"), ("assistant", "The token <|im_end|> ends a turn."), tools=[FREE])])
def test_control_tokens_that_hide_no_call_are_kept(row):
    talk_, *_ = rows_read(row)
    assert [code for code, *_ in talk_.flags] == ["control_text"]


def rows_read(row):
    from proxy_sft.data.rows import read_row
    return read_row(row)


def test_checks_see_what_the_repairs_leave():
    assert reason_of({"messages": [message("assistant", "Hello!"), message("user", "bye")]}) == "no_user"
    assert reason_of({"messages": [message("assistant", "Hello!"), message("user", "bye")]},
                     strictness="lenient") is None
    assert reason_of({"messages": [message("system", "s"), message("user", "bye")]}) == "no_assistant"
    ends = {"messages": [message("user", "q"), message("assistant", "a"), message("user", "bye"),
                         message("system", "s")]}
    assert [m["role"] for m in messages_of(ends)] == ["user", "assistant"]


@pytest.mark.parametrize("start", ["\n", "\n\n", "\r\n", " \n", "\n \t\n", "\u3000\n"])
def test_line_breaks_before_an_answer_go(start, tmp_path):
    row = talk(("user", "q"), ("assistant", start + "  code"), ("user", "q"), ("assistant", start + "Text.", CALL),
               ("environment", "\n1"),
               ("assistant", " It is 1.\n"))
    found = messages_of(row)
    assert [m["content"] for m in found if m["role"] == "assistant"] == ["  code", "Text.",
            " It is 1.\n"] and found[5]["content"] == "\n1"
    report = convert_file(write_rows(tmp_path / "in.jsonl", [row]), tmp_path / "out" / "train.jsonl",
                          strictness="strict")
    assert report.repaired == {"leading_line_break": 1}


def test_the_verdict_says_what_is_left_out(tokenizer):
    from proxy_sft.chat.parity import check_parity
    made = convert_row(chat("q", "a"))
    odd = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "\na"},
                        {"role": "user", "content": "r"},
                        {"role": "assistant", "content": "b"}]}
    assert "left out" not in check_parity([made], tokenizer).verdict
    verdict = check_parity([made, odd], tokenizer).verdict
    assert "2 of 2 supervised turns" in verdict and "1 more turns are left out" in verdict


# Lines that Python's readers of JSON refuse, and keys that stand twice

@pytest.mark.parametrize("extra", ['"meta": ' + "[" * 3_000 + "]" * 3_000,
                                   '"meta": ' + '{"a":' * 3_000 + "1" + "}" * 3_000, '"n": ' + "9" * 5_000])
@pytest.mark.parametrize("place", ["row", "message"])
def test_a_row_that_cannot_be_read_is_that_rows_fault(tmp_path, extra, place):
    good = json.dumps(simple())
    bad = good[:-1] + ", " + extra + "}" if place == "row" else good.replace('{"role": "user"',
            "{" + extra + ', "role": "user"')
    long_id = good.replace('"id": "t"', '"id": ' + "7" * 5_000)
    (tmp_path / "in.jsonl").write_text("\n".join([good, bad, long_id, good]) + "\n")
    report = convert_file(tmp_path / "in.jsonl", tmp_path / "out" / "train.jsonl")
    assert (report.rows, report.kept, report.rejected) == (4, 2, {"unreadable_row": 2})
    assert [entry["line"] for entry in read_rows(tmp_path / "out" / "rejected.jsonl")] == [2, 3]
    (tmp_path / "in.jsonl").write_text(good + "\n" + '{"n": ' + "9" * 5_000 + ', "messages": [')
    with pytest.raises(ConvertError, match="line 2.*cut off"): convert_file(tmp_path / "in.jsonl",
            tmp_path / "out" / "train.jsonl")


TWICE = [
    ('"id": "t"', '"id": "s", "id": "t"'),
    ('"role": "user"', '"role": "system", "role": "user"'),
    ('"content": "AAPL?"', '"content": "x", "content": "AAPL?"'),
    ('"messages": [', '"messages": [], "messages": ['),
    ('"source_dataset"', '"source_dataset": "a", "source_dataset"'),
    ('\\"name\\": \\"stock.quote\\"', '\\"name\\": \\"x\\", \\"name\\": \\"stock.quote\\"'),
    ('\\"symbol\\": {', '\\"symbol\\": {\\"type\\": \\"integer\\"}, \\"symbol\\": {'),
    ('"id": "t"', '"meta": {"a": 1, "a": 2}, "id": "t"'),
    ('"id": "t"', '"id" : "s", "id": "t"'),
    ('"id": "t"', '"id": "s", "id" \t: "t"'),
    ('"function_calls": null, "functions": null}', '"function_calls": null, "functions": null, "functions": null}'),
    ('"id": "t"', r'"id": "s", "\u0069\u0064": "t"'),
    ('"id": "t"', r'"meta": {"a": 2, "a": "b\u003a"}, "id": "t"'),
    ('\\"symbol\\": {', r'\"symbol\": {\"title\": \"a\", \"title\": \"b\\u003A\", '),
]


@pytest.mark.parametrize("old, new", TWICE)
@pytest.mark.parametrize("spaced", [False, True])
def test_keys_that_stand_twice_are_counted(tmp_path, old, new, spaced):
    good = json.dumps(simple())
    bad = good.replace(old, new, 1)
    assert bad != good
    if spaced: good, bad = (re.sub(r'(?<!\\\\)":', '" :', line) for line in (good, bad))
    (tmp_path / "in.jsonl").write_text("\n".join([good] * 30 + [bad] + [good] * 30) + "\n")
    for num_proc in (1, 2):
        report = convert_file(tmp_path / "in.jsonl", tmp_path / "out" / "train.jsonl", num_proc=num_proc)
        assert (report.kept, report.flags) == (61, {"duplicate_keys": 1})
    with pytest.raises(ConvertError, match="duplicate_keys 1"):
        (tmp_path / "in.jsonl").write_text(bad + "\n")
        convert_file(tmp_path / "in.jsonl", tmp_path / "out" / "train.jsonl", strictness="strict")


def test_keys_that_stand_twice_are_counted_beside_texts_that_look_like_keys(tmp_path):
    good = [json.dumps(chat(text, f'"{text}" : b')) for text in (" a", ": a", "a", "\\", '"', "a :") for _ in range(9)]
    bad = json.dumps(chat("a", "b")).replace('"role": "user"', '"role": "system", "role": "user"')
    (tmp_path / "in.jsonl").write_text("\n".join([*good, bad, *good]) + "\n")
    report = convert_file(tmp_path / "in.jsonl", tmp_path / "out" / "train.jsonl")
    assert (report.kept, report.flags) == (109, {"duplicate_keys": 1})


def test_a_line_holds_one_object(tmp_path):
    row = json.dumps(chat("q", "a"))
    split = row.replace('"messages": [', '"messages":\n[')
    for line, text in ((1, f"{row} {row}\n{split}\n"), (2, f"{row}\n{row}{row}\n{split}\n"), (2, f"{row}\n{split}")):
        (tmp_path / "in.jsonl").write_text(text)
        with pytest.raises(ConvertError, match=f"line {line}: found no JSON"):
            convert_file(tmp_path / "in.jsonl", tmp_path / "out" / "train.jsonl")


def test_keys_that_stand_twice_are_counted_in_the_first_rows_too(tmp_path):
    good, bad = json.dumps(simple()), json.dumps(simple()).replace('"id": "t"', '"id": "s", "id": "t"')
    (tmp_path / "in.jsonl").write_text("\n\n".join([bad, good, good, bad]) + "\n{broken\n")
    report = convert_file(tmp_path / "in.jsonl", tmp_path / "out" / "train.jsonl", max_rows=3)
    assert (report.kept, report.flags) == (3, {"duplicate_keys": 1})


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet"])
@pytest.mark.parametrize("rows, wanted", [(5, 5), (9, 9), (100, 12)])
def test_only_so_many_rows(tmp_path, ending, rows, wanted):
    import pyarrow
    import pyarrow.parquet
    made, path = [chat(f"q{i}") for i in range(12)], tmp_path / f"in{ending}"
    text = "\n \n".join(json.dumps(row) for row in made).encode()
    if ending == ".parquet": pyarrow.parquet.write_table(pyarrow.Table.from_pylist(made), path, row_group_size=4)
    else: path.write_bytes({".gz": gzip.compress, ".zst": zstandard.compress}.get(path.suffix, bytes)(text))
    report = convert_file(path, tmp_path / "out" / "train.jsonl", max_rows=rows)
    assert report.rows == report.kept == wanted and report.facts["choices"]["max_rows"] == rows
    assert [json.loads(row["messages_json"])[0]["content"] for row in read_rows(tmp_path / "out" / "train.jsonl")] == [
        f"q{i}" for i in range(wanted)
    ]
