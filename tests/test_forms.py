"""Rows in other forms: OpenAI's calls, tools, results and loss switches, and what is not known in them."""
import json

import numpy as np
import pytest

from proxy_sft.chat.encoder import ChatEncoder, supervise_batch
from proxy_sft.chat.masks import supervise, trained_spans
from proxy_sft.chat.parity import check_parity
from proxy_sft.data.rows import convert_row, ConvertError, read_row
from proxy_sft.demo.model import write_demo_model

TOOLS = [{"type": "function", "function": {"name": "weather.now", "parameters": {
    "type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}},
    {"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}}}]


def call(name="weather.now", arguments='{"city": "Oslo"}', **more):
    return {"type": "function", "function": {"name": name, "arguments": arguments}, **more}


def row(*messages, tools=TOOLS, **more): return {"id": "r", "tools": tools, "messages": list(messages), **more}


def user(text="Weather?"): return {"role": "user", "content": text}
def answer(text="Snow.", **more): return {"role": "assistant", "content": text, **more}
def result(text="snow", **more): return {"role": "tool", "content": text, **more}


def messages_of(given, **options): return json.loads(convert_row(given, **options)["messages_json"])


def reason_of(given, **options):
    try: convert_row(given, **options)
    except ConvertError as error: return error.reason
    return None


def found_of(given):
    with pytest.raises(ConvertError) as caught: convert_row(given)
    return str(caught.value)


def calls_of(messages): return [[c["function"] for c in m["tool_calls"]] for m in messages if m.get("tool_calls")]


# Calls

OSLO = {"name": "weather.now", "arguments": {"city": "Oslo"}}


@pytest.mark.parametrize("made", [
    {"tool_calls": [call()]}, {"tool_calls": [call(arguments={"city": "Oslo"})]},
    {"tool_calls": [call(id="a", index=0)]},
    {"tool_calls": [call()["function"]]}, {"tool_calls": json.dumps([call()])}, {"tool_calls": call()},
    {"function_call": call()["function"]}, {"function_calls": 'weather.now(city="Oslo")'},
    {"function_calls": 'weather.now(city="Oslo")', "tool_calls": None},
    {"tool_calls": [call()], "function_calls": "null"}])
@pytest.mark.parametrize("role", ["tool", "function", "environment"])
def test_calls_in_every_form_are_read(made, role):
    messages = messages_of(row(user(), answer(None, **made), {"role": role, "content": "snow"}, answer()))
    assert calls_of(messages) == [[OSLO]]
    assert [m["role"] for m in messages] == ["user", "assistant", "tool", "assistant"]


@pytest.mark.parametrize("tools", [
    TOOLS, json.dumps(TOOLS), [t["function"] for t in TOOLS], [{"type": "function", **t["function"]} for t in TOOLS]])
@pytest.mark.parametrize("column", ["tools", "functions"])
def test_tools_of_a_row_are_read(tools, column):
    given = row(user(), answer("", tool_calls=[call()]), result(), answer())
    del given["tools"]
    assert json.loads(convert_row({**given, column: tools})["tools_json"]) == TOOLS
    assert reason_of(given) == "undeclared_function" and reason_of({**given, column: "[]"}) == "undeclared_function"
    on_system = row({"role": "system", "content": "Be brief.", column: tools}, *given["messages"], tools=None)
    assert json.loads(convert_row(on_system)["tools_json"]) == TOOLS


def test_two_lists_of_tools_have_to_be_the_same():
    given = row(user(), answer(), functions=json.dumps(TOOLS))
    assert reason_of(given) is None and reason_of({**given, "functions": TOOLS[:1]}) == "tools_elsewhere"


def test_results_go_to_the_call_that_they_name():
    calls = [call(id="a"), call("clock", "{}", id="b"), call(arguments={"city": "Rome"}, id="c")]
    turn = answer("Let me see.", tool_calls=calls)
    results = [result("r", tool_call_id="c"), result("o", tool_call_id="a"),
               result("c", tool_call_id="b", name="clock")]
    messages = messages_of(row(user(), turn, *results, answer()))
    assert [m["content"] for m in messages if m["role"] == "tool"] == ["o", "c",
            "r"] and messages[1]["content"] == "Let me see."
    for wrong in (results[:2], [*results, result("x", tool_call_id="d")], [*results[:2], result("x", tool_call_id="a")],
                  [*results[:2], result("x")], [*results[:2], result("x", tool_call_id="b", name="weather.now")]):
        assert reason_of(row(user(), turn, *wrong, answer())) == "count_mismatch", wrong
    by_order = row(user(), answer(None, tool_calls=[call(), call("clock", "")]), result(name="weather.now"), result(),
                   answer())
    assert reason_of(by_order) is None


@pytest.mark.parametrize("made, reason", [
    ([call(arguments="[1]")], "malformed_calls"), ([call(arguments="{'city': 'Oslo'}")], "malformed_calls"),
    ([call(arguments='{"city": "Oslo"} {}')], "malformed_calls"),
    ([call(arguments='{"city": "a", "city": "b"}')], "malformed_calls"),
    ([call(arguments='{"city": NaN}')], "malformed_calls"), ([call(arguments=3)], "malformed_calls"),
    ([call(arguments=json.dumps(json.dumps({"city": "Oslo"})))], "malformed_calls"), ([{"id": "a"}], "malformed_calls"),
    ([call(name="")], "malformed_calls"), ([call(name=None)], "malformed_calls"), (["weather.now"], "malformed_calls"),
    ([{**call(), "type": "custom"}], "malformed_calls"), ("[", "malformed_calls"), (3, "malformed_calls"),
    ([call(thought="why")], "unknown_field"), ([call("other")], "undeclared_function"),
    ([call(arguments={"city": 1})], "schema_violation"), ([call("clock", '{"zone": "CET"}')], "schema_violation"),
    ([call(arguments={"city": "\ud83d"})], "surrogate_in_call"), ([call(arguments="[" * 5000)], "malformed_calls")])
def test_calls_without_a_reading_are_rejected(made, reason):
    assert reason_of(row(user(), answer(None, tool_calls=made), result(), answer())) == reason


def test_calls_in_two_places_and_on_others():
    both = row(user(), answer(None, tool_calls=[call()], function_calls='clock()'), result(), answer())
    assert reason_of(both) == "malformed_calls"
    assert reason_of(row({**user(), "tool_calls": [call()]}, answer())) == "calls_on_user"
    used = row(user(), answer(None, tool_calls=[call()]), result(tool_calls=[call()]), answer())
    assert reason_of(used) == "calls_on_environment"


def test_numbers_in_arguments_stay_exact():
    tool = {"name": "f", "parameters": {"properties": {"x": {}}}}
    for text in (str(2**64), "0.1", "1.0", "-0.0", str(10**40)):
        made = row(user(), answer(None, tool_calls=[call("f", f'{{"x": {text}}}')]), result(), answer(), tools=[tool])
        assert repr(calls_of(messages_of(made))[0][0]["arguments"]["x"]) == repr(json.loads(text))


# Fields

def test_reasoning_is_kept():
    for field in ("reasoning_content", "reasoning", "thinking"):
        messages = messages_of(row(user(), answer("Snow.", **{field: "Cold."})))
        assert messages[-1] == {"role": "assistant", "content": "Snow.", "reasoning_content": "Cold."}
    assert reason_of(row({**user(), "reasoning_content": "x"}, answer())) == "unknown_field"
    assert reason_of(row(user(), answer(reasoning="a", thinking="b"))) == "unknown_field"


@pytest.mark.parametrize("field, value", [
    ("citations", ["p. 3"]), ("prefix", True), ("audio", {"id": "a"}), ("refusal", "I can't."), ("name", "Alice"),
    ("tool_plan", "x"),
    ("images", ["a.png"]), ("value", "text"), ("weights", 0), ("function_cals", "f()")])
def test_a_field_that_is_not_known_and_holds_something_is_named(field, value):
    assert repr(field)[1:-1] in found_of(row(user(), answer(**{field: value})))
    assert reason_of(row(user(), answer(**{field: value}))) == "unknown_field"
    for empty in (None, "", [], {}): assert reason_of(row(user(), answer(**{field: empty}))) is None
    lenient = messages_of(row(user(), answer(), user(), answer(**{field: value})), strictness="lenient")
    assert [m["role"] for m in lenient] == ["user", "assistant"]


@pytest.mark.parametrize("field", ["is_trainable", "do_train", "loss_mask", "weights", "is_trained",
                                   "supervise", "end_turn"])
def test_a_switch_of_another_name_is_no_empty_field(field):
    assert reason_of(row(user(), answer(**{field: False}))) == "unknown_field"
    assert reason_of(row(user(), answer(prefix=False))) is None


@pytest.mark.parametrize("field, value", [
    ("available_tools", TOOLS), ("tool_definitions", json.dumps(TOOLS)), ("api_list", {"clock": TOOLS[1]}),
    ("toolset", TOOLS), ("train_on", "last"), ("train_on_inputs", True),
    ("loss_mask", [0, 1]), ("do_train", False), ("sample_weight", 0.5)])
def test_a_column_that_belongs_to_the_conversation_is_named(field, value):
    assert field in found_of(row(user(), answer(), **{field: value}))
    assert reason_of(row(user(), answer(), **{field: value})) == "unknown_field"


@pytest.mark.parametrize("field, value", [
    ("tool_names", ["clock"]), ("num_tools", 2), ("train_split", "train"), ("functions_used", "clock"),
    ("tool_choice", {"type": "function", "function": {"name": "clock"}}), ("available_tools", []), ("weight", 1)])
def test_a_column_about_the_row_is_no_hindrance(field, value):
    assert reason_of(row(user(), answer(), **{field: value})) is None


def test_what_only_says_who_and_when_is_no_hindrance():
    about = {"id": "m1", "timestamp": "2026-01-01", "model": "x", "finish_reason": "stop", "usage": {"total": 3}}
    assert reason_of(row({**user(), **about}, answer(**about))) is None
    assert reason_of(row(user(), answer(), system="Be brief.")) == reason_of(row(user(), answer(),
            weight=0)) == "unknown_field"
    assert reason_of(row(user(), answer(), parallel_tool_calls=False, tool_choice="auto", weight=1)) is None


def test_contents_in_parts():
    parts = [{"type": "text", "text": "Weather"}, {"type": "text", "text": "in Oslo?"}]
    messages = messages_of(row(user(parts), answer([{"type": "output_text", "text": "Snow."}])))
    assert messages[0]["content"] == "Weather\nin Oslo?"
    talk, *_ = read_row(row(user(parts), answer()))
    assert [code for code, *_ in talk.repairs] == ["content_parts"]
    for odd in ([{"type": "image_url", "image_url": "x"}], ["text"], [{"type": "text", "text": None}]):
        assert reason_of(row(user(odd), answer())) == "bad_message"


def test_a_developer_speaks_as_the_system():
    assert messages_of(row({"role": "developer", "content": "Be brief."}, user(), answer()))[0]["role"] == "system"


# What is trained

@pytest.mark.parametrize("off", [
    {"weight": 0}, {"weight": 0.0}, {"loss": False}, {"train": False}, {"training": 0}, {"trainable": False}])
def test_loss_switches_become_masks(off):
    messages = messages_of(row(user(), answer("One.", **off), user(), answer("Two.", **{k: 1 for k in off})))
    assert [m.get("train") for m in messages] == [None, False, None, None]


@pytest.mark.parametrize("odd", [
    {"weight": -1}, {"weight": "0"}, {"weight": float("nan")}, {"weight": float("inf")}, {"loss": 0.5},
    {"weight": 0.5, "train": False}, {"train": "no"}, {"loss": 2}, {"weight": 1, "train": False}])
def test_switches_without_a_mask_are_rejected(odd):
    assert reason_of(row(user(), answer(**odd))) == "loss_switch"


def test_switches_of_one_answer_agree_and_something_is_trained():
    assert reason_of(row(user(), answer("a", weight=0), answer("b"))) == "loss_switch"
    assert reason_of(row(user(), answer("a", weight=0), answer("b", weight=0))) == "no_assistant"
    assert reason_of(row(user(), answer("a", weight=0))) == "no_assistant"
    talk, *_ = read_row(row({**user(), "train": True}, answer(train=True)))
    assert [code for code, *_ in talk.flags] == ["loss_on_others"] and "train" not in talk.messages[-1]
    assert reason_of(row({**user(), "weight": 0}, answer())) is None
    dolci = {"messages": [user(), {**answer(None), "function_calls": "clock()", "train": False}, result(), answer()],
             "tools": TOOLS}
    assert [m.get("train") for m in messages_of(dolci)] == [None, False, None, None]


def test_a_weight_stays_on_its_answer():
    messages = messages_of(row(user(), answer("One.", weight=0.5), user(), answer("Two.", weight=1), user(),
                               answer("Three.", weight=2)))
    assert [m.get("weight") for m in messages if m["role"] == "assistant"] == [0.5, None, 2.0]
    assert reason_of(row(user(), answer("a", weight=0.5), answer("b"))) == "loss_switch"
    assert reason_of(row(user(), answer("a", weight=0.5), answer("b", weight=0.25))) == "loss_switch"
    assert messages_of(row(user(), answer("a", weight=0.5), answer("b", weight=0.5)))[-1]["weight"] == 0.5
    assert "weight" not in messages_of(row({**user(), "weight": 0.5}, answer()))[0]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from transformers import AutoTokenizer
    return AutoTokenizer.from_pretrained(write_demo_model(tmp_path_factory.mktemp("model"), seed=1, n=200))


@pytest.mark.parametrize("train_on", ["all", "last", "calls"])
@pytest.mark.parametrize("template", ["nothink", "empty_think", "stock"])
def test_weights_stand_on_the_tokens_of_their_answer_in_both_encoders(tokenizer, template, train_on):
    one = row(user(), answer("No.", weight=3, tool_calls=[call()]), result(), answer("Snow.", weight=0.25),
              user("And?"), answer("Sun."))
    two = row(user('What is the "weight" of it?'), answer("", tool_calls=[call(arguments={"city": "weight"})]))
    three = row(user(), answer("Off.", weight=0), user(), answer("On.", weight=1.1))
    rows = [convert_row(each) for each in (one, two, three)]
    encoder = ChatEncoder(tokenizer, template, train_on)
    found, slow = encoder.encode(rows), encoder.encode(rows).slow
    if not encoder.fallback: assert slow == 2  # a row without weights keeps the fast path
    for place, each in enumerate(rows):
        messages, tools = json.loads(each["messages_json"]), json.loads(each["tools_json"])
        expected = supervise(messages, tools, tokenizer, template, train_on)
        assert found[place] == expected
        spans = trained_spans(expected, tokenizer)
        runs, before = [], False
        for label, weight in zip(expected["labels"], expected.get("weights", [1.0] * len(expected["labels"]))):
            if label == -100: assert weight == 1
            elif not before: runs.append(weight)
            else: assert weight == runs[-1]
            before = label != -100
        words = {"Snow.": 0.25, "No.": 3, "Sun.": 1, "On.": 1.1}
        for span, weight in zip(spans, runs, strict=True):
            assert weight == next((w for word, w in words.items() if word in span), 1), span


def switched_rows():
    one = row(user(), answer("No.", weight=0, tool_calls=[call()]), result(), answer("Snow."), user("And now?"),
              answer("Sun.", train=False))
    two = row(user(), answer("Hm.", loss=False), user("Again?"), answer("", tool_calls=[call()]))
    three = row(user(), answer("Plain."), user(), answer("Yes."))
    return [convert_row(each) for each in (one, two, three, one)]


@pytest.mark.parametrize("train_on, trained", [("all", [["Snow."], ["<tool_call>"], ["Plain.", "Yes."], ["Snow."]]),
                                               ("last", [[], ["<tool_call>"], ["Yes."], []]),
                                               ("calls", [[], ["<tool_call>"], [], []])])
@pytest.mark.parametrize("template", ["nothink", "empty_think", "stock"])
def test_masks_honour_the_switches_fast_and_slow(tokenizer, template, train_on, trained):
    rows = switched_rows()
    encoder = ChatEncoder(tokenizer, template, train_on)
    assert not encoder.fallback
    fast = encoder.encode(rows)
    assert fast.slow == 0
    for i, (made, texts) in enumerate(zip(rows, trained)):
        slow = supervise(json.loads(made["messages_json"]), json.loads(made["tools_json"]), tokenizer, template,
                         train_on)
        assert fast[i] == slow
        spans = trained_spans(slow, tokenizer)
        assert len(spans) == len(texts) and all(text in span for text, span in zip(texts, spans)), (spans, texts)
    assert supervise_batch(rows, tokenizer, template, train_on)[0] == fast[0]


def test_trl_templates_masks_honour_the_switches(tokenizer):
    rows = switched_rows()
    out = supervise(json.loads(rows[0]["messages_json"]), TOOLS, tokenizer, "trl_training")
    spans = trained_spans(out, tokenizer)
    assert len(spans) == 1 and "Snow." in spans[0]


@pytest.mark.parametrize("fast", [True, False])
def test_the_parity_check_counts_what_is_switched_on(tokenizer, fast):
    rows = switched_rows()
    report = check_parity(rows, tokenizer, fast=fast)
    assert report.passed and report["supervised"] == report["exact"] == 5, report
    wrong = check_parity([{**rows[0], "messages_json": json.dumps([
        {**m, "train": False} if m["role"] == "assistant" else m for m in json.loads(rows[0]["messages_json"])])}],
        tokenizer, fast=fast)
    assert not wrong.passed and wrong["nothing"] == 1
    assert np.isclose(report["outside"], 0)
