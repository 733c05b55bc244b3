"""The leaderboard's conversations: verdicts on planted answers are those of the package's own loop and checks."""
import ast
import importlib
import inspect
import json
import os
import subprocess
import sys
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import pytest

from proxy_sft.core.settings import load_settings
from proxy_sft.evaluation.answers import EvaluateError, Reply
from proxy_sft.evaluation.bfcl_multi_turn import (
    bfcl_package, converse, Dialogue, evaluate_multi_turn, judge_dialogue, MULTI_TURN, multi_turn_questions
)

needs_package = pytest.mark.skipif(not find_spec("bfcl_eval"),
                                   reason="pip install --no-deps bfcl-eval==2026.3.23 brings the questions and tools")


def call_of(package, source, classes):
    "An expected call, which the package writes as Python, as a model would make it."
    made = ast.parse(source, mode="eval").body
    name = made.func.id
    for one in classes:
        module = importlib.import_module(package.backends.CLASS_FILE_PATH_MAPPING[one])
        if not (method := getattr(getattr(module, one), name, None)): continue
        given = {keyword.arg: ast.literal_eval(keyword.value) for keyword in made.keywords}
        bound = inspect.signature(method).bind(None, *map(ast.literal_eval, made.args), **given)
        return {"name": name, "arguments": {key: value for key, value in bound.arguments.items() if key != "self"}}


def text_of(calls): return "\n".join(f"<tool_call>\n{json.dumps(call)}\n</tool_call>" for call in calls)


def planted(package, entry, expected):
    "Answers whose verdict follows from how they were made: name -> texts of each turn."
    turns = [[call_of(package, source, entry["involved_classes"]) for source in turn] for turn in expected]
    first = next(i for i, turn in enumerate(turns) if turn)
    changed = lambda turn: [turn] if turn is not turns[first] else []
    spoiled = [{**c, "arguments": {k: f"{v}x" if isinstance(v, str) else v for k, v in c["arguments"].items()}}
               for c in turns[first]]
    found = {
        "right": [[text_of(turn)] if turn else [] for turn in turns],
        "right, step by step": [[text_of([call]) for call in turn] for turn in turns],
        "nothing is called": [[] for _ in turns],
        "a turn without its calls": [[text_of(calls) for calls in changed(turn) if calls] for turn in turns],
        "wrong tool": [[text_of([{"name": "no_such_tool", "arguments": {}}])] if turn else [] for turn in turns],
        "wrong arguments": [[text_of(spoiled if turn is turns[first] else turn)] if turn else [] for turn in turns],
        "an argument that is none": [[text_of([{**c, "arguments": {**c["arguments"], "colour": 1}} for c in turn])]
                                     if turn else [] for turn in turns],
        "once more": [[text_of(turn), text_of(turn[-1:])] if turn else [] for turn in turns],
        "too many steps": [[text_of(turn[:1])] * 25 if turn else [] for turn in turns],
        "just few enough steps": [[text_of([c]) for c in turn] + [text_of(turn[-1:])] * (20 - len(turn)) if turn else []
                                  for turn in turns],
        "calls where none is expected": [[text_of(turn or turns[first])] for turn in turns],
        "unreadable": [["<tool_call>\n{\"name\": \n</tool_call>"] for _ in turns],
    }
    return found


def ours(package, entry, expected, turns):
    "The verdict here, and why."
    dialogue = Dialogue(package, json.loads(json.dumps(entry)), expected)
    def answer(questions):
        texts, step = turns[dialogue.turn], len(dialogue.steps[-1])
        return [Reply(texts[step] if step < len(texts) else "Done.", True, 1)]
    return converse([dialogue], answer)[0]


