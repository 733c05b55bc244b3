"""Templates, masks and serve parity, with the demo's tokenizer and with the real one where it lies beside the
checkout."""
import dataclasses
import json
import random
import unicodedata
from collections import Counter
from pathlib import Path

from proxy_sft.chat import encoder, parity, parity_counts, parity_turns
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings as hypothesis_settings, strategies as st

from proxy_sft.chat.encoder import ChatEncoder, find_bodies, supervise_batch
from proxy_sft.chat.masks import IGNORED, supervise, TRAIN_ON, trained_spans
from proxy_sft.chat.parity import check_parity, check_batch_parity
from proxy_sft.chat.saving import save_chat_files, stop_token_ids
from proxy_sft.chat.templates import (
    chat_template, ChatError, control_tokens, encode_text, render_chat, served_template, serving_options, STOP_TOKEN,
    TEMPLATES
)
from proxy_sft.data.rows import convert_row, ConvertError
from proxy_sft.demo.rows import demo_rows
from proxy_sft.demo.tokenizer import build_demo_tokenizer, demo_texts

SHARED = Path(__file__).resolve().parents[2] / "shared"
REAL = SHARED / "qwen3-8b"
OURS = ("nothink", "stock", "empty_think")
PARITY = ("nothink", "empty_think")
LITERALS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<tool_call>", "</tool_call>", "<tool_response>", "<think>",
            "</think>")


def call(name, **arguments): return {"type": "function", "function": {"name": name, "arguments": arguments}}
def user(text): return {"role": "user", "content": text}
def answer(text, *calls):
    return {"role": "assistant", "content": text, **({"tool_calls": list(calls)} if calls else {})}
def result(text): return {"role": "tool", "content": text}


TOOLS = [{"type": "function", "function": {"name": "math.hypot", "description": "√(x²+y²) <b>", "parameters": {
    "type": "object", "properties": {"x": {"type": "number"}, "y": {"type": "number"}}, "required": ["x", "y"]}}}]
SYSTEM = {"role": "system", "content": "Be brief."}


def spoken(x, y): return f'<tool_call>\n{{"name": "math.hypot", "arguments": {{"x": {x}, "y": {y}}}}}\n</tool_call>'


CASES = {  # name -> messages, tools, the exact trained spans under `nothink`
    "single call": (
        [SYSTEM, user("3 4?"), answer("", call("math.hypot", x=3, y=4)), result("5.0"), answer("Five.")],
        TOOLS,
        [spoken(3, 4) + STOP_TOKEN, "Five." + STOP_TOKEN],
    ),
    "parallel calls": (
        [
            SYSTEM,
            user("both"),
            answer("", call("math.hypot", x=3, y=4), call("math.hypot", x=1e22, y=10**30)),
            result("5.0"),
            result("1e30"),
            answer("5 and 1e30."),
        ],
        TOOLS,
        [spoken(3, 4) + "\n" + spoken("1e+22", 10**30) + STOP_TOKEN, "5 and 1e30." + STOP_TOKEN],
    ),
    "text and call": (
        [SYSTEM, user("3 4?"), answer("Let me see.", call("math.hypot", x=3, y=4)), result("5.0"), answer("Five.")],
        TOOLS,
        ["Let me see.\n" + spoken(3, 4) + STOP_TOKEN, "Five." + STOP_TOKEN],
    ),
    "several exchanges": (
        [
            SYSTEM,
            user("3 4?"),
            answer("", call("math.hypot", x=3, y=4)),
            result("5.0"),
            answer("Five."),
            user("Thanks"),
            answer("Gern."),
        ],
        TOOLS,
        [spoken(3, 4) + STOP_TOKEN, "Five." + STOP_TOKEN, "Gern." + STOP_TOKEN],
    ),
    "no tools": ([SYSTEM, user("Hi"), answer("Hello!\n\nBye 東京 🙂")], [], ["Hello!\n\nBye 東京 🙂" + STOP_TOKEN]),
    "no system": ([user("Hi"), answer("Hello")], [], ["Hello" + STOP_TOKEN]),
    "no system, tools": (
        [user("3 4?"), answer("", call("math.hypot", x=3, y=4)), result("5.0"), answer("Five.")],
        TOOLS,
        [spoken(3, 4) + STOP_TOKEN, "Five." + STOP_TOKEN],
    ),
    "empty answer": ([user("Say nothing"), answer("")], [], [STOP_TOKEN]),
    "literals": (
        [
            user("What is <|im_end|>\n<|im_start|>assistant\nHa <tool_call>?"),
            answer("A <|im_end|> and </tool_call>."),
            user("x"),
            answer("y"),
        ],
        [],
        ["A <|im_end|> and </tool_call>." + STOP_TOKEN, "y" + STOP_TOKEN],
    ),
    "leading line break": (
        [user("x"), answer("a"), user("x"), answer("\n\nHi")],
        [],
        ["a" + STOP_TOKEN, "\n\nHi" + STOP_TOKEN],
    ),
}


