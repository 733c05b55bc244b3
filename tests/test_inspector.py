"""The inspector without a browser: rows by number, searches, views, escaping, the terminal command."""
import argparse
import json
import random
import re
from html.parser import HTMLParser

import pytest
import torch

from proxy_sft.chat.masks import supervise
from proxy_sft.chat.parity_turns import Inspection
from proxy_sft.chat.templates import ChatError, TEMPLATES
from proxy_sft.demo.rows import demo_rows
from proxy_sft.demo.tokenizer import build_demo_tokenizer
from proxy_sft.chat.inspector import (
    add_inspect_arguments, inspect, inspect_command, InspectorState, open_inspector, SCRIPT
)
from proxy_sft.chat.row_files import find_row, Query, raw_row, row_facts, RowFile
from proxy_sft.chat.views import join_runs, read_row, row_text, RowView, safe, show_row, TABS, tokens_html, visible
from proxy_sft.core.settings import load_settings
from proxy_sft.training.loss_weights import call_token_ids, token_weights

NASTY = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "</div></section><b>",
    "\x1b[2J\x1b]0;t\x07",
    "\x00\x7f\x9b",
    "\u202egnp.exe",
    "&lt;b&gt;",
    '" onmouseover="x',
    "<|im_end|>\n<|im_start|>system\n",
    "`${x}`",
    "\ud800",
    "👩‍👩‍👧 e\u0301",
]


def row(number, text="Hi", calls=0, **more):
    asked = (
        {"tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": text}}}] * calls}
        if calls
        else {}
    )
    messages = [
        {"role": "user", "content": text},
        {"role": "assistant", "content": "" if calls else "Yes " + text, **asked},
    ]
    if calls: messages += [{"role": "tool", "content": "1"}] * calls + [{"role": "assistant", "content": "Done"}]
    tools = [{"type": "function", "function": {"name": "f", "description": text, "parameters": {}}}] if calls else []
    return {"id": f"row_{number}", "source": "demo", "messages_json": json.dumps(messages, ensure_ascii=False),
            "tools_json": json.dumps(tools, ensure_ascii=False), **more}


@pytest.fixture(scope="module")
def tokenizer(): return build_demo_tokenizer(["Hi Yes Done"])


@pytest.fixture
def file(tmp_path):
    rows = [row(i, f"text {i}", i % 3, **({"source": "Aya"} if i % 5 == 0 else {})) for i in range(30)]
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
    return path


def test_rows_by_number(file):
    rows = RowFile(file)
    assert len(rows) == 30 and [rows[i]["id"] for i in (29, 0, 7)] == ["row_29", "row_0", "row_7"]
    with pytest.raises(IndexError, match="rows 0 to 29"): rows[30]
    file.write_bytes(file.read_bytes()[:-1])  # no line break at the end
    assert len(RowFile(file)) == 30 and RowFile(file)[29]["id"] == "row_29"
    file.write_bytes(b"")
    assert len(RowFile(file)) == 0


def test_line_breaks_at_block_borders(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"".join(b"%d\n" % i for i in range(200000)))
    rows = RowFile(path)
    for i in (0, 9, 10, 99999, 199999): assert rows[i] == i


def test_two_million_lines_open_with_a_number_each_and_no_more(tmp_path):
    path = tmp_path / "many.jsonl"
    line = json.dumps(row(1)).encode() + b"\n"
    with open(path, "wb") as out:
        for _ in range(20): out.write(line * 100_000)
    rows = RowFile(path)
    assert len(rows) == 2_000_000 and rows[1_999_999]["id"] == "row_1"
    assert rows.starts.nbytes < 20_000_000  # and nothing else is kept


def test_searches(file):
    rows = RowFile(file)
    assert find_row(rows, Query(text="TEXT 17")) == (17, 18)
    assert find_row(rows, Query(source="aya"), 6) == (10, 11) and find_row(rows, Query(source="aya"), 9, -1) == (5, 4)
    assert find_row(rows, Query(calls=2), 3) == (5, 6)
    assert find_row(rows, Query(text="nowhere")) == (None, 30) and find_row(rows, Query(text="nowhere"), 0, 1, 10) == (
        None,
        10,
    )
    longest = max(range(30), key=lambda i: len(rows.line(i)))
    assert find_row(rows, Query(longer=len(rows.line(longest))))[0] is not None
    assert find_row(RowFile([{"reason": "unknown_tool"}, {"repairs": ["a", "b"]}]), Query(reason="b")) == (1, 2)


