"""The call grammar: round trips, other parsers' cases, hostile and broken text."""
import ast
import json
import math
import pickle
import random
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from proxy_sft.data.calls import format_calls, parse_calls
from proxy_sft.data.values import CallError, MAX_DEPTH, MAX_DIGITS, REASONS

SHARED = Path(__file__).resolve().parents[2] / "shared" / "dolci"


def shared_lines(name):
    "Rows of a file that is not part of the project; the test is skipped where it is missing."
    path = SHARED / name
    if not path.is_file():
        pytest.skip(f"{name} is not here: it is reference data beside the project, not part of it")
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def same(left, right):
    "Equal with the same types everywhere: `1`, `1.0` and `True` differ, so do `0.0` and `-0.0`."
    if type(left) is not type(right): return False
    if type(left) is dict: return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if type(left) is list: return len(left) == len(right) and all(map(same, left, right))
    if type(left) is float: return left == right and math.copysign(1, left) == math.copysign(1, right)
    return left == right


def outcome(text, tools=None, **options):
    "The calls, or the reason why there are none."
    try: return parse_calls(text, tools, **options)
    except CallError as error: return error.reason


def value_of(text): return parse_calls(f"f(x={text})")[0]["arguments"]["x"]


# Round trips: hypothesis looks for the awkward, a seeded generator brings the number above 10,000 calls