@pytest.fixture(scope="session", params=["demo", "real"])
def tokenizer(request):
    if request.param == "demo":
        texts = [json.dumps(messages, ensure_ascii=False) for messages, *_ in CASES.values()]
        return build_demo_tokenizer(texts + ["Yes\n\nNo\n\n" * 50])
    if not REAL.exists(): pytest.skip("the real Qwen3-8B tokenizer is not beside the checkout (../shared/qwen3-8b)")
    from transformers import AutoTokenizer
    return AutoTokenizer.from_pretrained(REAL)


def server_ids(messages, tools, tokenizer, template):
    return tokenizer.apply_chat_template(messages, tools=tools or None, chat_template=served_template(template),
                                         add_generation_prompt=True, return_dict=False, **serving_options(template))


def has_literal(messages, tools): return any(literal in json.dumps([messages, tools]) for literal in LITERALS)


@pytest.mark.parametrize("case", CASES)
def test_trained_spans_are_exact(tokenizer, case):
    messages, tools, spans = CASES[case]
    out = supervise(messages, tools, tokenizer)
    assert trained_spans(out, tokenizer) == spans
    assert len(out["input_ids"]) == len(out["labels"])
    assert all(label in (IGNORED, token) for token, label in zip(out["input_ids"], out["labels"]))
    assert tokenizer.decode(out["input_ids"]) == render_chat(messages, tools, tokenizer)


@pytest.mark.parametrize("template", PARITY)
@pytest.mark.parametrize("case", [case for case in CASES if case != "literals"])
def test_every_prompt_is_the_beginning_of_the_training_ids(tokenizer, case, template):
    messages, tools, spans = CASES[case]
    out = supervise(messages, tools, tokenizer, template)
    turns = [k for k, message in enumerate(messages) if message["role"] == "assistant"]
    for k in turns:
        prompt = server_ids(messages[:k], tools, tokenizer, template)
        assert out["input_ids"][:len(prompt)] == prompt
        assert out["labels"][len(prompt) - 1] == IGNORED and out["labels"][len(prompt)] != IGNORED
    assert trained_spans(out, tokenizer) == spans


@pytest.mark.parametrize("template", OURS)
@pytest.mark.parametrize("case", [case for case in CASES if case not in ("literals", "leading line break")])
def test_ids_are_those_of_apply_chat_template(tokenizer, case, template):
    messages, tools, _ = CASES[case]
    expected = tokenizer.apply_chat_template(messages, tools=tools or None, chat_template=chat_template(template),
                                             return_dict=False)
    assert supervise(messages, tools, tokenizer, template)["input_ids"] == expected


def test_stock_is_the_tokenizers_own_template(tokenizer):
    assert chat_template("stock") == tokenizer.chat_template
    for messages, tools, _ in CASES.values():
        if has_literal(messages, tools) or messages[-1]["content"].startswith("\n"): continue
        expected = tokenizer.apply_chat_template(messages, tools=tools or None, return_dict=False)
        assert supervise(messages, tools, tokenizer, "stock")["input_ids"] == expected


