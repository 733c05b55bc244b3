"""Conversion in two checkouts, part by part and in turns: what a change costs, on a machine that others use as well.

    python benchmarks/pair.py OLD NEW ROWS.jsonl [rounds] [columns]

OLD and NEW are pythons, each in an environment of its own where that version of the package is installed. Small parts
of the same lines are converted by both in turns, each once to warm up and four times timed, in processor time. Said are
the ratio of the sums of each part's shortest time, and the median of the ratios of pairs: where the two are far from
each other, the machine was too busy. With `columns`, the lines are taken as written from columns, as 00_download
writes them: no key stands twice in them. """
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

ROWS, PARTS = 160, 4  # rows of a part, about half a megabyte; parts, taken from all over the first lines


def serve(source, *columns):
    "One side: a number of a part comes in, seconds go out."
    try:
        from proxy_sft.data.files import convert_part, keep_memory, Part
        from proxy_sft.data.ledger import Choices
    except ImportError:  # before the packages
        from proxy_sft.ledger import Choices
        from proxy_sft.streams import convert_part, keep_memory, Part
    keep_memory()
    with open(source, "rb") as stream: lines = [line for _, line in zip(range(3 * ROWS * PARTS), stream)]
    parts = [Part(source, 1, b"".join(lines[at:at + ROWS])) for at in range(0, len(lines), 3 * ROWS)]
    if columns and hasattr(parts[0], "may_repeat"): parts = [replace(part, may_repeat=False) for part in parts]
    choices = Choices(heldout_fraction=0.01)
    print(len(parts), flush=True)
    for line in sys.stdin:
        spent = []
        for _ in range(5):
            begun = time.process_time_ns()
            convert_part(parts[int(line)], choices)
            spent.append((time.process_time_ns() - begun) / 1e9)
        print(min(spent[1:]), flush=True)


def main(old, new, source, rounds=20, *columns):
    sides = [
        subprocess.Popen([python, __file__, "serve", source, *columns], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                         text=True, cwd=Path(__file__).parent)
        for python in (old, new)
    ]
    count = min(int(side.stdout.readline()) for side in sides)
    found = [[[] for _ in range(count)] for _ in sides]
    for turn in range(int(rounds)):
        for part in range(count):
            for which in ((0, 1), (1, 0))[turn % 2]:
                print(part, file=sides[which].stdin, flush=True)
                found[which][part].append(float(sides[which].stdout.readline()))
    least = [sum(map(min, times)) for times in found]
    pairs = [b / a for first, second in zip(*found) for a, b in zip(first, second)]
    print(f"{Path(source).name}: {1e6 * least[0] / count / ROWS:.1f} and {1e6 * least[1] / count / ROWS:.1f} us/row; "
          f"new / old: {least[1] / least[0]:.3f} of the shortest times, {statistics.median(pairs):.3f} of pairs")
    for side in sides: side.stdin.close()


if __name__ == "__main__":
    serve(*sys.argv[2:]) if sys.argv[1] == "serve" else main(*sys.argv[1:])