AWKWARD = [
    "",
    "'",
    '"',
    "\\",
    "\\/",
    "\\n",
    "\n",
    "\r\n",
    "\x00",
    "\x1f\x7f",
    "\u2028",
    "\ufeff",
    "😀",
    "\ud83d",
    "\ude00",
    "\ud83d\ude00",
    "```",
    "</function_calls>",
    "'''",
    '"""',
    "f(x=1)",
    "#",
    ", ",
    "null",
    "\\ud83d",
    "\\x4",
    "${a}",
    "a=b",
    "true)",
]
texts = st.one_of(st.text(st.characters(), max_size=12), st.lists(st.sampled_from(AWKWARD), max_size=4).map("".join))
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-(2**200), 2**200),
    st.floats(allow_nan=False, allow_infinity=False),
    texts,
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4), max_leaves=12
)
plain_names = st.from_regex(r"[A-Za-z_$][A-Za-z0-9_.$/-]{0,12}", fullmatch=True)
names = (
    plain_names
    | texts
    | st.sampled_from(
        ["from", "class", "None", "null", "r", "b", "f", "filter[name]", "max-stops", "1st", "a b", "größe", "nan"]
    )
)
calls_of_all_kinds = st.lists(
    st.fixed_dictionaries({"name": names, "arguments": st.dictionaries(names, values, max_size=4)}), max_size=6
)
plain_calls = st.lists(
    st.fixed_dictionaries({"name": plain_names, "arguments": st.dictionaries(plain_names, values, max_size=3)}),
    min_size=1,
    max_size=5,
)
QUICK = dict(deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
COUNTED = {"calls": 0}


@settings(max_examples=250, **QUICK)
@given(calls_of_all_kinds)
def test_format_and_parse_are_inverse(calls):
    COUNTED["calls"] += len(calls)
    assert same(parse_calls(format_calls(calls)), calls), format_calls(calls)


@settings(max_examples=150, **QUICK)
@given(plain_calls, st.sampled_from([
    "{}", "<function_calls>\n{}\n</function_calls>", "```python\n{}\n```", "\n\n{}  \n", "{}</function_calls>",
    "# calls\n{}"]))
def test_what_stands_around_calls_changes_nothing(calls, around):
    COUNTED["calls"] += len(calls)
    assert same(parse_calls(around.format("\x01").replace("\x01", format_calls(calls))), calls)


def draw_value(chance, depth=0):
    "Any JSON value, awkward texts more often than a fair draw would give them."
    kind = chance.randrange(9 if depth < 4 else 6)
    if kind == 0: return chance.choice([None, True, False, 0, -1, 0.0, -0.0, 1.0, 1e22, 5e-324, 1.7976931348623157e308])
    if kind == 1: return chance.choice((1, -1)) * chance.getrandbits(chance.randrange(1, 900))
    if kind == 2: return chance.uniform(-1, 1) * 10.0 ** chance.randrange(-300, 300)
    if kind < 5: return "".join(chance.choices(AWKWARD, k=chance.randrange(5)))
    if kind == 5:
        return "".join(
            chr(chance.choice((chance.randrange(128), chance.randrange(0x3000), chance.randrange(0x110000))))
            for _ in range(6)
        )
    if kind < 8: return [draw_value(chance, depth + 1) for _ in range(chance.randrange(4))]
    return {draw_name(chance): draw_value(chance, depth + 1) for _ in range(chance.randrange(4))}


def draw_name(chance):
    if chance.random() < 0.3: return "".join(chance.choices(AWKWARD, k=2))
    return "".join(chance.choices("abcXYZ_$@.-/:[]019é", k=chance.randrange(1, 9)))


def test_many_seeded_calls_round_trip():
    chance = random.Random(7)
    for _ in range(4000):
        calls = [
            {
                "name": draw_name(chance),
                "arguments": {draw_name(chance): draw_value(chance) for _ in range(chance.randrange(4))},
            }
            for _ in range(3)
        ]
        assert same(parse_calls(format_calls(calls)), calls), calls
        COUNTED["calls"] += len(calls)


def test_ten_thousand_calls_were_generated():
    if COUNTED["calls"] == 0: pytest.skip("the round trips did not run in this session")
    assert COUNTED["calls"] >= 10_000, COUNTED


@pytest.mark.parametrize("digits", [20, 4299, 4300, 4301, 9000, 50_000, MAX_DIGITS - 1])
@pytest.mark.parametrize("sign", [1, -1])
def test_integers_of_any_size_are_exact(digits, sign):
    number = sign * (10**digits - 7)
    calls = [{"name": "f", "arguments": {"x": number, "y": [number]}}]
    assert parse_calls(format_calls(calls)) == calls


def test_deepest_value_round_trips_and_deeper_is_refused():
    value = 1
    for _ in range(MAX_DEPTH): value = [value]
    for deep in (value, json.loads(json.dumps(value).replace("1", '{"a": "\\\\/"}')[1:-1])):
        calls = [{"name": "f", "arguments": {"x": deep}}]
        assert parse_calls(format_calls(calls)) == calls
    with pytest.raises(CallError, match="too_deep"): format_calls([{"name": "f", "arguments": {"x": [value]}}])
    assert outcome(f"f(x={'[' * (MAX_DEPTH + 1)}{']' * (MAX_DEPTH + 1)})") == "too_deep"


@pytest.mark.parametrize("value, reason", [
    (float("nan"), "non_finite"), (float("inf"), "non_finite"), ((1, 2), "not_json"), ({1}, "not_json"),
    (b"a", "not_json"), ({1: 2}, "non_string_key")])
def test_what_json_cannot_hold_is_not_written(value, reason):
    with pytest.raises(CallError) as caught: format_calls([{"name": "f", "arguments": {"x": value}}])
    assert caught.value.reason == reason and str(caught.value)


def test_an_integer_that_would_not_be_read_is_not_written():
    assert (
        outcome(f"f(x={'9' * MAX_DIGITS})") != "integer_too_long"
        and outcome(f"f(x=1{'0' * MAX_DIGITS})") == "integer_too_long"
    )
    with pytest.raises(CallError, match="integer_too_long"):
        format_calls([{"name": "f", "arguments": {"x": 10**MAX_DIGITS}}])


@pytest.mark.parametrize("calls", [
    [1], [{"name": "f"}], [{"name": 1, "arguments": {}}], [{"name": "f", "arguments": []}],
    [{"name": "f", "arguments": {1: 2}}]])
def test_what_is_no_call_is_not_written(calls):
    with pytest.raises(CallError, match="not_json"): format_calls(calls)


# What is read

@pytest.mark.parametrize("text", [
    None, "", " \n\t", "null", "  null\n", "How can I help you today?", "<function_calls></function_calls>", "[]",
    "# nothing"])
def test_no_call(text): assert parse_calls(text) == []


@pytest.mark.parametrize("text, value", [
    ("1", 1), ("1.0", 1.0), ("-0", 0), ("-0.0", -0.0), ("+5", 5), ("1e3", 1000.0), ("1E-3", 0.001), (".5", 0.5),
    ("5.", 5.0), ("1_000", 1000), ("0x1F", 31), ("0b11", 3), ("00", 0),
    ("25852016738884976640000", 25852016738884976640000), ("true", True), ("True", True), ("null", None),
    ("None", None), ("(1)", 1), ("()", []), ("(1,)", [1]), ("[1,]", [1]),
    ("[(1, 2), ()]", [[1, 2], []]), ("{'a': True, \"b\": false,}", {"a": True, "b": False}), ("{}", {}),
    ("[\n1,\n 2 # two\n]", [1, 2]), ("'a\nb'", "a\nb"), ('"""a"b\'c"""', "a\"b'c"),
    (r"'it\'s'", "it's"), (r"'\x41\101\u0041\U00000041\N{LATIN CAPITAL LETTER A}'", "AAAAA"), (r"'\d\/'", r"\d\/"),
    (r'["\/"]', [r"\/"]), (r"'\ud83d\ude00'", "😀"),
    (r'"\ud83d\ude00"', "😀"), (r'["\ud83d\ude00"]', ["😀"]), (r"'\ud83d'", "\ud83d"), ("r'\\n'", "\\n"), ("u'a'", "a"),
    ("'a\\\nb'", "ab"), ("''", ""), ("'\x00'", "\x00"),
    ("4/2", 2.0), ("4**0.5", 2.0), ("2**-2", 0.25), ("500*500", 250000), ("([1]+[2])+[3]", [1, 2, 3]),
    ("[0]*3", [0, 0, 0]), ("-2**2", -4), ("7//2", 3), ("'a'+'b'", "ab"), ("-(1+2)", -3)])
def test_values(text, value):
    assert same(value_of(text), value), value_of(text)
    assert same(value_of(f"[{text}]"), [value]) and same(value_of(f"{{'k': {text}}}"), {"k": value})
    assert same(parse_calls(f"f(y='', x = {text} , z=[])")[0]["arguments"]["x"], value)


@pytest.mark.parametrize("text, names", [
    ("f()\ng()", "fg"), ("f()\r\ng()", "fg"), ("  f()\n\n\tg()  ", "fg"), ("[f(), g()]", "fg"),
    ("[f(),\n g(),\n]", "fg"), ("f(), g()", "fg"), ("f(),\ng(),", "fg"), ("f();\ng();", "fg"),
    ("```\nf()\n```", "f"), ("```python\nf()\ng()\n```", "fg"), ("<function_calls>[f()]</function_calls>", "f"),
    ("<function_calls>f()</function_calls><function_calls>g()</function_calls>", "fg"),
    ("f()</function_calls>", "f"), ("<function_calls>\nf()", "f"), ("f() # first\ng()", "fg"), ("\ufefff()", "f"),
    ("f ( )", "f")])
def test_layouts(text, names): assert parse_calls(text) == [{"name": name, "arguments": {}} for name in names]


@pytest.mark.parametrize("name", [
    "a.b.c", "get-weather", "api/v1/users", "german_company_data.companies_id_data", "3d.render", "größe", "ns:f", "$f",
    "@a/b", "print", "null"])
def test_function_names(name): assert parse_calls(f"{name}(x=1)") == [{"name": name, "arguments": {"x": 1}}]


@pytest.mark.parametrize("key", [
    "from", "class", "None", "max-stops", "filter[name]", "$top", "a.b", "größe", "_", "r", "b"])
def test_argument_names(key):
    assert parse_calls(f"f({key}='a', z=1)") == [{"name": "f", "arguments": {key: "a", "z": 1}}]
    assert parse_calls(f"f('{key}' = [1])") == [{"name": "f", "arguments": {key: [1]}}]


# What is refused, and why

REFUSED = {
    "f(x=1": "unclosed",
    "f(": "unclosed",
    "f(x=": "unclosed",
    "f(x": "bare_word",
    "f(x=1]": "unexpected",
    "f(x=[1)": "unexpected",
    "f(x='a": "unterminated_string",
    "f(x='''a'')": "unterminated_string",
    "f": "not_a_call",
    "false": "not_a_call",
    "None": "not_a_call",
    "hello there": "not_a_call",
    "x = f(a=1)": "not_a_call",
    "I call f(x=1).": "not_a_call",
    "f(x=1).g(y=2)": "trailing_text",
    "f(x=1) g(x=2)": "missing_separator",
    "f(x=1);f(x=2)": "missing_separator",
    "f(x=1) + 1": "trailing_text",
    "f(x=1) and so on": "trailing_text",
    "[f() g()]": "missing_separator",
    "[f()": "unclosed",
    "[f()\ng()]": "missing_separator",
    "f(1)": "positional_argument",
    "f(x=1, 2)": "positional_after_keyword",
    "f(x=1, x=2)": "duplicate_argument",
    "f('x'=1, x=2)": "duplicate_argument",
    "f(x={'a': 1, \"a\": 2})": "duplicate_key",
    'f(x={"a": 1, "a": 2})': "duplicate_key",
    "f(x={1: 2})": "non_string_key",
    "f(x={None: 2})": "non_string_key",
    "f(x={(1, 2): 2})": "non_string_key",
    "f(x=nan)": "non_finite",
    "f(x=NaN)": "non_finite",
    "f(x=[NaN])": "non_finite",
    "f(x=-inf)": "non_finite",
    "f(x=[-Infinity])": "non_finite",
    "f(x=1e999)": "non_finite",
    "f(x=[1e999])": "non_finite",
    "f(x=1j)": "bad_number",
    "f(x=0x)": "bad_number",
    "f(x=1__0)": "bad_number",
    "f(x=1.2.3)": "bad_number",
    "f(x=2024-01-01)": "leading_zero",
    "f(x=007)": "leading_zero",
    "f(x=[01])": "leading_zero",
    r"f(x='\x4')": "bad_escape",
    r'f(x="\u12")': "bad_escape",
    r"f(x='\N{NO SUCH THING}')": "bad_escape",
    r"f(x='\U99999999')": "bad_escape",
    "f(x='a' 'b')": "implicit_concatenation",
    "f(x=['a' 'b'])": "implicit_concatenation",
    "f(x='It's')": "unexpected",
    "f(x=b'a')": "bytes",
    "f(x=rb'a')": "bytes",
    "f(x=f'{y}')": "f_string",
    "f(x=y)": "bare_word",
    "f(x=Hello)": "bare_word",
    "f(x=TRUE)": "bare_word",
    "f(x={a: 1})": "bare_word",
    "f(x=g())": "nested_call",
    "f(x=a.b(1))": "nested_call",
    "f(x=float('nan'))": "nested_call",
    "f(x=[i for i in y])": "comprehension",
    "f(x=[1 for i in y])": "comprehension",
    "f(x={i for i in y})": "comprehension",
    "f(x={1, 2})": "set",
    "f(x={'a'})": "set",
    "f(**x)": "unpacking",
    "f(*x)": "unpacking",
    "f(x=[*y])": "unpacking",
    "f(x={**y})": "unpacking",
    "f(**{'a': 1})": "unpacking",
    "f(x=True+1)": "expression",
    "f(x=1/0)": "expression",
    "f(x=0**-1)": "expression",
    "f(x=1 if y else 2)": "expression",
    "f(x=1 == 1)": "expression",
    "f(x=[1][0])": "expression",
    "f(x='a'.upper())": "expression",
    "f(x=1 or 2)": "expression",
    "f(x=not 1)": "expression",
    "f(x=~1)": "expression",
    "f(x=1 << 2)": "expression",
    "f(x=lambda: 1)": "expression",
    "f(x=-'a')": "expression",
    "f(x='%d' % 1)": "expression",
    "f(x='a'+1)": "expression",
    "f(x=(-8)**0.5)": "expression",
    "f(x=10**10**10)": "too_complex",
    "f(x=[0]*10**9)": "too_complex",
    "f(x='ab'*10**9)": "too_complex",
    "f(x=1e308*10)": "too_complex",
    "f(x=[[[0]*99]*99]*99)": "too_complex",
    "f(x=...)": "unexpected",
    "f(x=)": "unexpected",
    "f(,)": "unexpected",
    "f(x=[,])": "unexpected",
    "f(x=1,,y=2)": "unexpected",
    "f(x={'a':})": "unexpected",
    "f(x={'a':1:2})": "unexpected",
    "f(x:=1)": "bare_word",
    "f(x==1)": "bare_word",
    "f(city: 'SF')": "bare_word",
    "f(x=“a”)": "unexpected",
    "f(x=`a`)": "unexpected",
    "f(x=1;y=2)": "unexpected",
    "f(x=1 y=2)": "unexpected",
    "f(x=@a)": "unexpected",
}


@pytest.mark.parametrize("text", REFUSED)
def test_refused(text):
    with pytest.raises(CallError) as caught: parse_calls(text)
    error = caught.value
    assert error.reason == REFUSED[text], error
    assert isinstance(error, ValueError) and 0 <= error.position <= len(text) and len(error.excerpt) <= 200
    assert (
        error.reason in str(error) and REASONS[error.reason][0] in str(error) and REASONS[error.reason][1] in str(error)
    )


@pytest.mark.parametrize("value", [1, 1.5, b"f()", ["f()"], {"name": "f"}, True])
def test_only_text_is_read(value): assert outcome(value) == "not_text"


def test_error_survives_a_trip_between_processes():
    with pytest.raises(CallError) as caught: parse_calls("f(x=1, x=2)")
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.reason, again.position, again.excerpt) == (
        str(caught.value),
        "duplicate_argument",
        7,
        "f(x=1, x=2)",
    )