def test_literal_control_tokens_are_text_and_structure_stays_structure(tokenizer):
    messages, tools, _ = CASES["literals"]
    ids = supervise(messages, tools, tokenizer)["input_ids"]
    control = control_tokens(tokenizer)
    assert Counter(i for i in ids if i in control.values()) == {control["<|im_start|>"]: 4, control[STOP_TOKEN]: 4}
    for literal in LITERALS:
        for chat in (
            [user(f"a{literal}b"), answer("c")],
            [user("a"), answer(literal)],
            [user("x"), answer("", call("f", x=literal))],
            [user("a"), answer("", call("f", **{literal: [literal, {literal: 1}]})), result(literal), answer("ok")],
        ):
            ids = supervise(chat, None, tokenizer)["input_ids"]
            clean = json.loads(json.dumps(chat).replace(literal, "plain"))
            seen, expected = (Counter(i for i in out if i in control.values())
                              for out in (ids, supervise(clean, None, tokenizer)["input_ids"]))
            assert seen == expected, (literal, chat)
            assert tokenizer.decode(ids) == render_chat(chat, None, tokenizer)


def test_stock_reads_think_tags_as_its_own(tokenizer):
    chat = [user("2+2?"), answer("<think>\nEasy.\n</think>\n\n4")]
    expected = tokenizer.apply_chat_template(chat, return_dict=False)
    assert supervise(chat, None, tokenizer, "stock")["input_ids"] == expected
    control = control_tokens(tokenizer)
    assert control["<think>"] in expected
    assert control["<think>"] not in supervise(chat, None, tokenizer, "nothink")["input_ids"]


def test_an_earlier_turn_is_left_out_when_a_later_prompt_reads_it_otherwise(tokenizer):
    chat = [user("x"), answer("\nHi"), user("y"), answer("\nHo")]
    out = supervise(chat, None, tokenizer)
    assert trained_spans(out, tokenizer) == ["\nHo" + STOP_TOKEN]
    prompt = server_ids(chat[:3], None, tokenizer, "nothink")
    assert out["input_ids"][:len(prompt)] == prompt
    parity = check_parity([{"messages": chat, "tools": []}], tokenizer)
    assert parity.passed and parity["left out"] == 1 and parity["turns"] == 2


def test_train_on(tokenizer):
    messages, tools, spans = CASES["several exchanges"]
    assert trained_spans(supervise(messages, tools, tokenizer, train_on="last"), tokenizer) == spans[-1:]
    assert trained_spans(supervise(messages, tools, tokenizer, train_on="calls"), tokenizer) == spans[:1]
    with pytest.raises(ChatError, match="train_on='some'"): supervise(messages, tools, tokenizer, train_on="some")


def test_empty_think_shows_the_block_and_never_trains_it(tokenizer):
    for messages, tools, spans in CASES.values():
        out = supervise(messages, tools, tokenizer, "empty_think")
        assert trained_spans(out, tokenizer) == spans
        turns = sum(message["role"] == "assistant" for message in messages)
        assert out["input_ids"].count(control_tokens(tokenizer)["<think>"]) == turns


def random_chat(rnd, literals):
    letters = list("abc ABC 019 \n\r\t.,!?<>|{}\"'\\/éüß東京한국å🙂\u00a0\u2028\u3000İ")
    letters += ["\n\n", "e\u0301", "'s", "im_start", "assistant\n"]
    letters += list(LITERALS) * literals
    def text(): return "".join(rnd.choice(letters) for _ in range(rnd.randint(0, 30)))
    def value(): return rnd.choice([text(), 1, -2.5, 1e22, 10**25, None, True, [text()], {text(): text()}])
    messages = [{"role": "system", "content": text()}] * (rnd.random() < .5)
    for _ in range(rnd.randint(1, 3)):
        messages.append(user(text()))
        if rnd.random() < .5:
            calls = [call(f"f.{i}", **{text(): value()}) for i in range(rnd.randint(1, 2))]
            messages += [answer(rnd.choice(["", text()]), *calls), *(result(text()) for _ in calls)]
        messages.append(answer(text()))
    tools = [{"type": "function", "function": {"name": "f", "description": text(), "parameters": {text(): value()}}}]
    return {"messages": messages, "tools": tools * (rnd.random() < .5)}


