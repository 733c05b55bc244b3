"""Tools, checks of calls, pairs of calls and results, and the policy table."""
import json
import random
import sys
import time

import jsonschema
from proxy_sft.data import schema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st


from proxy_sft.data.policy import action, DefectError, POLICY, REASONS
from proxy_sft.data.schema import check_call, checking_schema, pair_results, plainly_fits, type_name, violation
from proxy_sft.data.tools import functions_by_name, parse_tools, read_json, without_copies, write_json

QUICK = dict(deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))


def tool(properties=None, required=(), name="f", **parameters):
    return {"type": "function", "function": {"name": name, "parameters": {
        "type": "object", "properties": properties or {}, "required": list(required), **parameters}}}


def defect(function, *args):
    "The reason of the DefectError that a function raises, None when it raises none."
    try: function(*args)
    except DefectError as error: return error.reason
    return None


def check(tools, name="f", **arguments): return defect(check_call, {"name": name, "arguments": arguments}, tools)


# The policy table

def test_the_policy_table_is_whole():
    assert len(REASONS) == len(POLICY)
    for policy in POLICY:
        assert {policy.strict, policy.default} <= {"kept", "repaired", "rejected"} and policy.lenient in (
            "kept",
            "repaired",
            "rejected",
            "cut",
        )
        order = ("rejected", "cut", "repaired", "kept")
        assert order.index(policy.strict) <= order.index(policy.default) <= order.index(policy.lenient), (
            f"{policy.code} gets stricter"
        )
        assert policy.why.endswith(".") and action(policy.code) == policy.default
    assert (
        action("schema_violation", "lenient") == "kept"
        and "schema_violation" in repr(POLICY)
        and "<table>" in POLICY._repr_html_()
    )
    with pytest.raises(KeyError): action("no_such_code")


# JSON

@settings(max_examples=300, **QUICK)
@given(st.recursive(st.none() | st.booleans() | st.integers(-10**30, 10**30)
                    | st.floats(allow_nan=False, allow_infinity=False)
                    | st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
                    lambda inner: st.lists(inner, max_size=4)
                    | st.dictionaries(st.text(max_size=4).filter(str.isprintable), inner, max_size=4)))
def test_json_comes_back_with_types(value):
    text = write_json(value)
    assert repr(read_json(text)) == repr(value) == repr(json.loads(text))


@pytest.mark.parametrize("text", [
    "NaN", "[Infinity]", "{", "", "nope", "[1,]", "'a'", "1e400", "[-1e999]", "1" + "0" * 400 + ".5"])
def test_what_is_not_json_is_refused(text):
    with pytest.raises(ValueError): read_json(text)


def test_half_a_character_is_read_but_not_written():
    assert read_json('"\\ud83d"') == "\ud83d"
    with pytest.raises(UnicodeEncodeError): write_json("\ud83d")


# Tools

def test_tools_wrapped_and_bare():
    bare = {"name": "f", "description": "d", "parameters": {"type": "dict"}, "strict": True}
    wrapped = {"type": "function", "function": bare}
    assert (
        parse_tools(json.dumps([bare]))
        == parse_tools(json.dumps([wrapped]))
        == parse_tools(json.dumps(wrapped))
        == [wrapped]
    )
    assert list(parse_tools(json.dumps([{"function": bare, "type": "function"}]))[0]) == ["function", "type"], (
        "the data's own order"
    )
    for nothing in (None, "", " ", "null", "[]"): assert parse_tools(nothing) == []


@pytest.mark.parametrize("functions", [
    "[{", "[1]", '["f"]', "[{}]", '[{"name": ""}]', '[{"name": 3}]', '[{"name": "f", "parameters": "x"}]', "3", '"x"',
    "[NaN]", "[" * 5000, '[{"name": "f", "parameters": {"maximum": 1e999}}]'])
def test_tools_that_are_none(functions): assert defect(parse_tools, functions) == "malformed_tools"


def test_copies_go_and_namesakes_stay():
    a, b = tool({"x": {"type": "string"}}), tool({"x": {"type": "integer"}})
    assert without_copies([a, b]) == [a, b] and without_copies([a, tool({"x": {"type": "string"}}), b]) == [a, b]
    both = functions_by_name([a, b])
    assert check(both, x="a") is None and check(both, x=1) is None and check(both, x=1.5) == "schema_violation"