def test_position_is_an_offset_in_the_whole_text():
    text = "\n <function_calls>\nf(x=1)\ng(x=1, y=oops)"
    with pytest.raises(CallError) as caught: parse_calls(text)
    assert caught.value.position == text.index("oops")


def test_constant_expressions_can_be_refused():
    assert outcome("f(x=2*3)", fold=False) == outcome("f(x=[1]+[2])", fold=False) == "expression"
    assert parse_calls("f(x=-2, y=+1.5)", fold=False) == [{"name": "f", "arguments": {"x": -2, "y": 1.5}}]


@pytest.mark.parametrize("text, code", [
    ("<function_calls>f()</function_calls>", "xml_tags"), ("```\nf()\n```", "code_fence"), ("[f()]", "list_wrapper"),
    ("f(), g()", "separator"), ("f() # x", "comment"), ("f(x=(1, 2))", "tuple"), ("f(x=1+1)", "constant_expression"),
    ("Nothing to do here.", "plain_text"), ("f(1)", "positional")])
def test_repairs_are_noted(text, code):
    repairs = []
    parse_calls(text, [{"name": "f", "parameters": {"properties": {"x": {}}}}], repairs=repairs)
    assert {code} == {found for found, _ in repairs}, repairs


def test_plain_text_needs_no_repair():
    repairs = []
    assert parse_calls("f(x=1, y=[\"a\"])\ng(z=-1.5, w=(1))", repairs=repairs) and repairs == []