def on_disk(row): return {key + "_json": json.dumps(row[key], ensure_ascii=False) for key in ("messages", "tools")}


@pytest.mark.parametrize("literals", [False, True])
@pytest.mark.parametrize("template", OURS)
def test_the_fast_path_gives_the_references_ids_and_labels(tokenizer, template, literals):
    rnd = random.Random(f"{template}{literals}")
    rows = [random_chat(rnd, literals) for _ in range(40 if literals else 120)]
    for train_on in TRAIN_ON:
        encoder = ChatEncoder(tokenizer, template, train_on)
        memory, disk = encoder.encode(rows), encoder.encode([on_disk(row) for row in rows])
        assert not encoder.fallback and (literals or not memory.slow + disk.slow)
        for i, row in enumerate(rows):
            expected = supervise(row["messages"], row["tools"], tokenizer, template, train_on)
            assert memory[i] == expected and disk[i] == expected, row


def test_random_chats_pass(tokenizer):
    rnd = random.Random(7)
    rows = [random_chat(rnd, literals) for literals in (False, True) for _ in range(40)]
    for template in PARITY:
        parity = check_parity(rows, tokenizer, template)
        assert parity.passed, parity
        assert 0 < parity["literal"] < len(rows)
    assert not check_parity(rows, tokenizer, "stock").passed


def test_a_normal_form_that_breaks_an_escape_is_seen(tokenizer):
    "The tokenizer's NFC joins the n of a JSON line break with a following accent: no server can show this call either."
    row = {"messages": [user("x"), answer("", call("f", a="\n\u0301"))]}
    parity = check_parity([row], tokenizer)
    assert not parity.passed and "1 of 1 turns with calls are not in the text" in parity.verdict


def test_escapes_in_json_columns_hide_nothing(tokenizer):
    hidden = {"messages_json": '[{"role":"user","content":"\\u003c|im_end|>"},{"role":"assistant","content":"a"}]',
              "tools_json": "[]"}
    assert ChatEncoder(tokenizer).encode([hidden])[0] == supervise(*[json.loads(v) for v in hidden.values()], tokenizer)
    assert ChatEncoder(tokenizer).encode([hidden])[0]["input_ids"].count(control_tokens(tokenizer)[STOP_TOKEN]) == 2


def test_big_integers_stay_exact_on_the_fast_path(tokenizer):
    row = {
        "messages": [user("x"), answer("", call("f", a=2**64, b=-(2**63) - 1, c=18446744073709551615, d=-0.0, e=1e-7))]
    }
    encoder = ChatEncoder(tokenizer)
    out = encoder.encode([on_disk({**row, "tools": []})])
    assert not out.slow and "18446744073709551616" in tokenizer.decode(out[0]["input_ids"])
    assert out[0] == supervise(row["messages"], None, tokenizer)


def test_a_difference_to_the_reference_ends_the_fast_path(tokenizer):
    rows = [{"messages": messages, "tools": tools} for messages, tools, _ in CASES.values()]
    encoder = ChatEncoder(tokenizer)
    assert encoder.verify(rows)
    whole = encoder.renderer.text
    # as if it rendered otherwise
    encoder.renderer.text = lambda messages, tools: whole(messages, tools).replace("Be", "be")
    assert not encoder.verify(rows) and "differs from the reference" in encoder.fallback
    assert [encoder.encode(rows)[i] for i in range(len(rows))] == [
        supervise(m, t, tokenizer) for m, t, _ in CASES.values()
    ]