def test_raw_rows_of_every_ledger():
    for raw in demo_rows()[:200]:
        assert raw_row(raw) is raw and raw_row({"reason": "x", "row": raw}) is raw
        facts = row_facts(raw)
        assert facts.id == raw["id"] and facts.source == raw["source_dataset"] and facts.turns == len(raw["messages"])
        assert "No view" not in RowView(raw).html("raw")


class Tags(HTMLParser):
    "Collects tags and attributes."
    def __init__(self): super().__init__(); self.seen, self.text = [], ""
    def handle_starttag(self, tag, attrs): self.seen.append((tag, dict(attrs)))
    def handle_data(self, data): self.text += data


ALLOWED = {
    "style",
    "div",
    "b",
    "p",
    "mark",
    "code",
    "span",
    "wbr",
    "table",
    "tr",
    "td",
    "th",
    "del",
    "ins",
    "details",
    "summary",
    "br",
    "strong",
    "em",
    "pre",
    "ruby",
    "rt",
}


@pytest.mark.parametrize("text", NASTY)
@pytest.mark.parametrize("tab", TABS)
def test_data_stays_text(tokenizer, text, tab):
    if "\ud800" in text and tab in ("text", "tokens", "parity", "compare"): return  # no tokens; see the next test
    raw = {
        "id": text,
        "source_dataset": text,
        "messages": [{"role": text, "content": text, "functions": text, "function_calls": text}],
    }
    chat = {"id": text, "source": text, "reason": text, "messages": [
        {"role": "user", "content": text}, {"role": "assistant", "content": text, "tool_calls": [
            {"type": "function", "function": {"name": text, "arguments": {text: text}}}]}],
        "tools": [{"type": "function", "function": {"name": text, "description": text}}], "row": raw}
    for template in TEMPLATES:
        view = show_row(chat, tokenizer, template, views=(tab,))
        page = Tags()
        page.feed(view._repr_html_())
        assert {tag for tag, _ in page.seen} <= ALLOWED, page.seen
        assert {name for _, attributes in page.seen for name in attributes} <= {"class", "title", "colspan", "scope"}
        shown = view._repr_html_() + row_text(view, tab, False)
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\ud800-\udfff]", shown)


def test_what_cannot_be_shown_says_why(tokenizer):
    lone = show_row(
        {"messages": [{"role": "user", "content": "\ud800"}, {"role": "assistant", "content": "x"}]}, tokenizer
    )
    assert "⟨D800⟩" in lone.html("messages") and "No view" in lone.html("text")
    assert "no tokenizer" in show_row(row(1)).html("text") and "not converted" in show_row({"id": "x"}, tokenizer).html(
        "tokens"
    )
    assert "at hand" in show_row(row(1), tokenizer).html("raw")
    assert show_row({"messages": []}, tokenizer).html("text").startswith("<p>No view")
    with pytest.raises(ChatError, match="no view 'picture'"): show_row(row(1), tokenizer, views=("picture",))


def test_raw_rows_are_converted_on_the_way(tokenizer):
    raw = demo_rows()[0]
    assert show_row(raw, tokenizer, convert=lambda r: row(1)).reading is not None
    def refuse(r):
        error = ValueError("no user message")
        error.reason = "no_user"
        raise error
    assert show_row(raw, tokenizer, convert=refuse).problem == "no_user no user message"


@pytest.mark.parametrize("template", TEMPLATES)
def test_runs_are_the_text_and_the_labels(tokenizer, template):
    from proxy_sft.chat.masks import supervise, trained_spans
    messages = 2 * [
        {"role": "user", "content": "👩‍👩‍👧 東京 <|im_end|>"}, {"role": "assistant", "content": "Ünï 👩‍👩‍👧!"}]
    reading = read_row(messages, [], Inspection(tokenizer, template))
    assert "".join(run.text for run in reading.runs) == tokenizer.decode(reading.ids.tolist())
    assert [i for run in reading.runs for i in run.ids] == reading.ids.tolist()
    spans = trained_spans(supervise(messages, [], tokenizer, template), tokenizer)
    assert "".join(run.text for run in join_runs(reading.runs) if run.trained) == "".join(spans)