# Arguments without names

def tool(name="f", required=None, wrapped=True, **types):
    parameters = {"type": "object", "properties": {key: {"type": kind} for key, kind in types.items()}}
    if required is not None: parameters["required"] = required
    function = {"name": name, "description": "", "parameters": parameters}
    return {"type": "function", "function": function} if wrapped else function


@pytest.mark.parametrize("wrapped", [True, False])
def test_positional_arguments_take_the_order_of_the_schema(wrapped):
    tools = [tool("g", a="string"), tool(content="string", tags="array", wrapped=wrapped)]
    assert parse_calls("f('hi', tags=['#a'])\ng('x')", tools) == [
        {"name": "f", "arguments": {"content": "hi", "tags": ["#a"]}},
        {"name": "g", "arguments": {"a": "x"}},
    ]
    assert parse_calls("f('hi', [1])", tools)[0]["arguments"] == {"content": "hi", "tags": [1]}


@pytest.mark.parametrize("tools, text, reason", [
    ([], "f(1)", "positional_argument"), ([tool("g", a="integer")], "f(1)", "positional_argument"),
    ([tool(a="integer")], "f(1, 2)", "positional_argument"),
    ([tool()], "f(1)", "positional_argument"), ([tool(a="string")], "f(1)", "positional_argument"),
    ([tool(a="integer")], "f(true)", "positional_argument"),
    ([tool(a="integer"), tool(b="integer")], "f(1)", "positional_argument"),
    ([tool(a="integer", b="integer", required=["b"])], "f(1)", "positional_argument"),
    ([tool(a="integer")], "f(1, a=2)", "duplicate_argument"),
    (["f", None, {"function": 3}, {"name": "f"}, {"name": "f", "parameters": 1}], "f(1)", "positional_argument")])