# Calls against tools

@pytest.mark.parametrize("written, types", [
    ("string", ("string",)), ("str", ("string",)), ("int", ("integer",)), ("float", ("number",)),
    ("bool", ("boolean",)), ("dict", ("object",)), ("list", ("array",)), ("List[str]", ("array",)),
    ("tuple", ("array",)), ("any", ()),
    ("str, optional", ("string", "null")), ("Optional[int]", ("integer", "null")),
    ("Union[int, str]", ("integer", "string")),
    ("int or float", ("integer", "number")), ("", ()), ("date", ())])
def test_type_names_of_other_tongues(written, types): assert type_name(written) == types


@pytest.mark.parametrize("declared, good, bad", [
    ("string", ["a", ""], [1, None, True, ["a"]]), ("integer", [1, -3, 10**30, 2.0], [1.5, "1", True, None]),
    ("number", [1, 1.5, -2e9], ["1", True, None]), ("boolean", [True, False], [0, 1, "true"]),
    ("array", [[], [1]], [{}, "[]"]),
    ("object", [{}, {"a": 1}], [[], "x"]), ("float", [1, 1.5], ["1", True]), ("dict", [{}], [[]]),
    ("any", [1, None, {}], [])])
def test_types(declared, good, bad):
    tools = [tool({"x": {"type": declared}})]
    assert [check(tools, x=value) for value in good] == [None] * len(good)
    assert [check(tools, x=value) for value in bad] == ["schema_violation"] * len(bad)


def test_names_and_keys():
    tools = [tool({"x": {"type": "string"}, "y": {"type": "string"}}, ["x"])]
    assert check(tools, x="a") is None and check(tools, y="a") == check(tools) == "schema_violation"
    assert check(tools, x="a", z=1) == "schema_violation" and check(tools, name="g", x="a") == "undeclared_function"
    assert check([tool({}, additionalProperties=True)], z=1) is None and check([tool({})], z=1) == "schema_violation"
    assert check([tool({"x": {"type": "string", "required": True}})]) == "schema_violation", (
        "required as a property's own flag"
    )
    assert check([{"type": "function", "function": {"name": "f"}}]) is None, "no parameters at all"
    assert (
        check([{"type": "function", "function": {"name": "f", "parameters": {"x": {"type": "int"}}}}], x="a")
        == "schema_violation"
    ), "a bare map"


def test_the_rest_of_a_schema():
    assert check([tool({"x": {"type": "string", "enum": ["a", "b"]}})], x="c") == "schema_violation"
    assert check([tool({"x": {"type": "array", "items": {"type": "int"}}})], x=[1, "a"]) == "schema_violation"
    assert check([tool({"x": {"type": "integer", "minimum": 1, "maximum": 3}})], x=4) == "schema_violation"
    assert check([tool({"x": {"anyOf": [{"type": "str"}, {"type": "int"}]}})], x=1.5) == "schema_violation"
    nested = tool({"x": {"type": "object", "properties": {"y": {"type": "integer"}}, "required": ["y"]}})
    assert (
        check([nested], x={"y": "a"}) == check([nested], x={}) == "schema_violation"
        and check([nested], x={"y": 1, "z": 2}) is None
    )
    reference = tool({"x": {"$ref": "#/$defs/Unit"}}, **{"$defs": {"Unit": {"enum": ["C", "F"]}}})
    assert check([reference], x="C") is None and check([reference], x="K") == "schema_violation"
    assert check([tool({"x": {"$ref": "#/nowhere"}})], x=1) is None, "a reference that leads nowhere checks nothing"
    assert check([tool({"x": {"type": "integer", "default": "3"}})], x="3") is None, (
        "the tool's own default is no fault of the call"
    )
    assert check([tool({"x": {"type": "string", "nullable": True}})], x=None) is None


