"""What servers hand to the template and read from answers: our models against recorded answers of the published request
classes, and against the classes themselves (PROXY_SFT_SOAK=1); every spelling of tools and messages gives one text."""
import copy
import json
import os
import random
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path

import jinja2
import numpy as np
import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from proxy_sft.chat.encoder import row_parts
from proxy_sft.chat.masks import IGNORED, supervise
from proxy_sft.chat.parity import check_parity
from proxy_sft.chat.parity_counts import same_at_servers
from proxy_sft.chat.parity_turns import Inspection, misread_turns, server_prompts, server_turns, turn_parity
from proxy_sft.chat.replies import misread, READERS
from proxy_sft.chat.servers import api_messages, RefusedRequest, SERVERS
from proxy_sft.chat.templates import apply_template, chat_template, ChatError, render_chat, ROW_ERRORS, tool_text
from proxy_sft.data.rows import convert_row, ConvertError
from proxy_sft.demo.rows import demo_rows
from proxy_sft.demo.tokenizer import build_demo_tokenizer, demo_texts
from server_classes import plain
from server_requests import requests, spelt_tool
from test_chat import random_chat, SHARED

HERE = Path(__file__).resolve().parent
RECORDED = HERE / "server_answers.json"
SOURCES = ("nothink", "stock")
SOAK = pytest.mark.skipif(os.environ.get("PROXY_SFT_SOAK") != "1", reason="downloads 380 MB; set PROXY_SFT_SOAK=1")


@pytest.fixture(scope="module")
def tokenizer(): return build_demo_tokenizer([*demo_texts()[:400], "Yes\n\nNo\n\n" * 50])


def ours(server, asked):
    "What our model says, in the form of `server_classes`."
    if "text" in asked:
        content, calls = READERS[server](asked["text"], asked["tools"])
        return [content, [list(call) for call in calls]]
    try: messages, tools = SERVERS[server].view(copy.deepcopy(asked["messages"]), copy.deepcopy(asked["tools"]),
                                                asked["source"])
    except RefusedRequest: return "refused"
    return [[plain(message) for message in messages], tools]


def theirs(answer): return "refused" if "refused" in answer else answer


def equal(one, other):
    "Equal with the order of keys inside tools (a template may write them in that order)."
    return json.dumps(one) == json.dumps(other) or (one == other and [*map(ordered, one[1] or [])] == [*map(ordered,
            other[1] or [])])


def ordered(tool): return json.dumps(tool["function"]) if isinstance(tool,
                                                                     dict) and "function" in tool else json.dumps(tool)


def questions(count, seed):
    "Requests, each with a template, and answers to be read."
    asked = [{**request, "source": chat_template(SOURCES[i % 2])} for i, request in enumerate(requests(count, seed))]
    return asked + [{"text": text, "tools": tools} for text, tools in answers(count // 4, seed)]


def answers(count, seed):
    "Answers of a model, ordinary and odd."
    chance = random.Random(seed)
    tools = [{"type": "function", "function": {"name": name, "parameters": {"type": "object"}}} for name in ("f",
            "weather.forecast")]
    pieces = ('<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>',
              '<tool_call>\n{"name": "weather.forecast", "arguments": {"city": "Z\u00fcrich \\"\u6771\\""}}\n'
              '</tool_call>',
              '<tool_call>\n{"name": "other", "arguments": {}}\n</tool_call>',
              '<tool_call>{"name": "f", "arguments": {}}</tool_call>',
              '<tool_call>\n{"name": "f", "arguments": {"t": "</tool_call>"}}\n</tool_call>',
              "<tool_call>\n{nonsense}\n</tool_call>",
              '<tool_call>\n{"name": "f", "arguments": {"big": 123456789012345678901234567890, "y": 1e22}}',
              "Let me see.", " \n", "</tool_call>",
              '<tool_call>\n{"name": "f"}\n</tool_call>', '<tool_call>\n{"name": "f", "parameters": {"x": 2}, '
                                                          '"arguments": {}}\n</tool_call>')
    for _ in range(count): yield "\n".join(chance.choice(pieces) for _ in range(chance.randint(1, 3))), tools


@pytest.mark.parametrize("server", ("vllm", "sglang"))
def test_models_give_the_recorded_answers_of_the_published_classes(server):
    recorded = json.loads(RECORDED.read_text(encoding="utf-8"))
    assert recorded["versions"][server] == SERVERS[server].version
    asked, kinds = questions(recorded["count"], recorded["seed"]), Counter()
    for question, answer in zip(asked, recorded["answers"][server], strict=True):
        assert equal(ours(server, question), theirs(answer)), (server, question)
        kinds["read" if "text" in question else "refused" if "refused" in answer else "view"] += 1
    assert kinds["view"] > 15 and kinds["refused"] > 5 and kinds["read"] > 5, kinds


def published(server, folder):
    "The unpacked wheels of a server's published version; the folder that PROXY_SFT_WHEELS names may hold them already."
    kept = os.environ.get("PROXY_SFT_WHEELS")
    if kept and (Path(kept) / server).is_dir(): return Path(kept)
    wanted = [f"{server}=={SERVERS[server].version}", "openai_harmony", "partial-json-parser", "pybase64"]
    subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-cache-dir", "-d", folder,
                    *wanted], check=True)
    for wheel in Path(folder).glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            big = wheel.name.startswith(("vllm", "sglang"))
            archive.extractall(folder, [name for name in archive.namelist() if not big or name.endswith(".py")])
        wheel.unlink()
    return Path(folder)


