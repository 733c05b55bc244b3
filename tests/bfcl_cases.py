"""Answers to the leaderboard's questions: every allowed value, in several spellings, and changed ones, right and
wrong."""
import copy
import json
import random

ODD = [
    "",
    "x",
    "null",
    "true",
    0,
    1,
    -7,
    2.5,
    True,
    False,
    None,
    [],
    {},
    ["a"],
    [1, 2],
    {"a": 1},
    [[1]],
    [{"a": 1}],
    10**30,
    "a, b: {c}",
    "[1,2",
]


def spelled(value, kind, items, language, rng):
    "A value as source text of Java or JavaScript; sometimes in a spelling that the declared type does not have."
    if language == "Python": return value
    def item(v): return json.dumps(v) if not isinstance(v, str) or rng.random() < 0.8 else f"'{v}'"
    java = language == "Java"
    if isinstance(value, bool): return str(value).lower()
    if isinstance(value, int):
        suffixes = {"long": "LLl", "float": "f", "Bigint": "n"}.get(kind, " ")
        return f"{value}{rng.choice(suffixes) if rng.random() < .8 else ''}".strip()
    if isinstance(value, float): return f"{value}{'f' if kind == 'float' and java else ''}"
    if isinstance(value, list) and not java:
        inner = ", ".join(spelled(v, "array", None, language, rng) if isinstance(v, list) else item(v) for v in value)
        return rng.choice((f"[{inner}]", f"[ {inner} ]", f"new Array({inner})", f"[{inner.replace(', ', ',')}]"))
    if isinstance(value, list):
        inner = ", ".join(f"{v}L" if items == "long" else item(v) for v in value)
        adds = " ".join(f"add({part});" for part in inner.split(", "))
        return rng.choice(
            (f"new String[]{{{inner}}}", f"new int[] {{ {inner} }}")
            if kind == "Array"
            else (
                f"new ArrayList<>(Arrays.asList({inner}))",
                f"new ArrayList<Long>() {{{{ {adds} }}}}",
                f"new ArrayList<Integer>(Arrays.asList({inner}))",
            )
        )
    if isinstance(value, dict):
        plain = {
            k: rng.choice([x for x in v if x != ""] or [""]) if isinstance(v, list) and v else v
            for k, v in value.items()
        }
        if java:
            return (f"new HashMap<String, Object>() {{{{ "
                    f"{' '.join(f'put({json.dumps(k)}, {item(v)});' for k, v in plain.items())} }}}}")
        pairs = ", ".join(
            f"{rng.choice((k, json.dumps(k)))}: "
            f"{spelled(v, 'array', None, language, rng) if isinstance(v, list) else item(v)}"
            for k, v in plain.items()
        )
        return rng.choice((f"{{{pairs}}}", f"{{ {pairs} }}", f"{{\n{pairs}\n}}"))
    text = str(value)
    return rng.choice((text, text, f'"{text}"', f"'{text}'")) if kind in ("String", "char") else text


def concrete(value, rng):
    "An allowed value as a model would write it: dictionaries hold a list of values per key."
    if isinstance(value, list): return [concrete(v, rng) if isinstance(v, dict) else v for v in value]
    if not isinstance(value, dict): return value
    chosen = {k: rng.choice(v) if isinstance(v, list) and v else v for k, v in value.items()}
    return {k: v for k, v in chosen.items() if v != "" or rng.random() < 0.1}


def right_calls(question, rng, position=0):
    "The calls of a possible answer; `position` chooses among the allowed values of every parameter."
    calls, language = [], {"simple_java": "Java", "simple_javascript": "JavaScript"}.get(question.category, "Python")
    for answer in question.answers:
        (name, allowed), made = next(iter(answer.items())), {}
        properties = next(f for f in question.functions if f["name"] == name)["parameters"]["properties"]
        for parameter, values in allowed.items():
            value = values[position % len(values)] if values else ""
            declared = properties.get(parameter, {"type": "string"})
            if value == "" and (len(values) > 1 or rng.random() < 0.9): continue
            items = declared.get("items", {}).get("type")
            if language == "Python": made[parameter] = concrete(value, rng)
            else: made[parameter] = spelled(value, declared["type"], items, language, rng)
        calls.append({"name": name, "arguments": made})
    return calls


