"""Requests in every spelling that clients use, and some that servers refuse; a seed gives the same requests
everywhere."""
import random

SCHEMAS = (
    {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    {"type": "dict", "properties": {"x": {"type": "float"}, "tags": {"type": "list", "items": {"type": "str"}}}},
    {
        "type": "object",
        "properties": {"when": {"type": "tuple"}, "n": {"type": "int", "default": 3}, "b": {"type": "bool"}},
    },
    {"type": "object", "properties": {"type": {"type": "string", "enum": ["dict", "float"]}}},
    {"type": "object", "properties": {"x": {"anyOf": [{"type": "map"}, {"type": "long"}, {"type": "double"}]}}},
    {"type": "object", "properties": {'\u00e9"\u6771': {"description": 'a "type": "dict" </tool_call> <b>\n'}}},
    {"properties": {}},
    {},
)
ODD_SCHEMAS = (  # SGLang rewrites these, or refuses them
    {
        "type": "object",
        "properties": {"d": {"type": "varchar(255)"}, "e": {"type": ["dict", "null"]}, "f": {"type": "List[str]"}},
    },
    {"type": "object", "properties": {"d": {"type": "any"}}},
    {"type": "object", "required": "d"},
    [],
    "text",
)
TEXTS = ("What is the weather in Lisbon tomorrow?", "", " ", "a\nb", "\n\n", "trailing \t\n",
         "\u00e9 \u6771\u4eac \U0001f642", "{}", "<b>&amp;\"'\\",
         "\u2028\x85\x1c", "x-anthropic-billing-header: 1\nrest", "null")
ARGUMENTS = ('{"city": "Lisbon"}', '{"city":"Lisbon"}', '{}', '{"x": 1e22, "n": [1, 2.50, null, true]}',
             '{"\\u00e9": "\u6771 \\"q\\""}',
             '{"b": 1, "a": {"z": 1, "y": []}}', ' {"x" : 0.1 } ', '{"big": 123456789012345678901234567890}',
             '{"low": -9223372036854775808}')
ODD_ARGUMENTS = ("", "nonsense", "[1]", "3", None, {"city": "Lisbon"}, '{"x": NaN}', '{"a": 1, "a": 2}')


def shuffled(chance, pairs):
    pairs = list(pairs)
    chance.shuffle(pairs)
    return dict(pairs)


def spelt_tool(chance, odd=0.0):
    "One tool: keys in any order, missing or null fields, keys that nobody asked for; with `odd` also what is refused."
    function = {"name": chance.choice(["weather.forecast", "f", "get_\u00e9", 'q"uote'])}
    if chance.random() < 0.8: function["description"] = chance.choice(["Weather of a city", "", None, "\u6771 \"x\"\n"])
    if chance.random() < 0.85: function["parameters"] = chance.choice([*SCHEMAS, None])
    for key, values in (("strict", [True, False, None]), ("returns", [{"type": "string"}]),
                        ("defer_loading", [None, True])):
        if chance.random() < 0.15: function[key] = chance.choice(values)
    tool = {"function": function}
    if chance.random() < 0.9: tool["type"] = "function"
    if chance.random() < 0.1: tool["id"] = 7
    if chance.random() < 0.05: tool["defer_loading"] = chance.choice([None, True, False])
    if chance.random() < odd:
        function["parameters"] = chance.choice(ODD_SCHEMAS)
        if chance.random() < 0.5: tool["type"] = chance.choice(["other", None, 3])
        if chance.random() < 0.3: function["name"] = chance.choice([None, 3, ""])
        if chance.random() < 0.3: function["description"] = 3
        if chance.random() < 0.2: tool = function
        if chance.random() < 0.1: del tool[chance.choice(list(tool))]
    elif chance.random() < 0.5: tool["function"] = shuffled(chance, function.items())
    return shuffled(chance, tool.items()) if chance.random() < 0.5 else tool


def content(chance, odd):
    text = chance.choice(TEXTS)
    kind = chance.random()
    if kind < 0.65: return text
    if kind < 0.8: return [{"type": "text", "text": text}]
    if kind < 0.85: return [{"type": "text", "text": text}, {"type": "text", "text": chance.choice(TEXTS)}]
    if kind < 0.85 + odd: return chance.choice([None, [], 3])
    return text


def spelt_call(chance, number, odd):
    call = {"id": f"call_{number}", "type": "function",
            "function": {"name": chance.choice(["weather.forecast", "f"]), "arguments": chance.choice(ARGUMENTS)}}
    if chance.random() < 0.2: call["index"] = 0
    if chance.random() < odd: call["function"]["arguments"] = chance.choice(ODD_ARGUMENTS)
    if chance.random() < odd / 3: del call[chance.choice(["id", "type", "function"])]
    if chance.random() < odd / 3 and "function" in call: del call["function"][chance.choice(["name", "arguments"])]
    return call


def spelt_messages(chance, odd=0.0):
    "Messages of one request."
    out = []
    if chance.random() < 0.5: out.append({"role": chance.choice(["system", "system", "developer"]),
                                          "content": content(chance, odd)})
    for number in range(chance.randint(1, 3)):
        out.append({"role": "user", "content": content(chance, odd)})
        if chance.random() < 0.2: out[-1] |= {"name": "ann", "extra": 1}
        if chance.random() < 0.5:
            calls = [spelt_call(chance, f"{number}{k}", odd) for k in range(chance.randint(1, 2))]
            out.append({"role": "assistant", "content": chance.choice([None, "", content(chance, odd)]),
                        "tool_calls": calls})
            if chance.random() < 0.2: del out[-1]["content"]
            for call in calls:
                out.append({"role": "tool", "tool_call_id": call.get("id"), "content": content(chance, odd)})
                if chance.random() < 0.3: out[-1]["name"] = "f"
        if chance.random() < 0.6:
            out.append({"role": "assistant", "content": content(chance, odd)})
            if chance.random() < 0.2: out[-1] |= {"tool_calls": chance.choice([None, []])}
            if chance.random() < 0.1: out[-1] |= {"reasoning_content": "hm", "refusal": None}
        if chance.random() < 0.1: out.append({"role": chance.choice(["system", "developer"]),
                                              "content": content(chance, odd)})
    if chance.random() < odd / 2: out[chance.randrange(len(out))]["role"] = chance.choice(["function", "alien", "User",
            "System"])
    return out


def requests(count, seed=0):
    "`count` requests: messages and tools (None for none); one in four may hold what servers refuse."
    chance = random.Random(seed)
    for number in range(count):
        kind, odd = chance.random(), 0.15 * (number % 4 == 3)
        tools = None if kind < 0.15 else [] if kind < 0.2 else [spelt_tool(chance,
                odd) for _ in range(chance.randint(1, 3))]
        yield {"messages": spelt_messages(chance, odd), "tools": tools}