def answered(server, asked, folder):
    "What the published classes say to each question."
    lines = "".join(json.dumps(question) + "\n" for question in asked)
    done = subprocess.run([sys.executable, HERE / "server_classes.py", server, folder], input=lines,
                          capture_output=True, text=True)
    assert not done.returncode, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@SOAK
@pytest.mark.parametrize("server", ("vllm", "sglang"))
def test_models_agree_with_the_published_classes(server, tmp_path):
    asked = questions(3000, 20261128)
    found = answered(server, asked, published(server, tmp_path))
    wrong = [
        question
        for question, answer in zip(asked, found, strict=True)
        if not equal(ours(server, question), theirs(answer))
    ]
    assert not wrong, (len(wrong), wrong[:3])
    assert sum("refused" in answer for answer in found) > 200


def without_differences(message):
    "A message that no server changes: see `chat.servers` for what is left out here."
    if message["role"] == "tool" and isinstance(message["content"], list): message["content"] = message["content"][:1]
    if message.get("tool_calls"): message["content"] = None
    else: message.pop("tool_calls", None)
    for call in message.get("tool_calls") or []:
        function = call.get("function") or {}
        if "1234567890123456789" in str(function.get("arguments")): function["arguments"] = "{}"
    return message


def test_every_spelling_of_a_request_gives_one_text_at_every_server(tokenizer):
    """2,000 requests: contents as text, null and lists of parts, ids, names, developer, white space, arguments in any
    spelling, tools in any order with any keys."""
    source, served = chat_template(), Counter()
    for request in requests(2000, 7):
        messages, tools, texts = (
            [without_differences(message) for message in copy.deepcopy(request["messages"])],
            request["tools"],
            {},
        )
        if "x-anthropic" in json.dumps(messages): continue # vLLM drops that line, see the models' own tests
        if "varchar" in json.dumps(tools): continue # SGLang rewrites more names of types than the template does
        for name, server in SERVERS.items():
            try: given = server.view(copy.deepcopy(messages), copy.deepcopy(tools), source)
            except RefusedRequest: served[f"{name} refuses"] += 1; continue
            try: texts[name] = apply_template(*given, tokenizer, source, {}, True)
            except ROW_ERRORS: served[f"the template refuses {name}"] += 1; continue
            served[name] += 1
        assert len({*texts.values()}) <= 1, (messages, tools, texts)
    assert min(served[name] for name in SERVERS) > 800, served


def test_two_thousand_spellings_of_a_tool_give_one_line(tokenizer):
    chance, seen = random.Random(3), set()
    for _ in range(2000):
        tool = spelt_tool(chance)
        function = tool["function"]
        fields = {key: function[key] for key in ("name", "description", "parameters") if function.get(key) is not None}
        line = tool_text({"type": "function", "function": fields})
        for spelling in (
            tool,
            function,
            {"type": "function", "function": {**function, "description": function.get("description")}},
        ):
            assert tool_text(spelling) == line
            assert f"\n{line}\n</tools>" in render_chat([{"role": "user", "content": "x"}], [spelling], tokenizer)
        seen.add(line)
    assert len(seen) > 50