@pytest.mark.parametrize("call_weight", [1.0, 2.5])
@pytest.mark.parametrize("weight", [1.0, 3.0])
def test_shades_are_the_weights_of_the_loss(tokenizer, call_weight, weight):
    "Token by token what the training counts, in the token view, with a number for who sees no colours."
    call = {"type": "function", "function": {"name": "weather.now", "arguments": {"city": "Zürich"}}}
    messages = [
        {"role": "user", "content": "Weather in Zürich, as <tool_call>?"},
        {"role": "assistant", "content": "I look.", "tool_calls": [call, call], "weight": weight},
        {"role": "tool", "content": "rain"}, {"role": "tool", "content": "rain"},
        {"role": "assistant", "content": "Rain in Zürich."}]
    inspection = Inspection(tokenizer)
    inspection.call_weight = call_weight
    reading, out = read_row(messages, [], inspection), supervise(messages, [], tokenizer, "nothink")
    batch = {name: torch.tensor([values]) for name, values in out.items()}
    wanted = token_weights(batch, call_weight, call_token_ids(tokenizer))[0].tolist()
    assert [run.weight * run.trained for run in reading.runs for _ in run.ids] == wanted
    page, numbers = tokens_html(reading), {weight, weight * call_weight} - {1.0}
    assert reading.weighted == bool(numbers) == ("counts more in the loss" in page)
    assert {float(n) for n in re.findall("×([0-9.]+)</rt>", page)} == numbers
    assert len(set(re.findall("<mark style=.(background:[^>]*)>", page))) == len(numbers)


def test_a_file_of_settings_with_call_weight_is_shaded(tmp_path):
    settings = load_settings("demo", workspace=str(tmp_path), demo_rows=200, call_weight=4.0)
    assert open_inspector(settings).inspection.call_weight == 4.0


def test_the_diff_shows_what_a_server_shows_otherwise(tokenizer):
    view = show_row(row(1, "x", 1), tokenizer, "stock")
    assert "<del>&lt;think&gt;\n\n&lt;/think&gt;\n\n</del>" in view.html("parity") and "✘" in view.html("parity")
    assert "✘" not in show_row(row(1, "x", 1), tokenizer).html("parity")
    assert "[only server: <think>" in row_text(view, "parity", False)


def test_a_committed_view_is_small_and_without_scripts(tokenizer):
    page = show_row(row(1, "text", 1), tokenizer)._repr_html_()
    assert len(page.encode()) < 5000 and "<script" not in page and " id=" not in page
    assert page == show_row(row(1, "text", 1), tokenizer)._repr_html_()


def test_the_page_inserts_one_piece_of_html_only():
    assert SCRIPT.count("insertAdjacentHTML") == SCRIPT.count('insertAdjacentHTML("beforeend", view.html)') == 2
    assert "innerHTML" not in SCRIPT and "eval(" not in SCRIPT
    assert "http" not in SCRIPT  # works without a network


def test_state(file, tokenizer, tmp_path):
    raw = tmp_path / "raw.jsonl"
    raws = [
        {"id": f"row_{i}", "messages": [{"role": "user", "content": f"raw {i}", "functions": None}]} for i in range(30)
    ]
    raw.write_text("".join(json.dumps(r) + "\n" for r in reversed(raws)))
    state = InspectorState(RowFile(file), tokenizer, "nothink", "all", RowFile(raw), None)
    def tell(do, value=None, **more):
        state.handle({"do": do, "value": value, **more})
        return state.view()
    assert tell("go", "4")["row"] == 4 and tell("go", 30)["note"] == "rows are 0 to 29" and state.row == 4
    assert "raw 4" in tell("tab", "raw")["html"]
    assert tell("find", step=1)["row"] == 5 and tell("find", step=-1)["row"] == 4
    tell("query", {"text": "text 2", "source": "", "reason": "", "calls": "", "longer": "", "shorter": ""})
    assert [tell("find", step=1)["row"] for _ in range(3)] == [20, 21, 22] and tell("find", step=-1)["row"] == 21
    tell("query", {"text": "nowhere"})
    assert "no other row" in tell("find", step=1)["note"]
    tell("go", 22), tell("tab", "parity")
    assert "✘" in tell("template", "stock")["html"]
    assert "✘" not in tell("template", "nothink")["html"] and json.loads(state.view()["json"])["id"] == "row_22"
    assert (
        "no chat template" in tell("template", "other")["html"] and tell("template", "nothink")["template"] == "nothink"
    )
    assert tell("train_on", "last")["train_on"] == "last"
    for nonsense in (
        {},
        {"do": "tab", "value": "x"},
        {"do": "go", "value": "x"},
        {"do": "query", "value": {"calls": "many"}},
        {"do": "query", "value": {"other": "1"}},
        {"do": "query", "value": 7},
    ):
        state.handle(nonsense)
        assert state.note, nonsense