def test_positional_arguments_without_a_single_reading(tools, text, reason): assert outcome(text, tools) == reason


@pytest.mark.parametrize("tools", [
    [tool(a="integer"), tool(a="integer")], [tool(a=["string", "number"])], [tool(a="any")], [tool(a="float")],
    [tool(a="integer", b="integer", required=["a"])]])
def test_positional_arguments_with_a_single_reading(tools):
    assert parse_calls("f(1)", tools) == [{"name": "f", "arguments": {"a": 1}}]


# Broken and hostile text

VALID = [
    'german.companies_id(is_id="DEV\\u00e9")\nzoopla.auto(search="Charlton", n=[1, 2.5, {"a": null}])',
    "f(x=(1, 2), y={'a': [True, None]}, z=-1e5)\n[g()]",
    "<function_calls>\nsend('it\\'s', at=4/2, \"a b\"='''x\n''')\n</function_calls>",
    "```py\nf(x=[0]*3+[1], y=r'\\d')\n```",
    "a-b/c(filter[x]=true, from='SFO');\ng(q='ü😀')",
]
TOOLS = [tool("send", text="string", at="number"), tool("f", x="array"), {"name": "g"}]


def mutate(text, chance):
    for _ in range(chance.randrange(1, 5)):
        i, j = sorted(chance.choices(range(len(text) + 1), k=2))
        kind = chance.randrange(5)
        if kind == 0: text = text[:i] + text[i + 1:]
        elif kind == 1:
            text = (
                text[:i]
                + chance.choice(
                    list("()[]{}'\"\\,:=*/+-%#;.`<>@ \n\r\t0eExn_\0\ufeff\ud800")
                    + ["'''", "**", "//", "```", "None", "for ", "</function_calls>"]
                )
                + text[i:]
            )
        elif kind == 2: text = text[:i] + text[j:]
        elif kind == 3: text = text[:j] + text[i:j] + text[j:]
        else: text = text[:i] + chance.choice(VALID)[:20] + text[i:]
    return text