REFUSED = ({"role": "function", "content": "x"}, {"role": "user", "content": [{"type": "image"}]},
           {"role": "user", "content": ["x"]},
           {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": '{"x": 1}'}}]},
           {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": None, "arguments": {}}}]})


@pytest.mark.parametrize("template", ("nothink", "empty_think"))
@pytest.mark.parametrize("message", REFUSED)
def test_what_the_template_cannot_write_is_refused_by_every_engine(tokenizer, message, template):
    for fast in (False, True):
        renderer = Inspection(tokenizer, template, fast=fast).encoder.renderer
        with pytest.raises(Exception, match="no text|no role|a name"):
            renderer.text([{"role": "user", "content": "x"}, message], None)


def converted():
    "The demo's rows, and those beside the checkout."
    for row in [*demo_rows()][::12] + [
        json.loads(line)
        for name in ("real_rows", "bfcl_rows")
        if (SHARED / "dolci").exists()
        for line in (SHARED / "dolci" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    ]:
        try: yield convert_row(row)
        except ConvertError: pass # planted


def measured(inspection, row):
    messages, tools = row_parts(row)
    out = supervise(messages, tools, inspection.tokenizer, inspection.template)
    ids, trained = np.array(out["input_ids"], np.int32), np.array(out["labels"]) != IGNORED
    turns = turn_parity(inspection, messages, ids, trained, server_prompts(inspection, [(messages, tools)])[0])
    return messages, tools, ids, turns


def test_rows_that_are_taken_for_the_same_are_the_same(tokenizer):
    "The quick decision against the models, on the demo, on Dolci's rows and on random chats."
    inspection, chance, sure = Inspection(tokenizer), random.Random(5), 0
    for row in [*converted(), *(random_chat(chance, False) for _ in range(80))]:
        messages, tools, ids, turns = measured(inspection, row)
        if (same := same_at_servers(inspection, messages, tools)) is None: continue
        sure += 1
        for server in SERVERS:
            for turn in server_turns(inspection, server, messages, tools, turns):
                late = server == "transformers" and turn.message > same
                assert turn.outcome == ("changed" if late else "same"), (server, turn, messages, tools)
            assert not misread_turns(inspection, server, messages, tools, ids, turns), (server, messages)
    assert sure > 150


@pytest.mark.parametrize("template", ("nothink", "empty_think", "stock"))
def test_prompts_in_pieces_are_the_prompts(tokenizer, template):
    "Tools rendered once for a conversation, against every prompt rendered whole by Hugging Face's own way."
    server, chance = Inspection(tokenizer, template).server, random.Random(9)
    chats = [row_parts(row) for row in converted()][::6]
    for messages, tools in [*chats, *(row_parts(random_chat(chance, False)) for _ in range(60))]:
        ends = [*range(1, len(messages) + 1)]
        assert server.prompts(messages, tools, ends) == [
            apply_template(messages[:end], tools, tokenizer, server.source, server.options, True) for end in ends]


def test_the_table_of_the_default_template(tokenizer, tmp_path):
    "All of the demo and of Dolci's rows at all three servers; and what TRL's file by itself gives."
    rows = [*converted()]
    found = check_parity(rows, tokenizer)
    assert found.passed, found
    for server in SERVERS:
        assert (
            found[f"same {server}"] + found[f"changed {server}"] + found[f"refused {server}"] == found["supervised"]
        ), found
        assert not found[f"differs {server}"]
    assert found["same vllm"] == found["supervised"]
    (tmp_path / "trl.jinja").write_text(__import__("proxy_sft.chat.templates",
                                                   fromlist=["_"])._trl_template("qwen3_instruct_2507.jinja"))
    before = check_parity([row for row in rows if row["tools_json"] != "[]"], tokenizer, str(tmp_path / "trl.jinja"))
    assert not before.passed and before["differs sglang"] > 0 and "SGLang builds" in before.verdict


def test_servers_are_chosen_and_named(tokenizer):
    row = {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}], "tools": []}
    found = check_parity([row], tokenizer, servers=("vllm",))
    assert (
        found.servers == ("vllm",)
        and "SGLang" not in repr(found)
        and json.loads(found.to_json())["servers"] == {"vllm": "0.33.0"}
    )
    with pytest.raises(ChatError, match="no model of a server ollama"): check_parity([row], tokenizer,
            servers=("ollama",))


def test_what_a_server_changes_is_counted_with_its_reason(tokenizer):
    call = {"function": {"name": "f", "arguments": {"n": 2**70}}}
    tool = {
        "type": "function",
        "function": {"name": "f", "parameters": {"type": "object", "properties": {"n": {"type": "any"}}}},
    }
    chat = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "Hm.", "tool_calls": [call]},
            {"role": "tool", "content": "1"},
            {"role": "assistant", "content": "y"}]
    found = check_parity([{"messages": chat, "tools": []}, {"messages": chat, "tools": [tool]}], tokenizer)
    assert (
        found.passed
        and found["changed transformers: text beside a call"] == 2
        and found["changed sglang: arguments"] == 1
    )
    assert found["refused sglang: a schema that breaks JSON Schema's own rules"] == 2
    assert found["misread sglang: a function that the request does not offer"] == 1
    assert "transformers serve shows other content in 2 turns" in found.verdict