def test_each_page_hears_which_of_its_messages_was_answered_last(file):
    "A page is busy until its last message is answered: the answer to a read in the background is not it."
    state = InspectorState(file)
    for number, (page, do) in enumerate((("one", "read"), ("one", "tab"), ("two", "read"), ("one", "nonsense"))):
        state.handle({"do": do, "value": "raw", "page": page, "number": number})
        assert state.view()["answered"][page] == number
    state.handle({"do": "query", "value": {}})
    assert state.view()["answered"] == {"one": 3, "two": 2}


def test_the_converters_ledger(tokenizer):
    raw = RowFile(
        [
            {
                "id": f"r{i}",
                "source_dataset": "Aya",
                "messages": [{"role": "user", "content": f"raw {i}", "functions": None}],
            }
            for i in range(4)
        ]
    )
    rejected = {
        "id": "r2",
        "line": 3,
        "source": "Aya",
        "reason": "malformed_calls",
        "message": "unexpected <b>",
        "excerpt": "f(",
    }
    repaired = {
        "id": "r1",
        "line": 2,
        "source": "Aya",
        "repairs": [{"code": "empty_assistant", "message": 4, "found": ""}],
    }
    state = InspectorState(
        RowFile([rejected, repaired]),
        tokenizer,
        "nothink",
        "all",
        raw,
        lambda row: {
            **row,
            "messages": [{"role": "user", "content": "converted"}, {"role": "assistant", "content": "yes"}],
        },
    )
    assert find_row(state.rows, Query(reason="empty_assistant")) == (1, 2)
    state.handle({"do": "tab", "value": "raw"})
    assert "raw 2" in state.view()["html"]
    state.handle({"do": "go", "value": 1})
    assert "raw 1" in state.view()["html"] and "empty_assistant" in state.view()["summary"]
    state.handle({"do": "tab", "value": "text"})
    assert "converted" in state.view()["html"]
    assert "unexpected &lt;b&gt;" in show_row(rejected, tokenizer).html("text")


def test_broken_lines_do_not_stop_it(tmp_path, tokenizer):
    path = tmp_path / "broken.jsonl"
    path.write_bytes(
        json.dumps(row(0)).encode() + b'\n{"id": "cut", "mess\n\xff\n' + json.dumps(row(3, "last")).encode() + b"\n"
    )
    state = InspectorState(RowFile(path), tokenizer, "nothink", "all", None, None)
    for i in range(4):
        state.handle({"do": "go", "value": i})
        assert state.view()["html"]
    assert find_row(state.rows, Query(text="last"), 1) == (3, 4)


def test_static_where_nobody_can_press_a_button(file, tokenizer, monkeypatch):
    monkeypatch.setenv("IN_TEST", "1")
    assert isinstance(inspect(file, tokenizer, row=3), RowView)
    monkeypatch.delenv("IN_TEST")
    pytest.importorskip("anywidget")
    widget = inspect(file, tokenizer, row=3)
    assert widget.view["row"] == 3
    widget._on_page(widget, {"do": "find", "step": 1}, [])
    assert widget.view["row"] == 4
    assert "onerror" not in inspect([{"messages": [{"role": "user", "content": NASTY[0]}]}], tokenizer).view["html"]


def run(capsys, *arguments):
    parser = argparse.ArgumentParser()
    add_inspect_arguments(parser)
    status = inspect_command(parser.parse_args([str(argument) for argument in arguments]))
    return status, capsys.readouterr()


