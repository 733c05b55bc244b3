"""Trainings that differ in their seed alone, evaluated on the same turns: right of all together, and of each.

    python tools/real.py -p seed 43 -p run_name second      # and so on, once for each seed
    python benchmarks/seeds.py workspace/runs/smollm2 workspace/runs/second

Intervals (95 %) are of turns that are drawn, each with the answers of all trainings: how far these questions decide.
How far the seed decides is seen in the figures behind them, one for each training in the order that was given.
"""
import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from proxy_sft.evaluation.answers import METRICS, wilson
from proxy_sft.evaluation.scores import drawn_sums, middle

CATEGORY = "source: "


def counts(runs: list[list[dict]], metric: str, model: str, group: str = "") -> np.ndarray: # runs x (right, of)
    "How often each training is right."
    values = [[turn[model]["verdict"][metric] for turn in turns
               if metric in turn[model]["verdict"] and group in ("", *turn["slices"])] for turns in runs]
    return np.array([(sum(each), len(each)) for each in values])


def together(runs: list[list[dict]], value: Callable[[dict], tuple]) -> np.ndarray: # figure, lower, upper
    "A ratio of sums over all trainings, and where it lies when turns are drawn."
    values = np.array([[value(turn) for turn in turns] for turns in runs], float).sum(0)
    sums, drawn = values.sum(0), drawn_sums(np.arange(len(values)), values)
    return np.array([sums[0] / sums[1], *middle(drawn[:, 0] / drawn[:, 1])])


def right(metric: str) -> Callable[[dict], tuple]:
    "Whether the tuned model is right, and whether the metric is for this turn."
    def of(turn): return turn["tuned"]["verdict"].get(metric, 0), metric in turn["tuned"]["verdict"]
    return of


def share_of(runs: list[list[dict]], metric: str) -> np.ndarray: # share, lower, upper
    "How often all trainings are right; where they all are or none is, draws are all alike: Wilson's of the questions."
    found, (right_, of) = together(runs, right(metric)), counts(runs, metric, "tuned").sum(0)
    return found if 0 < right_ < of else np.array([found[0], *wilson(int(right_ // len(runs)), int(of // len(runs)))])


def loss(model: str, call: bool) -> Callable[[dict], tuple]:
    "Loss and tokens of the data's own answer, where it is a call or where it is none."
    return lambda turn: turn[model]["loss"] if bool(turn["expected"]) == call else (0, 0)


def metric_lines(runs: list[list[dict]]) -> list[str]:
    "Every metric, and the losses."
    lines = ["| right of all | base | tuned, all seeds | each seed |", "|---|---|---|---|"]
    for metric, words in METRICS.items():
        base, tuned = (counts(runs, metric, model) for model in ("base", "tuned"))
        share, low, high = 100 * share_of(runs, metric)
        lines.append(f"| {words} | {base[0, 0]}/{base[0, 1]} | {tuned[:, 0].sum()}/{tuned[:, 1].sum()} = {share:.0f} % "
                     f"[{low:.0f}, {high:.0f}] | {', '.join(map(str, tuned[:, 0]))} of {tuned[0, 1]} |")
    for call, words in ((True, "calls"), (False, "text answers")):
        base, tuned = (together(runs, loss(model, call)) for model in ("base", "tuned"))
        each = [f"{together([turns], loss('tuned', call))[0]:.3f}" for turns in runs]
        lines.append(f"| loss of the data's {words}, nats a token | {base[0]:.3f} | {tuned[0]:.3f} "
                     f"[{tuned[1]:.3f}, {tuned[2]:.3f}] | {', '.join(each)} |")
    return lines


def category_lines(runs: list[list[dict]]) -> list[str]:
    "By where the questions come from."
    metrics = {"decision": "calls when the data does", "names": "right tools", "exact": "exact calls", "stops": "stops"}
    groups = sorted({name for turn in runs[0] for name in turn["slices"] if name.startswith(CATEGORY)})
    lines = ["| base → each seed | " + " | ".join(metrics.values()) + " |", "|---" * (len(metrics) + 1) + "|"]
    for group in groups:
        cells = []
        for metric in metrics:
            base, tuned = (counts(runs, metric, model, group) for model in ("base", "tuned"))
            (right, of), each = base[0], ", ".join(map(str, tuned[:, 0]))
            cells.append(f"{right} → {each} of {of}" if of else "–")
        lines.append(f"| {group.removeprefix(CATEGORY)} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    "Both tables."
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a training that was evaluated")
    folders = parser.parse_args().runs
    runs = [json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))["turns"] for folder in folders]
    for folder, turns in zip(folders, runs):
        if [(t["row"], t["message"]) for t in turns] != [(t["row"], t["message"]) for t in runs[0]]:
            sys.exit(f"{folder} was evaluated on other turns than {folders[0]}.")
    print("\n".join([*metric_lines(runs), "", *category_lines(runs)]))


if __name__ == "__main__":
    main()