def test_broken_text_gives_calls_or_an_error():
    chance, read, refused, started = random.Random(3), 0, 0, time.process_time()
    for _ in range(25_000):
        text = mutate(chance.choice(VALID), chance)
        try: calls = parse_calls(text, TOOLS)
        except CallError as error:
            refused += 1
            assert 0 <= error.position <= len(text) and len(error.excerpt) <= 200 and str(error), text
        else:
            read += 1
            assert json.loads(json.dumps(calls, allow_nan=False)) == calls or "\ud800" in text, text
            assert same(parse_calls(format_calls(calls)), calls), text
    assert read > 500 and refused > 5000, (read, refused)
    assert time.process_time() - started < 30


@pytest.mark.filterwarnings("ignore")
def test_where_python_reads_literals_the_values_agree():
    "On edited text that Python itself parses as calls with literal arguments, both readings are the same."
    chance, agreed = random.Random(11), 0
    for _ in range(12_000):
        text = mutate("f(x=[1, 'a\\n', {'k': (2.5, None)}], y=\"b\", z=-3)\ng.h(a={'b': [True]}, c='''d''')", chance)
        if "\r" in text: continue  # Python's reader changes carriage returns
        try:
            expected = [
                {
                    "name": ast.unparse(node.value.func),
                    "arguments": {k.arg: ast.literal_eval(k.value) for k in node.value.keywords},
                }
                for node in ast.parse(text).body
                if not node.value.args or 1 / 0
            ]
        except Exception: continue  # noqa: S112 not Python, not literal, or not a call
        calls = outcome(text)
        if isinstance(calls, str): continue  # stricter than Python
        assert json.dumps(calls) == json.dumps(expected), text
        agreed += 1
    assert agreed > 300, agreed


MB = 10**6
HOSTILE = {
    "brackets": "f(x=" + "[" * MB,
    "parens": "f(x=" + "(" * MB,
    "dicts": "f(x=" + "{'a':" * MB,
    "json": "f(x=" + '{"a":[' * 99 + "1" * MB,
    "closed": "f(x=" + "[" * MB + "]" * MB + ")",
    "calls": "f(" * MB,
    "signs": "f(x=" + "-" * MB + "1)",
    "plus": "f(x=1" + " +" * MB,
    "backslashes": "f(x='" + "\\" * MB,
    "escaped quotes": "f(x='" + "\\'" * MB,
    "escaped pairs": 'f(x="' + '\\\\"' * MB,
    "quotes": "f(x=" + "'" * MB,
    "triples": "f(x='''" + "'' " * MB,
    "integer": f"f(x={'9' * MB})",
    "integers": "f(" + ",".join(f"x{i}={'7' * 90_000}" for i in range(11)) + ",y=)",
    "float": f"f(x={'9' * MB}.5)",
    "underscores": "f(x=" + "1_" * MB + ")",
    "sum": "f(x=" + "1+" * MB + "1)",
    "power": "f(x=9**9**9**9)",
    "towers": "f(x=(((10**100)**100)**100)**100)",
    "repeat": "f(x=[0]*10**12)",
    "repeat text": "f(x='a'*10**12)",
    "doubling": "f(x=" + "[" * 50 + "0" + "]*9" * 50 + ")",
    "joins": "f(x=" + "[1]+" * MB + "[1])",
    "spaces": "f(x=" + " " * MB,
    "lines": "\n" * MB + "f",
    "comments": "#\n" * MB + "f",
    "inner comments": "f(x=" + "#\n" * MB,
    "continued": "f(x=" + "\\\n" * MB,
    "names": "a" * MB,
    "dashes": "a-" * MB,
    "key": "f(" + "a-" * MB + "=",
    "key brackets": "f(a" + "[" * MB + "=1)",
    "word": "f(x=" + "a" * MB,
    "words": "f(x=" + "a " * MB,
    "tags": "<function_calls>" * MB + "f",
    "half tags": "<function_calls" * MB,
    "fences": "```" * MB + "`",
    "semicolons": "f()" + ";" * MB,
    "prose": "a. " * MB + "!!(",
    "python lists": "f(" + ",".join(f"x{i}=['a']" for i in range(60_000)) + ",oops)",
    "json errors": "f(" + ",".join(f"x{i}=[1,]" for i in range(60_000)) + ",oops)",
    "bad escapes": "f(" + ",".join(f'x{i}="\\d"' for i in range(60_000)) + ",oops)",
    "duplicates": "f(x=[" + '{"a":1,"a":2},' * 60_000 + "])",
    "nuls": "\0" * MB,
    "surrogates": "\ud800" * MB,
    "elements": "f(x=[" + "'a'," * 300_000 + "oops])",
    "unclosed strings": "f(x=" + "['a' " * MB,
}