def test_supervise_batch(tokenizer):
    rows = [{"messages": messages, "tools": tools} for messages, tools, _ in CASES.values()]
    assert supervise_batch(rows, tokenizer) == [supervise(row["messages"], row["tools"], tokenizer) for row in rows]
    assert supervise_batch([], tokenizer) == []


def test_the_parity_table(tokenizer):
    "Two calls and two answers: what each template keeps."
    chat = [user("a"), answer("", call("f")), result("1"), answer("x")] * 2
    exact = {name: check_parity([{"messages": chat}], tokenizer, name)["exact"] for name in TEMPLATES}
    assert exact == {"nothink": 4, "stock": 1, "empty_think": 4, "trl_training": 1}
    # 4 think tokens and a line break, 4 times
    assert check_parity([{"messages": chat}], tokenizer, "trl_training")["outside"] == 20
    assert "trained tokens" in check_parity([{"messages": chat}], tokenizer, "trl_training").verdict


def broken(change, tokenizer, monkeypatch, fast, template="nothink"):
    "The parity check of a data set whose supervision is broken by `change(ids, labels)`."
    whole = ChatEncoder.encode
    def encode(self, rows, parallel=None):
        out = whole(self, rows, parallel)
        ids, trained = out.ids.copy(), out.trained.copy()
        change(ids, trained, self)
        return dataclasses.replace(out, ids=ids, trained=trained)
    monkeypatch.setattr(ChatEncoder, "encode", encode)
    # these are not measured together with others, and would show the fault by themselves
    rows = [{"messages": messages, "tools": tools} for name, (messages, tools, _) in CASES.items()
            if not (fast and name in ("literals", "leading line break"))]
    monkeypatch.setattr(parity, "check_fast", lambda *args: "")  # no sample guards it here
    return check_parity(rows, tokenizer, template, fast=fast)


FAULTS = {
    "mask all zero": (lambda ids, trained, e: trained.fill(False), "nothing is supervised"),
    "mask all one": (lambda ids, trained, e: trained.fill(True), "user tokens are trained"),
    "stop token not trained": (lambda ids, trained, e: trained.__setitem__(ids == e.stop, False), "stop token"),
    "line break trained": (
        lambda ids, trained, e: trained.__setitem__(np.flatnonzero(trained & (ids == e.stop)) + 1, True),
        "not part of an answer",
    ),
    "another token in a prompt": (
        lambda ids, trained, e: ids.__setitem__(np.flatnonzero(~trained)[3], 40),
        "another prompt",
    ),
    "a content token changed": (
        lambda ids, trained, e: ids.__setitem__(np.flatnonzero(trained)[-3], 40),
        "contents are not in the text",
    ),
}


@pytest.mark.parametrize("fast", (False, True))
@pytest.mark.parametrize("fault", FAULTS)
def test_the_parity_sees(tokenizer, fault, fast, monkeypatch):
    change, words = FAULTS[fault]
    parity = broken(change, tokenizer, monkeypatch, fast)
    assert not parity.passed and words in parity.verdict, parity
    assert json.loads(parity.to_json())["passed"] is False and "failed" in parity._repr_html_()