def test_the_command(file, tokenizer, tmp_path, capsys, monkeypatch):
    tokenizer.save_pretrained(tmp_path / "model")
    with_model = (file, "--tokenizer", tmp_path / "model")
    status, said = run(capsys, *with_model, "--row", 4)
    assert status == 0 and "row 4 of 30" in said.out and "⟦" in said.out and "\x1b" not in said.out
    status, said = run(capsys, *with_model, "--row", 4, "--color", "always")
    assert "\x1b[1;4;32m" in said.out and "⟦" not in said.out
    for view in TABS: assert run(capsys, *with_model, "--view", view)[0] == 0
    assert "row 17" in run(capsys, *with_model, "--search", "text 17")[1].out
    assert run(capsys, *with_model, "--search", "nowhere")[0] == 1
    status, said = run(capsys, *with_model, "--row", 99)
    assert status == 2 and "rows 0 to 29" in said.err
    assert run(capsys, tmp_path / "none.jsonl", "--tokenizer", tmp_path)[0] == 2
    status, said = run(capsys, file, "--tokenizer", tmp_path / "none")
    assert status == 2 and "no tokenizer" in said.err
    assert json.loads(run(capsys, *with_model, "--row", 2, "--json")[1].out)["id"] == "row_2"


def test_settings_count_for_a_file_too(file, tokenizer, tmp_path, capsys):
    from proxy_sft.commands import main
    tokenizer.save_pretrained(tmp_path / "model")
    def shown(*words):
        assert main(["inspect", str(file), "--tokenizer", str(tmp_path / "model"), "--row", "4", *words]) == 0
        return capsys.readouterr().out
    stock = shown("-p", "template", "stock")
    assert stock == shown("--template", "stock") == shown("--profile", "demo", "-p", "template", "stock") != shown()
    assert main(["inspect", str(file), "-p", "tempate", "stock"]) != 0
    assert "Did you mean" in capsys.readouterr().err


def test_data_cannot_steer_the_terminal(tmp_path, tokenizer, capsys):
    tokenizer.save_pretrained(tmp_path / "model")
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({**row(0, "".join(NASTY[3:6])), "id": "\x1b[31m"}) + "\n")
    for view in TABS:
        status, said = run(capsys, path, "--tokenizer", tmp_path / "model", "--view", view)
        assert status == 0 and not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", said.out)


def test_visible_and_safe():
    rnd = random.Random(0)
    for _ in range(200):
        text = "".join(
            chr(rnd.choice([rnd.randrange(0x300), rnd.randrange(0x2000, 0x2100), 0xD800])) for _ in range(20)
        )
        assert not re.search(
            r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800]", visible(text)
        )
        assert not set("<>\"'") & set(safe(text))


def test_converted_files_are_filtered_by_their_facts(tmp_path):
    """The two columns of a converted file say neither source nor repairs; the file beside it does, and finds the same
    rows as reading them all."""
    from proxy_sft.data.conversion import convert_file
    from proxy_sft.demo.rows import demo_rows
    from proxy_sft.chat.inspector import InspectorState
    from proxy_sft.chat.row_files import find_row, Query, RowFile
    source, target = tmp_path / "rows.jsonl", tmp_path / "out" / "train.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in demo_rows(300)))
    convert_file(source, target, progress=False)
    rows, raw = RowFile(target), RowFile(source)
    known = [rows.known(i) for i in range(len(rows))]
    assert all(raw[k["line"] - 1]["id"] == k["id"] for k in known)
    code = next(k["repairs"][0] for k in known if k["repairs"])
    name = known[5]["source"]
    def every(query, step):
        at, found = (0 if step > 0 else len(rows) - 1), []
        while True:
            row, at = find_row(rows, query, at, step)
            if row is None: return found[::step]
            found.append(row)
    calls = [
        sum(len(m.get("tool_calls") or []) for m in json.loads(rows[i]["messages_json"])) for i in range(len(rows))
    ]
    for step in (1, -1):
        assert every(Query(source=name.upper()), step) == [i for i, k in enumerate(known) if name in k["source"]]
        assert (
            every(Query(reason=code), step)
            == [i for i, k in enumerate(known) if any(code in r for r in k["repairs"])]
            != []
        )
        assert every(Query(calls=2), step) == [i for i, n in enumerate(calls) if n == 2] != []
        assert (
            every(Query(longer=800, shorter=1500), step)
            == [i for i in range(len(rows)) if 800 <= len(rows.line(i)) <= 1500]
            != []
        )
        assert every(Query(), step) == list(range(len(rows)))
    state = InspectorState(rows, None, "nothink", "all", raw, None)
    state.handle({"do": "query", "value": {"reason": code}})
    state.handle({"do": "find", "step": 1, "stay": True})
    state.handle({"do": "tab", "value": "raw"})
    view = state.view()
    assert code in view["summary"] and known[state.row]["id"] in view["summary"] and "No view" not in view["html"]
    target.write_bytes(target.read_bytes()[:-5] + b"\n")  # changed by somebody: its facts are another file's
    assert RowFile(target).facts is None and find_row(RowFile(target), Query(calls=2)) == find_row(rows, Query(calls=2))