def test_schemas_without_end_or_sense_do_no_harm():
    loop = tool({"x": {"$ref": "#/$defs/a"}}, **{"$defs": {"a": {"$ref": "#/$defs/a"}}})
    assert check([loop], x=1) in ("malformed_tools", "schema_violation", None)
    for pattern in (
        "^(a+)+$",
        "(a|a)*b",
        "^" + "a*" * 25 + "b",
        "a?" * 40 + "a" * 40,
        "(a|aa)" * 40 + "b",
        "(.*a){20}",
        r"(a*)\1b",
    ):
        assert check([tool({"x": {"type": "string", "pattern": pattern}})], x="a" * 60 + "!") is None, (
            "a pattern that takes for ever is not used"
        )
        assert check([tool({}, patternProperties={pattern: {"type": "integer"}, "(": {}})], **{"a" * 60: "x"}) is None
    short = [tool({"x": {"type": "string", "pattern": "^[^@+]+@[a-z.*]+\\.[a-z]{2,}$"}})]
    assert check(short, x="a@b.de") is None and check(short, x="a.b.de") == "schema_violation"
    assert check([tool({}, patternProperties={"^x_": {"type": "integer"}})], x_a="x") == "schema_violation"
    for nonsense in (
        {"type": 3},
        {"type": ["string", 4]},
        {"enum": "abc"},
        {"minimum": "a"},
        {"pattern": "("},
        {"items": 7},
        {"required": "x"},
        "text",
        5,
    ):
        assert check([tool({"x": nonsense})], x="a") is None
    assert check([tool("text")], x="a") in (None, "schema_violation")


KINDS = [
    "string",
    "integer",
    "number",
    "boolean",
    "array",
    "object",
    "int",
    "float",
    "bool",
    "dict",
    "list",
    "tuple",
    "any",
    "date",
]
VALUES = ["a", "", 1, 0, -1, 1.0, 1.5, True, False, None, [], ["a"], [1], {}, {"a": 1}, 10**30]


def test_the_quick_check_never_lets_through_what_the_validator_refuses():
    chance, quick = random.Random(4), 0
    for _ in range(4000):
        properties = {
            key: {
                "type": chance.choice(KINDS),
                **chance.choice(
                    [
                        {},
                        {},
                        {"enum": ["a", "b"]},
                        {"items": {"type": chance.choice(KINDS)}},
                        {"description": "d"},
                        {"default": 1},
                        {"minimum": 1},
                    ]
                ),
            }
            for key in chance.sample("xyz", chance.randrange(4))
        }
        body = tool(properties, [key for key in properties if chance.random() < 0.4])["function"]
        arguments = {key: chance.choice(VALUES) for key in "xyz" if chance.random() < 0.5}
        if not plainly_fits(body["parameters"], arguments): continue
        quick += 1
        checker = jsonschema.Draft202012Validator(checking_schema(body["parameters"], closed=True))
        assert checker.is_valid(arguments), (body, arguments)
    assert quick > 250


@settings(max_examples=200, **QUICK)
@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.sampled_from(KINDS),
                    lambda inner: st.lists(inner, max_size=3)
                    | st.dictionaries(st.sampled_from(["type", "properties", "items", "enum", "required", "anyOf",
                                                       "$ref", "default", "x", "pattern",
                                                       "additionalProperties", "minimum", "nullable", "const", "not"]),
                                                       inner, max_size=4)))
def test_any_schema_makes_a_valid_one(written):
    jsonschema.Draft202012Validator.check_schema(checking_schema(written))
    if isinstance(written, dict):
        defect(check_call, {"name": "f", "arguments": {"x": 1}}, [{"function": {"name": "f", "parameters": written}}])


def test_the_message_says_where():
    body = tool({"city": {"type": "string"}, "list": {"type": "array", "items": {"type": "integer"}}})["function"]
    assert violation(body, {"city": 1}).startswith("f: argument city:") and violation(
        body, {"list": [1, "b"]}
    ).startswith("f: argument list.1:")
    assert len(str(DefectError("schema_violation", "x" * 9999))) < 500


# Results

CALLS = [{"name": "f", "arguments": {}}, {"name": "g", "arguments": {}}]