def changed_value(value, rng):
    "Another value: near by, or quite another."
    if rng.random() < 0.12: return rng.choice(ODD)
    if isinstance(value, bool): return rng.choice((not value, str(value), int(value)))
    if isinstance(value, (int, float)):
        return rng.choice(
            (value + 1, -value, float(value) if abs(value) < 1e300 else value, int(value), str(value), [value])
        )
    if isinstance(value, str):
        near = (
            value.upper(),
            value.lower(),
            value + ".",
            f" {value}",
            value.replace(" ", ""),
            value.replace(" ", "-"),
            value.replace("'", '"'),
            f"'{value}'",
        )
        return rng.choice((*near, value + "s", value[:-1], value[::-1], [value], value.replace(",", ";"), value + ")"))
    if isinstance(value, list):
        more = [changed_value(v, rng) if rng.random() < 0.4 else v for v in value]
        return rng.choice(
            (
                value[::-1],
                value[:-1],
                value + value[:1],
                more,
                more,
                [],
                str(value),
                [float(v) if isinstance(v, int) else v for v in value],
                [int(v) if isinstance(v, float) else v for v in value],
                [value],
                ",".join(map(str, value)),
            )
        )
    if isinstance(value, dict) and value:
        key = rng.choice(sorted(value))
        return rng.choice(
            (
                {**value, key: changed_value(value[key], rng)},
                {k: v for k, v in value.items() if k != key},
                {**value, "extra": 1},
                {},
                [value],
                str(value),
            )
        )
    return rng.choice(ODD)


def changed_calls(calls, rng):
    "The same calls with one thing or two changed."
    calls = copy.deepcopy(calls)
    for _ in range(rng.choice((1, 1, 1, 2))):
        what, call = rng.random(), rng.choice(calls) if calls else {"name": "f", "arguments": {}}
        names = sorted(call["arguments"])
        if what < 0.05: call["name"] = rng.choice((call["name"].replace(".", "_"), call["name"].upper(), "f"))
        elif what < 0.12: calls = rng.choice((calls[:-1], calls + calls[:1], [], calls[::-1], calls[1:] + calls[:1]))
        elif what < 0.17: call["arguments"]["extra"] = 1
        elif what < 0.27 and names: del call["arguments"][rng.choice(names)]
        elif names:
            name = rng.choice(names)
            call["arguments"][name] = changed_value(call["arguments"][name], rng)
    return calls


def all_cases(questions, changes=3, seed=0):
    """(category, functions, answers, calls): every allowed value of every parameter once or more, then so many changes
    per question."""
    rng, cases = random.Random(seed), []
    for question in questions:
        if not question.answers: continue
        longest = max(
            len(values)
            for answer in question.answers
            for allowed in answer.values()
            for values in [[], *allowed.values()]
        )
        for position in range(max(2, longest)): cases.append((question, right_calls(question, rng, position)))
        for _ in range(changes):
            cases.append((question, changed_calls(right_calls(question, rng, rng.randrange(4)), rng)))
    return cases


PIECES = [
    *"{}[]()'\",:;0123 \n.-eEfLlnN",
    "true",
    "new Array(",
    "[[",
    "]]",
    "}}",
    "{{",
    "new ArrayList<>()",
    "new HashMap<>()",
    "1_000",
    "nan",
    "inf",
    "+5",
    "0x1",
]


def garbled_cases(questions, count, seed=0):
    "Source text of Java and JavaScript with characters put in, left out and doubled."
    rng, cases = random.Random(seed), []
    asked = [question for question in questions if question.category in ("simple_java", "simple_javascript")]
    while len(cases) < count:
        question = rng.choice(asked)
        calls, declared = (
            right_calls(question, rng, rng.randrange(4)),
            question.functions[0]["parameters"]["properties"],
        )
        names = [n for n in calls[0]["arguments"] if declared[n]["type"] != "any"] or list(calls[0]["arguments"])
        if not names: continue
        name = rng.choice(names)
        text = calls[0]["arguments"][name]
        for _ in range(rng.choice((1, 1, 2, 3))):
            at, what = rng.randrange(len(text) + 1), rng.random()
            text = text[:at] + (
                rng.choice(PIECES) + text[at:]
                if what < 0.5
                else text[at + 1 :]
                if what < 0.8
                else text[at : at + rng.randrange(8)] + text[at:]
            )
        calls[0]["arguments"][name] = text
        cases.append((question, calls))
    return cases