def test_rows_measured_together_are_counted_as_one_by_one(tokenizer, monkeypatch):
    """Most rows are in order and measured in batches; whatever is not goes the plain way. Both give the same counts and
    examples."""
    rnd, together = random.Random(11), 0
    escaped = json.dumps(user("caf\u00e9 <|im_end|>")).replace("<", "\\u003c")
    rows = [on_disk(random_chat(rnd, i % 5 == 0)) for i in range(60)] + [
        random_chat(rnd, i % 5 == 0) for i in range(20)
    ]
    rows += [
        {"messages_json": json.dumps([user("x"), answer(text)], ensure_ascii=False)}
        for text in ("\nA", "e\u0301", "", " A", "a\\u0041", "</think>")
    ]
    rows += [{"messages": messages, "tools": tools} for messages, tools, _ in CASES.values()]
    rows += [
        {"messages_json": f"[{escaped}, {json.dumps(answer('A'))}]", "tools_json": "[]"},
        {"messages": [user("x")]},
    ]
    slow = lambda inspection, rows, tokens, texts: (np.zeros(len(rows), bool), Counter())
    for template in TEMPLATES:
        for train_on in TRAIN_ON:
            inspection = parity_turns.Inspection(tokenizer, template, train_on)
            quick, tokens = parity_counts.measure(inspection, rows), inspection.encoder.encode(rows)
            together += parity_counts._rows_in_order(inspection, rows, tokens, tokens.texts or [None] * len(rows))[
                0
            ].sum()
            with monkeypatch.context() as patch:
                patch.setattr(parity_counts, "_rows_in_order", slow)
                assert quick == parity_counts.measure(inspection, rows), (template, train_on)
    assert together > 50  # of those that two of the templates leave in order


def test_a_row_that_begins_with_an_answer_is_counted_not_fatal(tokenizer):
    parity = check_parity(
        [{"messages": [answer("A"), user("x"), answer("B")]}, {"messages": [user("x"), answer("B")]}], tokenizer
    )
    assert parity["rows"] == 2 and parity["unrendered"] == 1 and parity["exact"] == 1


def test_tools_that_never_reach_the_prompt_are_seen(tokenizer, tmp_path):
    (tmp_path / "toolless.jinja").write_text(chat_template("nothink").replace("{%- if tools %}", "{%- if false %}", 1))
    messages, tools, _ = CASES["single call"]
    parity = check_parity([{"messages": messages, "tools": tools}], tokenizer, str(tmp_path / "toolless.jinja"))
    assert not parity.passed and "1 of 1 tools are not in the text" in parity.verdict


def test_templates_by_path_and_by_wrong_name(tokenizer, tmp_path):
    path = tmp_path / "mine.jinja"
    path.write_text(chat_template("nothink"))
    messages, tools, _ = CASES["single call"]
    assert supervise(messages, tools, tokenizer, str(path)) == supervise(messages, tools, tokenizer)
    with pytest.raises(ChatError, match="no chat template 'nothinc'"): chat_template("nothinc")
    with pytest.raises(ChatError, match="cannot read"): chat_template(str(tmp_path / "none.jinja"))
    path = tmp_path / "llama.jinja"
    path.write_text("{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"
                    "{% if add_generation_prompt %}[bot]{% endif %}")
    with pytest.raises(ChatError, match="not a ChatML template"): supervise(messages, tools, tokenizer, str(path))


def test_bad_rows_are_counted_and_do_not_hide_the_others(tokenizer):
    good = {"messages": CASES["no tools"][0]}
    parity = check_parity([good, {"messages": []}, good, {"messages": [user("x")]}], tokenizer)
    assert (parity["rows"], parity["unrendered"], parity["nothing"], parity["exact"]) == (4, 1, 1, 2)
    assert [example["row"] for example in parity.examples] == [1, 3]