@pytest.mark.parametrize("contents, results", [
    (['{"a": 1}\n{"b": 2}'], ['{"a": 1}', '{"b": 2}']), (["[1]\n[2]"], ["[1]", "[2]"]), (["1.50\n2"], ["1.50", "2"]),
    (["x", "y"], ["x", "y"]),
    (['{"a": [1,\n 2]}\n\n{"b": 2}\n'], ['{"a": [1,\n 2]}', '{"b": 2}']), (['{"a":1}{"b":2}'], ['{"a":1}', '{"b":2}']),
    ([' "a b" \n null '], ['"a b"', "null"]), (['{"a": 1e999}\n' + "9" * 5000], ['{"a": 1e999}', "9" * 5000])])
def test_results_are_dealt_out(contents, results): assert pair_results(CALLS, contents) == results


@pytest.mark.parametrize("contents, reason", [
    ([], "count_mismatch"), (["[1, 2]"], "count_mismatch"), (["1\n2\n3"], "count_mismatch"),
    (["a", "b", "c"], "unsplittable_results"),
    (["Error: no"], "unsplittable_results"), (['{"a": 1}\n{"b": '], "unsplittable_results"),
    (["1 2"], "unsplittable_results"),
    ([""], "count_mismatch"), (["[" * 100_000], "unsplittable_results")])
def test_results_that_cannot_be_dealt_out(contents, reason): assert defect(pair_results, CALLS, contents) == reason


def test_a_lone_array_is_one_result():
    assert pair_results(CALLS[:1], ["[1, 2]"]) == ["[1, 2]"] and pair_results(CALLS[:1], ["no json"]) == ["no json"]


@settings(max_examples=200, **QUICK)
@given(st.lists(st.recursive(st.integers() | st.text(max_size=6) | st.none(), lambda inner: st.lists(inner, max_size=3)
                             | st.dictionaries(st.text(max_size=3), inner, max_size=3), max_leaves=5), min_size=2,
                             max_size=5), st.booleans())
def test_bundles_come_apart_as_they_were_put_together(values, spread):
    pieces = [json.dumps(value, indent=2 if spread else None, ensure_ascii=False) for value in values]
    pieces = [piece.encode("utf-8", "replace").decode() for piece in pieces]
    assert pair_results([CALLS[0]] * len(values), ["\n".join(pieces)]) == pieces


def test_a_bundle_of_megabytes_takes_as_long_as_its_parts():
    def cost(count): # processor time; the least of three, so that what else is going on stays out
        text, found = "\n".join(json.dumps({"i": i, "text": "x" * 200}, indent=1) for i in range(count)), []
        for _ in range(3):
            start = time.process_time()
            assert len(pair_results([CALLS[0]] * count, [text])) == count
            found.append(time.process_time() - start)
        return min(found)
    assert cost(8000) < 32 * cost(1000)  # 8 would be exact; were every piece to look at all others, 64
    assert sys.getrecursionlimit() >= 1000 and schema.json_values("") == []


# Spellings of types, numbers and tools that are none of JSON Schema's

@pytest.mark.parametrize("written, good, bad", [
    ("string[]", [["a"], []], ["a", [1]]), ("int[]", [[1]], [1, ["a"]]), ("integer []", [[1]], [1]),
    ("number[]", [[1.5]], [1.5]),
    ("boolean[]", [[True]], [True]), ("object[]", [[{}]], [{}]), ("dict[]", [[{}]], [{}]),
    ("string[][]", [[["a"]]], ["a", ["a"]]), ("map<string, int>", [{"a": 1}], [1, "a"]), ("list<int>", [[1]], [1]),
    ("(string | number)[]", [["a", 1]], ["a", 1]), ("[string]", [["a"]], ["a"]), ("string array", [["a"]], ["a"]),
    ("int[3]", [[1, 2, 3]], [1]), ("Array<string>", [["a"]], ["a"]), ("List[str]", [["a"]], ["a"]),
    ("string[] | null", [["a"], None], ["a"]),
    ("['string', 'null']", ["a", None], [1, ["a"]]), ('["array", "null"]', [[1], None], ["a"]),
    ("Optional[string[]]", [["a"], None], ["a"]), ("varchar[20]", ["a", 1], []), ("varchar(20)", ["a"], [1, ["a"]])])
def test_types_with_brackets(written, good, bad):
    tools = [tool({"x": {"type": written}})]
    assert [check(tools, x=value) for value in good] == [None] * len(good)
    assert [check(tools, x=value) for value in bad] == ["schema_violation"] * len(bad)