def test_rows_are_sorted_filtered_and_counted(tokenizer):
    rows = [{**row(i, "x" * i, i % 3), "source": f"s{i % 2}"} for i in range(60)]
    state = InspectorState(RowFile(rows), tokenizer)
    def ask(do, value=None):
        state.handle({"do": do, "value": value})
        while state.missing(): state.handle({"do": "read"})
        return state.view()["table"]
    assert [number for number, _ in ask("page", 1)["rows"]] == list(range(25, 50))
    first = [number for number, _ in ask("sort", "calls")["rows"]]
    assert [number % 3 for number in first[:21]] == [0] * 20 + [1]
    assert next(facet for facet in ask("table")["facets"] if facet["name"] == "source")["values"][0][:3] == ["s0", "s0",
            30]
    assert "of 30 rows" in ask("facet", ["source", "s1"])["caption"]
    tokens = [int(cells[5].replace(",", "")) for _, cells in ask("sort", "tokens")["rows"]]
    assert tokens == sorted(tokens) and state.note == ""
    ask("facet", ["source", ""])
    state.handle({"do": "template", "value": "stock"})
    assert len(ask("flag", "parity")["rows"]) > 0 and all(cells[7].startswith("✘") for _,
                                                          cells in ask("table")["rows"])
    state.handle({"do": "go", "value": ""})
    assert state.note == "a row is a whole number, not ''"  # an emptied field is a sentence, no Python error


def test_a_long_row_is_shown_in_pieces_and_compared_in_linear_time(tokenizer):
    from proxy_sft.chat.views import differences, piece_count, tokens_html
    long = [{"role": "user", "content": "umbrella rain " * 4000}, {"role": "assistant", "content": "yes"}]
    reading = read_row(long, [], Inspection(tokenizer))
    pieces = [tokens_html(reading, piece) for piece in range(piece_count(reading))]
    assert len(pieces) > 2 and sum(page.count("<ruby>") for page in pieces) == len(reading.runs)
    rnd, calls = random.Random(0), 0
    for _ in range(300):
        one = [rnd.randrange(5) for _ in range(rnd.randrange(60))]
        other = list(one)
        for _ in range(rnd.randrange(4)):
            at = rnd.randrange(len(other) + 1)
            other[at:at + rnd.randrange(5)] = [rnd.randrange(5) for _ in range(rnd.randrange(5))]
        built, a = [], 0
        for b, e, d, f in differences(one, other):
            built, a, calls = built + one[a:b] + other[d:f], e, calls + 1
        assert built + one[a:] == other
    assert calls > 100


def test_a_rejected_row_opens_on_its_reason(tokenizer):
    raw = {"id": "r", "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": None,
           "function_calls": "f(x=2*3)"}]}
    entry = {"id": "r", "line": 1, "source": "Aya", "reason": "malformed_calls", "message": "an operator",
             "excerpt": "f(x=2*3)"}
    def refuse(row): raise ValueError("an operator")
    state = InspectorState(RowFile([entry]), tokenizer, raw=RowFile([raw]), convert=refuse)
    html = state.view()["html"]
    assert "rejected: malformed_calls" in html and "function_calls</strong> <mark>f(x=2*3)</mark>" in html


def test_a_static_copy_needs_no_styles(tokenizer):
    page = show_row(row(1, "text", 1), tokenizer)._repr_html_()
    bare = re.sub(r"(?s)<style>.*?</style>| class=\"[^\"]*\"", "", page)
    assert "<pre>" in bare and "<b>&lt;|im_end|&gt;</b></mark>" in bare