def cost(act): # seconds of processor time
    started = time.process_time()
    act()
    return time.process_time() - started


@pytest.fixture(scope="module")
def yard():
    "What ten million additions cost on this machine, about a tenth of a second."
    return min(cost(lambda: sum(range(10_000_000))) for _ in range(3))


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_text_ends_quickly(name, yard):
    def refused():
        with pytest.raises(CallError): parse_calls(HOSTILE[name], TOOLS)
    assert (took := cost(refused)) < 30 * yard, (
        f"{name}: {took / yard:.0f} times what ten million additions cost; the worst was 6"
    )


def test_a_valid_megabyte_is_read():
    calls = [{"name": "f", "arguments": {"text": 'é\\"\n' * 100_000, "rows": [[i, str(i)] for i in range(40_000)]}}] * 2
    assert parse_calls(format_calls(calls)) == calls


# Other parsers' cases

def test_collected_cases():
    wrong = []
    for case in shared_lines("function_calls_cases.jsonl"):
        tools = None
        if "property order" in case["note"]:
            orders = json.loads(case["note"].split("property order", 1)[1])
            tools = [tool(name, **{key: "any" for key in order}) for name, order in orders.items()]
        found = outcome(case["input"], tools)
        expected = {"calls": case["expected"], "none": []}.get(case["expect"])
        if (
            isinstance(found, str)
            if case["expect"] == "reject"
            else not isinstance(found, str) and same(found, expected)
        ):
            continue
        wrong.append(case["id"])
    assert wrong == ["case0034"]  # f(x=(1,2)): refused by its source, while three others read such a tuple as a list


@pytest.mark.parametrize("name", ["bfcl", "real"])
def test_collected_rows(name):
    expected = {row["id"]: row["calls"] for row in shared_lines(f"{name}_expected.jsonl")}
    for row in shared_lines(f"{name}_rows.jsonl"):
        found = [parse_calls(message["function_calls"]) for message in row["messages"] if message["function_calls"]]
        assert same(found if name == "real" else [call for turn in found for call in turn], expected[row["id"]]), row[
            "id"
        ]


TYPED = [
    (
        r'f(a=true, b=null, c=[1, 2.5, "x"], d={"k": [None, False]}, e=1e5, g=-3)',
        {"a": True, "b": None, "c": [1, 2.5, "x"], "d": {"k": [None, False]}, "e": 100000.0, "g": -3},
    ),
    (r'f(a="C:\\new", b="say \"x\"", c="\u00e9\ud83d\ude00")', {"a": "C:\\new", "b": 'say "x"', "c": "é😀"}),
    ('f(a="first\nsecond")', {"a": "first\nsecond"}),
    ("f(\ta = 1 ,\r\n b='x' , )", {"a": 1, "b": "x"}),
    ("f(from='SFO', class=1, user-id=2, a.b=3)", {"from": "SFO", "class": 1, "user-id": 2, "a.b": 3}),
    (
        "f(a=1_000, b=0x1F, c=0o17, d=0b11, e=.5, g=5., h=1E5)",
        {"a": 1000, "b": 31, "c": 15, "d": 3, "e": 0.5, "g": 5.0, "h": 100000.0},
    ),
    ('f(a=r"\\d", b=u"x", c="""x\ny""")', {"a": r"\d", "b": "x", "c": "x\ny"}),
    ("f(a=9007199254740993)", {"a": 9007199254740993}),
]

BY_REASON = {
    "duplicate_argument": ["f(a=1, a=2)"],
    "nested_call": ["f(a=g(x=1))", "f(a=datetime.now())", "print(f(a=1))"],
    "f_string": ['f(a=f"{x}")'],
    "implicit_concatenation": ['f(a="x" "y")'],
    "bytes": ['f(a=b"x")', 'f(a=rb"x")'],
    "bad_number": ["f(a=1j)", "f(a=1.2.3)", "f(a=1__0)", "f(a=0x)"],
    "leading_zero": ["f(a=007)"],
    "non_finite": ["f(a=NaN)", "f(a=-Infinity)", "f(a=1e999)"],
    "comprehension": ["f(a=[x for x in y])"],
    "not_a_call": [
        '{"name": "f", "arguments": {}}',
        "result = f(a=1)",
        "Let me call f(a=1)",
        "1. f(a=1)",
        "<tool_call>\n{}\n</tool_call>",
    ],
    "unpacking": ["f(*a)", "f(**a)"],
    "set": ["f(a={1, 2})"],
    "non_string_key": ["f(a={1: 2})"],
    "duplicate_key": ['f(a={"x": 1, "x": 2})'],
    "bare_word": ["f(a=undefined)", "f(a=TRUE)"],
    "unclosed": ["f(a=1"],
    "unterminated_string": ['f(a="x'],
    "expression": ["f(a=lambda: 1)", "f(a=2**10)"],
    "missing_separator": ["f(a=1) g()", "f()g()"],
    "positional_argument": ['f("x")'],
}