@pytest.mark.parametrize("multiple, good, bad", [
    (0.01, [19.99, 0.07, 1, -4.35, 1e20], [19.995, 0.001]), (0.1, [0.3, 0.7, 1.1], [0.35]),
    (3, [9, 9.0, 10**30 - 1], [10, 10**30]),
    (1e-9, [1e-9, 0.123456789], [1e-10]), (2.5, [5, 7.5], [6])])
def test_multiples_are_counted_in_decimal_digits(multiple, good, bad):
    tools = [tool({"x": {"type": "number", "multipleOf": multiple}})]
    assert [check(tools, x=value) for value in good] == [None] * len(good)
    assert [check(tools, x=value) for value in bad] == ["schema_violation"] * len(bad)


@pytest.mark.parametrize("name", ["inputSchema", "input_schema"])
def test_parameters_under_other_names_are_read(name):
    body = {"name": "f", "description": "d", name: {"type": "object", "properties": {"x": {"type": "integer"}}}}
    for written in (body, {"type": "function", "function": body},
                    {"type": "custom", **body} if name == "input_schema" else body,
                    {**body, "parameters": None}):
        notes = []
        (made,) = parse_tools(json.dumps([written]), notes)
        assert made["function"]["parameters"] == body[name] and name not in made["function"], made
        assert [code for code, _ in notes] == ["tool_form"]
        assert check([made], x=1) is None and check([made], x="a") == "schema_violation"


def test_tools_whose_parameters_nobody_can_read():
    for body in ({"name": "f", "parameters": "text"}, {"name": "f", "parameters": [1]},
                 {"name": "f", "args": {"properties": {}}},
                 {"name": "f", "schema": {"type": "object"}}):
        assert defect(parse_tools, json.dumps([body])) == "malformed_tools"
        notes = []
        made = parse_tools(json.dumps([body]), notes)
        assert [code for code, _ in notes] == ["odd_tool"] and check(made, x=1) == "malformed_tools", body
    for body in ({"name": "f", "parameters": []}, {"name": "f", "output_schema": {"properties": {}}},
                 {"name": "f", "annotations": {"a": 1}}):
        assert check(parse_tools(json.dumps([body]))) is None and check(parse_tools(json.dumps([body])),
                x=1) == "schema_violation"
    two = {"name": "f", "inputSchema": {"properties": {"x": {}}}, "input_schema": {"properties": {"y": {}}}}
    assert defect(parse_tools, json.dumps([two])) == "malformed_tools"


def test_messages_say_what_is_wrong():
    for none in ({"name": "f"}, {"name": "f", "parameters": {"type": "object", "properties": {}}},
                 {"name": "f", "parameters": []}):
        assert violation(none, {"x": 1}) == "f: it declares no parameters, found x"
    assert violation(tool({"city": {}})["function"], {"town": 1}) == "f: town is not among its parameters city"


def test_work_is_bounded(monkeypatch):
    "Counted in steps, not in seconds: a check that would double with each level ends as one without end."
    deep = 1
    for _ in range(60): deep = {"a": deep}
    loop = {"$defs": {"n": {"anyOf": [{"type": "object", "properties": {"a": {"$ref": "#/$defs/n"}},
                                       "required": ["b"]}] * 2}}}
    for word in ("anyOf", "oneOf", "allOf"):
        (own,) = loop["$defs"]["n"].values()
        made = tool({"x": {"$ref": "#/$defs/n"}}, **{"$defs": {"n": {word: own}}})
        assert check([made], x=deep) in ("malformed_tools", "schema_violation")
        assert schema.Steps.left > -2
    item = {"type": "object", "properties": {"y": {"type": "integer", "minimum": 0}}}
    wide = tool({"x": {"type": "array", "items": item}})
    assert check([wide], x=[{"y": i} for i in range(2000)]) is None
    assert type_name("string" + " " * 20_000 + ", optional") == ("string", "null")
    for written in ("strin" + " " * 20_000 + "x", "optional " * 5_000, "[" * 20_000, "a," * 20_000,
                    "string[" + "]" * 20_000):
        assert type_name(written) == () and check([tool({"x": {"type": written}})], x=1) is None