def official(cases):
    "The package's own verdicts, in a process of their own, since its tools stay in it."
    text = "".join(json.dumps([name, turns]) + "\n" for name, turns in cases)
    run = subprocess.run([sys.executable, Path(__file__).parent / "bfcl_official_multi_turn.py"], input=text,
                         capture_output=True, text=True)
    if "ModuleNotFoundError" in run.stderr: pytest.skip(f"the package's runner needs more: {run.stderr[-80:]}")
    assert run.returncode == 0, run.stderr[-2000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


def cases_of(package, every):
    return [(entry["id"], kind, turns, ours(package, entry, expected, turns)) for category in MULTI_TURN
            for entry, expected in multi_turn_questions(package, category)[::every]
            for kind, turns in planted(package, entry, expected).items()]


@needs_package
@pytest.mark.parametrize("every", [50, pytest.param(1, marks=pytest.mark.skipif(
    not os.environ.get("PROXY_SFT_SOAK"), reason="long: all questions when PROXY_SFT_SOAK is set"))])
def test_verdicts_are_those_of_the_packages_own_loop(every):
    package = bfcl_package()
    cases = cases_of(package, every)
    verdicts = official([(name, turns) for name, _, turns, _ in cases])
    apart = [(name, kind, theirs, mine) for (name, kind, _, mine), theirs in zip(cases, verdicts, strict=True)
             if theirs != mine.partition(": ")[0]]
    print(f"{len(cases)} planted conversations: {dict(Counter(verdicts))}")
    assert not apart, apart[:5]
    kinds = Counter((kind, not mine) for _, kind, _, mine in cases)
    assert kinds["right", True] and not kinds["right", False]
    for _, kind, turns, mine in cases: # one by one, two questions have turns of more calls than there may be steps
        if kind == "right, step by step": assert bool(mine) == (max(map(len, turns)) > 20)
    for kind in ("nothing is called", "wrong tool", "too many steps", "unreadable"): assert not kinds[kind, True], kind
    assert {"", "multi_turn:instance_state_mismatch", "multi_turn:force_terminated",
            "multi_turn:empty_turn_model_response"} <= {*verdicts}


@needs_package
def test_a_models_text_is_never_evaluated(tmp_path):
    package, spoiled = bfcl_package(), tmp_path / "spoiled"
    entry, expected = multi_turn_questions(package, "multi_turn_base")[0]
    attacks = [{"name": "open", "arguments": {"file": str(spoiled), "mode": "w"}},
               {"name": f"open('{spoiled}', 'w') or cd", "arguments": {}},
               {"name": "cd", "arguments": {f"folder=open('{spoiled}', 'w'), x": 1}},
               {"name": "cd", "arguments": {"folder": f"') or open('{spoiled}', 'w') or ('"}},
               {"name": "_load_scenario", "arguments": {"scenario": {}}}]
    dialogue = Dialogue(package, entry, expected)
    dialogue.take(Reply(text_of(attacks), True, 1))
    results = [message["content"] for message in dialogue.history if message["role"] == "tool"]
    assert len(results) == len(attacks) and not spoiled.exists()
    assert results[0] == "Error during execution: name 'open' is not defined"
    assert judge_dialogue(dialogue) == "multi_turn:force_terminated"


@needs_package
def test_missing_tools_come_with_their_turn_and_results_go_into_the_history():
    package = bfcl_package()
    entry, expected = multi_turn_questions(package, "multi_turn_miss_func")[0]
    late, turns = int(next(iter(entry["missed_function"]))), planted(package, entry, expected)["right"]
    dialogue, seen = Dialogue(package, entry, expected), {}
    def answer(questions):
        seen.setdefault(dialogue.turn, len(questions[0].tools))
        texts, step = turns[dialogue.turn], len(dialogue.steps[-1])
        return [Reply(texts[step] if step < len(texts) else "Done.", True, 1)]
    assert converse([dialogue], answer) == [""]
    assert [seen[turn] - seen[0] for turn in (late - 1, late)] == [0, 1]
    roles = [message["role"] for message in dialogue.history]
    assert roles.count("tool") == sum(map(len, expected)) and roles[-1] == "assistant"


@needs_package
def test_a_killed_evaluation_goes_on_and_a_dead_reply_is_no_answer(tmp_path, monkeypatch):
    settings = load_settings("demo", workspace=str(tmp_path))
    settings.run_dir.mkdir(parents=True)
    class Server:
        url, name, asked, dies = "http://planted", "planted", 0, 3
        def replies(self, turns, limit, store=None):
            from proxy_sft.evaluation.generation import digest
            known, found = store.read() if store else {}, []
            for turn in turns:
                name = digest([turn.messages[:-1], turn.tools])
                if name not in known:
                    self.asked += 1
                    if self.asked == self.dies: raise KeyboardInterrupt
                    known[name] = Reply("I am done.", True, 3)
                    if store: store.add({name: known[name]})
                found.append(known[name])
            return found
    folder = tmp_path / "model"
    folder.mkdir()
    monkeypatch.setattr("proxy_sft.evaluation.predictions.model_folders", lambda *args: {"tuned": folder})
    server, ask = Server(), lambda: evaluate_multi_turn(settings, ["multi_turn_base"], 2, servers={"tuned": server})
    with pytest.raises(KeyboardInterrupt): ask()
    server.dies = 0
    board, whole = ask(), server.asked - 1
    assert board.counts("tuned", "multi_turn_base") == (0, 2)
    assert all(v.startswith("multi_turn:empty_turn") for v in board.verdicts["tuned"])
    kept = json.loads((settings.run_dir / "bfcl_multi_turn.json").read_text())
    assert kept["categories"] == {"multi_turn_base": {"tuned": [0, 2]}}
    assert not list((settings.run_dir / "answers-bfcl-multi-turn").glob("*"))
    server.asked = 0
    ask()
    assert server.asked == whole  # nothing was asked twice
    package = bfcl_package()
    dialogue = Dialogue(package, *multi_turn_questions(package, "multi_turn_base")[0])
    dead = Reply("", False, 0, problem="status 500")
    assert converse([dialogue], lambda questions: [dead]) == ["no answer: status 500"]


@needs_package
def test_questions_of_another_release_are_refused(tmp_path):
    package = bfcl_package()
    (tmp_path / "BFCL_v4_multi_turn_base.json").write_text("{}\n")
    with pytest.raises(EvaluateError, match="not the one of the installed bfcl-eval"):
        multi_turn_questions(package, "multi_turn_base", tmp_path)


def test_a_missing_package_is_one_sentence(monkeypatch):
    monkeypatch.setattr("proxy_sft.evaluation.bfcl_multi_turn.find_spec", lambda name: None)
    with pytest.raises(EvaluateError, match="pip install --no-deps bfcl-eval==2026.3.23$"): bfcl_package()