@pytest.mark.parametrize("text, arguments", TYPED)
def test_types_and_texts_stay(text, arguments):
    (call,) = parse_calls(text)
    assert call == {"name": "f", "arguments": arguments}
    assert list(map(type, call["arguments"].values())) == list(map(type, arguments.values()))


@pytest.mark.parametrize("reason, text", [(reason, text) for reason, texts in BY_REASON.items() for text in texts])
def test_no_safe_reading(reason, text):
    with pytest.raises(CallError) as error: parse_calls(text, fold=False)
    assert error.value.reason == reason


# Names that only the tools know

ODD_NAMES = ["Market Trends API", "Quotes by Keywords", "getHeadlines (v2)", "it's", "A & B", "查询 天气", "🌦",
             "[beta] search", "#1 tool",
             "f(x)", "x=y", "-dash", "a, b", "<tag>", "None of", "null", "```", "name ", "ends(", "über größe 2"]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_a_declared_name_before_a_bracket_has_one_reading(name):
    tools = [tool(name, x="any"), tool("f", x="any"), tool("getHeadlines", x="any")]
    for text in (f"{name}(x=1)\nf(x=2)\n{name} (x=3)", f"f(x=2)\n\n{name}(x='a(b')",
                 f"<function_calls>\n{name}(x=1)\n</function_calls>"):
        found = [call["name"] for call in parse_calls(text, tools)]
        assert set(found) <= {name, "f"} and name in found, (text, found)
    assert parse_calls("getHeadlines(x=1)", tools)[0]["name"] == "getHeadlines"
    if not isinstance(outcome(f"{name}(x=1)"), list): assert outcome(f"{name}(x=1)",
                                                                     [tool("g")]) == outcome(f"{name}(x=1)")


@pytest.mark.parametrize("key", ["user name", "max price (USD)", "c'est", "键 值", "a&b", "🌦"])
def test_declared_names_of_arguments(key):
    tools = [tool("f", **{key: "any", "x": "any"})]
    (call,) = parse_calls(f"f({key}='a', x=1)", tools)
    assert call["arguments"] == {key: "a", "x": 1}
    assert isinstance(outcome(f"f({key}='a')"), str)


@pytest.mark.parametrize("sign", ["--42", "- -42", "+-42", "-(-42)", "-(42)", "---42"])
@pytest.mark.parametrize("around", ["{}", "[{}]", "[1, {}]", "{{'a': {}}}", "({})", "[[{}]]"])
def test_signs_of_signs_are_one_expression_wherever_they_stand(sign, around):
    text, plain = f"f(x={around.format(sign)})", str((-1) ** sign.count("-") * 42)
    assert outcome(text, fold=False) == "expression"
    assert outcome(text) == [{"name": "f", "arguments": {"x": ast.literal_eval(around.format(plain))}}]
    assert parse_calls(f"f(x={around.format('-42')})", fold=False)


@pytest.mark.parametrize("text", [
    "2024-10-15", "15-10-2024", "10/15/2024", "2024/10/15", "2020-2024", "555-1234", "1-800-555-1234", "2024-10",
    "10/2024", "2024 - 10 - 15", "2024 / 10 / 15", "10/15", "31/12", "1/2", "10-15", "1-3"])
def test_a_date_is_not_computed(text):
    for around in ("f(x={})", "f(x=[{}])", "f(x={{'a': {}}})"):
        with pytest.raises(CallError) as caught: parse_calls(around.format(text))
        assert caught.value.reason == "expression" and "date" in str(caught.value)
    with pytest.raises(CallError, match="date"): parse_calls("f(x=1 - 2024-10-15)")
    for sum_, value in (("500-20", 480), ("7-2", 5), ("4/2", 2.0), ("100/4", 25.0),
                        ("2 * 3 - 1", 5), ("2000 - 1", 1999), ("5 - 2 - 1", 2),
                        ("1000/3", 1000 / 3), ("10 / 15", 10 / 15), ("10 - 15", -5)): assert value_of(sum_) == value


def test_positional_arguments_know_the_bare_map():
    tools = [{"name": "f", "parameters": {"city": {"type": "string", "required": True}, "days": {"type": "integer"}}}]
    assert parse_calls("f('Oslo', 2)", tools)[0]["arguments"] == {"city": "Oslo", "days": 2}
    assert outcome("f(2)", tools) == "positional_argument"