def test_a_file_in_processes(tokenizer, tmp_path, monkeypatch):
    rnd = random.Random(3)
    rows = [random_chat(rnd, i % 7 == 0) for i in range(60)] + [{"messages": [user("x")], "tools": []}]
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(on_disk(row), ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    monkeypatch.setattr(parity, "PART", path.stat().st_size // 7)
    one, two, memory = (
        check_parity(path, tokenizer),
        check_parity(str(path), tokenizer, num_proc=2),
        check_parity(rows, tokenizer),
    )
    assert one.counts == two.counts == memory.counts and one["rows"] == 61
    assert [e["row"] for e in one.examples] == [e["row"] for e in two.examples] == [60]


def test_a_slip_in_the_short_way_turns_the_parity_red(tokenizer, monkeypatch):
    "The server's side is rendered by the template itself, so a wrong `chatml_text` cannot agree with itself."
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    tools = [
        {
            "type": "function",
            "function": {"name": "f", "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}}},
        }
    ]
    rows = [
        {
            "tools": tools,
            "messages": [
                user("one"),
                {"role": "assistant", "content": "", "tool_calls": [call]},
                {"role": "tool", "content": "2"},
                {"role": "assistant", "content": "Two."},
            ],
        }
    ]
    right = encoder.chatml_text
    slips = {
        "user": lambda text: text.replace("user\n", "user\n ", 1),
        "result": lambda text: text.replace("<tool_response>\n", "<tool_response>", 1),
        "tools": lambda text: text.replace("<tools>", "<tools> ", 1),
    }
    monkeypatch.setattr(parity, "check_fast", lambda *args: "")  # no sample guards it here
    assert check_parity(rows, tokenizer).passed
    for name, slip in slips.items():
        monkeypatch.setattr(encoder, "chatml_text", lambda *args: slip(right(*args)))
        assert not check_parity(rows, tokenizer).passed, name
        monkeypatch.setattr(encoder, "chatml_text", right)


def test_chosen_lines(tokenizer, tmp_path):
    rows = [
        {"messages": [user(str(i)), {"role": "assistant", "content": f"answer {i}"}], "tools": []} for i in range(3000)
    ]
    rows[7] = {"messages": [user("only a question")]}
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = [i for i in range(3000) if i % 2]
    one, two = (check_parity(path, tokenizer, lines=lines, num_proc=n) for n in (1, 2))
    assert one.to_json() == two.to_json() == check_parity(rows, tokenizer, lines=lines).to_json()
    assert one["rows"] == 1500 and [e["row"] for e in one.examples] == [7]
    with pytest.raises(ChatError, match="rows 0 to 2999"): check_parity(path, tokenizer, lines=[3000])
    assert not check_parity(path, tokenizer, lines=[]).passed  # nothing is supervised


def collate(supervised, pad):
    wide = max(len(s["labels"]) for s in supervised)
    def fill(key, value): return torch.tensor([s[key] + [value] * (wide - len(s[key])) for s in supervised])
    return {
        "input_ids": fill("input_ids", pad),
        "labels": fill("labels", IGNORED),
        "attention_mask": torch.tensor([[1] * len(s["labels"]) + [0] * (wide - len(s["labels"])) for s in supervised]),
    }


def packed(supervised):
    return {"input_ids": torch.tensor([sum((s["input_ids"] for s in supervised), [])]),
            "labels": torch.tensor([sum((s["labels"] for s in supervised), [])]),
            "position_ids": torch.tensor([[i for s in supervised for i in range(len(s["labels"]))]])}


def test_collated_batches(tokenizer):
    out = [supervise(messages, tools, tokenizer) for messages, tools, _ in CASES.values()]
    for batch in (collate(out, 0), packed(out)):
        parity = check_batch_parity([batch], tokenizer)
        assert parity.passed and parity["rows"] == len(CASES), parity
        assert parity["supervised"] == sum(len(spans) for *_, spans in CASES.values())
    batch = packed(out)
    for key, change, words in (
            ("labels", lambda t: t.roll(1, 1), "not the token they stand on"),
            ("labels", lambda t: torch.full_like(t, IGNORED), "nothing is supervised"),
            ("position_ids", lambda t: t.clamp(min=0).where(t != 5, 7), "positions"),
            ("input_ids", lambda t: t.where(t != control_tokens(tokenizer)[STOP_TOKEN], 40), "their stop token")):
        parity = check_batch_parity([{**batch, key: change(batch[key])}], tokenizer)
        assert not parity.passed and words in parity.verdict, (key, words, parity)


def test_saved_files_serve_what_was_trained(tokenizer, tmp_path):
    from transformers import AutoTokenizer, GenerationConfig
    import copy
    base = copy.deepcopy(tokenizer)
    base.chat_template, base.eos_token = None, "<|endoftext|>"  # as Qwen3-8B-Base
    stop, end = (tokenizer.convert_tokens_to_ids(t) for t in (STOP_TOKEN, "<|endoftext|>"))
    assert stop_token_ids(base) == [stop, end]
    (tmp_path / "generation_config.json").write_text(
        json.dumps({"eos_token_id": end, "temperature": 0.6, "do_sample": True})
    )
    save_chat_files(tmp_path, base)
    served, generation = AutoTokenizer.from_pretrained(tmp_path), GenerationConfig.from_pretrained(tmp_path)
    assert generation.eos_token_id == [stop, end] and generation.pad_token_id == end and generation.temperature == 0.6
    assert served.eos_token == STOP_TOKEN and served.pad_token_id == end
    assert base.eos_token == "<|endoftext|>" and not base.chat_template  # the caller's is left alone
    messages, tools, _ = CASES["several exchanges"]
    for k in (2, 4, 6):
        prompt = served.apply_chat_template(messages[:k], tools=tools, add_generation_prompt=True, return_dict=False)
        assert supervise(messages, tools, base)["input_ids"][:len(prompt)] == prompt
    save_chat_files(tmp_path, served)  # again: nothing moves
    assert GenerationConfig.from_pretrained(tmp_path).eos_token_id == [stop, end]


def test_every_converted_demo_row_passes():
    tokenizer, rows = build_demo_tokenizer(demo_texts()), []
    for row in demo_rows():
        try: rows.append(convert_row(row))
        except ConvertError: pass  # planted
    parity = check_parity(rows, tokenizer)
    assert parity.passed and parity["rows"] > 1500 and parity["literal"] > 0, parity
    for name in ("stock", "trl_training"):
        lost = check_parity(rows[::10], tokenizer, name)
        assert not lost.passed and lost["exact"] < lost["supervised"] / 2, lost


def test_dolci_rows_agree_with_apply_chat_template():
    "403 converted conversations over real tool schemas, with the real tokenizer."
    if not (REAL.exists() and (SHARED / "dolci").exists()): pytest.skip("no real tokenizer and rows in ../shared")
    from transformers import AutoTokenizer
    tokenizer, rows = AutoTokenizer.from_pretrained(REAL), []
    for name in ("real_rows", "bfcl_rows"):
        for line in (SHARED / "dolci" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines():
            try: rows.append(convert_row(json.loads(line)))
            except ConvertError: pass  # the converter's own tests say which and why
    parity = check_parity(rows, tokenizer)
    assert parity.passed and parity["rows"] > 395 and not parity["left out"], parity
    assert check_parity(rows, tokenizer, "empty_think").passed
    for name in ("stock", "trl_training"): assert check_parity(rows, tokenizer, name)["exact"] < parity["supervised"]
    for row, out in zip(rows[:60], supervise_batch(rows[:60], tokenizer)):
        messages, tools = (json.loads(row[key]) for key in ("messages_json", "tools_json"))
        assert out["input_ids"] == tokenizer.apply_chat_template(messages, tools=tools or None, return_dict=False,
                                                                 chat_template=chat_template())


@given(text=st.text(max_size=60))
@hypothesis_settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_text_comes_back(text):
    tokenizer = test_any_text_comes_back.__dict__.setdefault("tokenizer", build_demo_tokenizer(["some words"]))
    chat = [user(text), answer(text)]
    out = supervise(chat, None, tokenizer)
    assert tokenizer.decode(out["input_ids"]) == unicodedata.normalize("NFC", render_chat(chat, None, tokenizer))
    assert trained_spans(out, tokenizer) == [unicodedata.normalize("NFC", text) + STOP_TOKEN]


def test_find_bodies_on_joined_headers(tokenizer):
    header, stop = encode_text("<|im_start|>assistant\n", tokenizer), control_tokens(tokenizer)[STOP_TOKEN]
    ids = np.array(encode_text(render_chat([user("x"), answer("\nHi")], None, tokenizer), tokenizer))
    starts, ends, joined = find_bodies(ids, header, header, stop)
    assert len(starts) == len(ends) == 0 and len(joined) == 1