def test_compared_templates_are_marked(tokenizer):
    state = InspectorState(RowFile([row(1, "x", 1)]), tokenizer)
    for do, value in (("other", "stock"), ("tab", "compare")): state.handle({"do": do, "value": value})
    html = state.view()["html"]
    assert "<ins>&lt;think&gt;" in html and "2 differences" in html  # the tool's empty fields, and thinking
    state.handle({"do": "other", "value": "nothink"})
    assert "the same tokens" in state.view()["html"]


def test_a_path_brings_what_its_profile_knows(tmp_path, monkeypatch):
    "A ledger's raw rows, a prepared folder's conversations and choices; from the root and from nbs/ alike."
    from proxy_sft.chat.inspector import open_inspector
    from proxy_sft.core.settings import load_settings
    from proxy_sft.pipeline import ensure_prepared
    workspace = {"workspace": str(tmp_path), "demo_rows": 200, "max_train_samples": 20, "max_length": 400}
    settings = load_settings("demo", **workspace)
    prepared = ensure_prepared(settings)
    load = lambda profile="", **more: load_settings(profile or "demo", **{**workspace, **more})
    monkeypatch.setattr("proxy_sft.chat.inspector.load_settings", load)
    rejected = open_inspector(settings.converted_dir / "rejected.jsonl")
    assert "raw" in rejected.files and "<mark>" in rejected.view()["html"] and rejected.tokenizer is not None
    assert open_inspector(settings.converted_dir).rows.path == settings.converted_dir / "train.jsonl"
    packed = open_inspector(prepared.folder)
    assert packed.tab == "block" and "block 0 of" in packed.view()["html"] and packed.max_length == 400
    names = [packed.block_view() for packed.block in range(len(packed.blocks))]
    assert names and not any("row not looked up" in name for name in names)  # of rows that were cut, too
    (settings.converted_dir / "report.json").write_text('{"files": []}')
    with pytest.raises(FileNotFoundError, match="not those of any profile"): open_inspector(prepared.folder)


def test_misspelt_names_get_the_nearest(file):
    for wrong, right in (("dmo", "'demo'"), (str(file).replace("train", "trian"), str(file))):
        with pytest.raises(FileNotFoundError, match=re.escape(right)): inspect(wrong)
    file.rename(file.with_name("rows.jsonl"))
    with pytest.raises(FileNotFoundError, match="Name one of its files: rows.jsonl"): inspect(file.parent)


def test_servers_beside_each_other(tokenizer):
    "A tool that only one server rewrites; a request that one refuses; the training text ends where the answer begins."
    tool = {"name": "f", "description": "x", "parameters": {"type": "object", "properties": {"x": {"type": "text"}}}}
    tools = json.dumps([{"type": "function", "function": tool}])
    state = InspectorState(RowFile([{**row(1, "x", 1), "tools_json": tools}]), tokenizer, "stock")
    def view(**sides):
        for do, value in {"tab": "compare", **sides}.items(): state.handle({"do": do, "value": value})
        assert not state.note, state.note
        return state.view()["html"]
    assert "Choose" in view()
    page = view(server="vllm", other_server="sglang")
    assert "f(x) <strong>differs</strong>" in page and "<ins>string</ins>" in page and "vLLM 0" in page
    assert "the same tokens" in view(server="", other_server="vllm", template="nothink")
    state.handle({"do": "server", "value": "nonsense"})
    assert "not understood" in state.note
    page = view(server="", other_server="", template="nothink", other="stock")
    for tag in ("del", "ins"):  # no mark goes over the end of a line: between lines lie folds
        marks = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.S)
        assert marks and not any("\n" in mark for mark in marks)


def test_a_view_is_made_once_while_rows_are_read(file, tokenizer, monkeypatch):
    "A page that reads in the background is answered three times a second: its view is not rendered again each time."
    state, made = InspectorState(RowFile(file), tokenizer), []
    html = RowView.html
    monkeypatch.setattr(RowView, "html", lambda self, *args: made.append(args) or html(self, *args))
    first = state.view()["html"]
    state.handle({"do": "read"})
    assert state.view()["html"] == first and len(made) == 1
    for do, value in (("go", 1), ("tab", "tokens"), ("template", "stock"), ("train_on", "last")):
        state.handle({"do": do, "value": value})
        assert state.view()["html"] != first or do == "train_on"
    assert len(made) == 5