@pytest.mark.parametrize("arguments", ({"text": "</tool_call>"}, {"n": "7"}))
def test_calls_that_a_parser_reads_otherwise_have_a_reason(arguments):
    tools = [
        {
            "type": "function",
            "function": {"name": "f", "parameters": {"type": "object", "properties": {"n": {"type": "integer"}}}},
        }
    ]
    calls, text = (
        [{"function": {"name": "f", "arguments": arguments}}],
        f"<tool_call>\n{json.dumps({'name': 'f', 'arguments': arguments})}\n</tool_call>",
    )
    reasons = {server: misread(server, text, calls, tools) for server in READERS}
    if "n" in arguments: assert not reasons["vllm"] and not reasons["sglang"] and "types" in reasons["transformers"]
    else: assert "tag" in reasons["vllm"] and "tag" in reasons["transformers"]


def test_white_space_between_text_and_call_comes_back_as_it_went(tokenizer):
    "Each server's reading of an answer, sent back by the client, is the trained history."
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]
    for text in ("Let me see.", " Let me see. \n\n", "\n", ""):
        calls = [{"id": "c", "type": "function", "function": {"name": "f", "arguments": {"x": [1, "\u00e9"]}}}]
        chat = [{"role": "user", "content": "x"}, {"role": "assistant", "content": text, "tool_calls": calls},
                {"role": "tool", "content": "1"}]
        trained = render_chat(chat, tools, tokenizer)
        answer = trained[trained.index("assistant\n") + 10:].split("<|im_end|>")[0]
        for server in ("vllm", "sglang"):
            content, found = READERS[server](answer, tools)
            back = {"role": "assistant", "content": content, "tool_calls": [
                {"id": "c", "type": "function", "function": {"name": name, "arguments": arguments}} for name,
                arguments in found]}
            given = SERVERS[server].view([*api_messages(chat[:1]), back, *api_messages(chat)[2:]], tools,
                                         chat_template())
            assert render_chat(*given, tokenizer) == trained, (server, text)


@pytest.mark.parametrize("template", ("nothink", "empty_think"))
def test_plain_jinja2_escapes_nothing_that_the_template_writes(tokenizer, template):
    """Older servers render in jinja2's own sandbox, whose `tojson` gives markup, sorts keys and escapes `<`: other
    prompts than the trained ones, but the tags stay tags and the values stay what they are."""
    def raise_exception(text): raise ValueError(text)
    environment = ImmutableSandboxedEnvironment(loader=jinja2.BaseLoader(), trim_blocks=True, lstrip_blocks=True)
    calls = [{"function": {"name": "f", "arguments": {"z": "<\u00e9>", "a": 1}}}]
    messages = [{"role": "user", "content": "<b>"}, {"role": "assistant", "content": "", "tool_calls": calls}]
    tools = [{"function": {"name": "f", "description": "a'b", "parameters": {"type": "dict", "properties": {}}}}]
    text = environment.from_string(chat_template(template)).render(
        messages=messages, tools=tools, add_generation_prompt=True, raise_exception=raise_exception)
    trained = render_chat(messages, tools, tokenizer, template, add_generation_prompt=True)
    assert text != trained and "&" not in text
    def lines(text): return [json.loads(line) if line.startswith("{") and "<function-name>" not in line
                             else line for line in text.splitlines()]
    assert lines(text) == lines(trained)
