"""Texts read per second: `parse_calls` beside CPython's own parser, in one run.

    python benchmarks/calls.py [texts]

Both sides read the same generated texts and must give the same calls. CPython's side is the shortest honest one:
`ast.parse`, then `ast.literal_eval` for every argument. It gets texts in Python's spelling, since it refuses everything
else. """
import ast
import random
import sys
import time

from proxy_sft.data.calls import format_calls, parse_calls


def draw_texts(count, seed=5):
    "Calls with Dolci's mix: one to three a text, mostly short strings and numbers, now and then a nested value."
    chance, words = (
        random.Random(seed),
        'alpha beta gamma Zürich it\'s "quoted" line\nbreak 2024-01-01 a,b(c)'.split(" "),
    )
    def scalar():
        return chance.choice(
            [
                " ".join(chance.choices(words, k=chance.randrange(1, 5))),
                chance.randrange(10**6),
                chance.random(),
                True,
                None,
            ]
        )
    def value():
        kind = chance.random()
        if kind < 0.8: return scalar()
        if kind < 0.9: return [scalar() for _ in range(chance.randrange(6))]
        return {word: scalar() for word in chance.sample(words, 3)}
    def call(): return {"name": chance.choice(["get_weather", "stocks.quote", "api.v1.search"]),
                        "arguments": {f"key_{i}": value() for i in range(chance.randrange(5))}}
    return [format_calls([call() for _ in range(chance.choice((1, 1, 2, 3)))]) for _ in range(count)]


def read_with_ast(text):
    "What CPython's parser makes of the text."
    return [
        {
            "name": ast.unparse(node.value.func),
            "arguments": {word.arg: ast.literal_eval(word.value) for word in node.value.keywords},
        }
        for node in ast.parse(text).body
    ]


def main():
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 5000
    texts = draw_texts(count)
    assert all(parse_calls(text) == read_with_ast(text) for text in texts)
    rates = {}
    for name, read in {"ast.parse + literal_eval": read_with_ast, "parse_calls": parse_calls}.items():
        best = float("inf")
        for _ in range(5):
            start = time.perf_counter()
            for text in texts: read(text)
            best = min(best, time.perf_counter() - start)
        rates[name] = count / best
        print(f"{name:26} {rates[name]:>10,.0f} texts/s")
    slow, fast = rates.values()
    print(f"{count:,} texts of {sum(map(len, texts)) / count:.0f} characters on average; ratio {fast / slow:.1f}")


if __name__ == "__main__":
    main()
