"""Reading and scoring answers, the choice of turns, generation, and the whole evaluation with small models."""
import json
import multiprocessing
import os
import random
import shutil
import signal
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer, ThreadingHTTPServer

from proxy_sft.evaluation import generation
import numpy as np
import pytest
import torch
from peft import get_peft_model, LoraConfig
from ports import free_port
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3ForCausalLM


from proxy_sft.chat.masks import supervise
from proxy_sft.chat.parity_turns import Inspection, server_prompts
from proxy_sft.chat.saving import save_chat_files
from proxy_sft.chat.servers import api_messages
from proxy_sft.demo.model import write_demo_model
from proxy_sft.evaluation.answers import (
    Answer, as_it_was_meant, as_server_reads, choose_turns, EvaluateError, expected_text, HeldoutTurn, METRICS,
    read_answer, Reply, score_turn, turns_of
)
from proxy_sft.commands import main
from proxy_sft.evaluation.bfcl import tool_of
from proxy_sft.evaluation.answers import wilson
from proxy_sft.evaluate import evaluate
from proxy_sft.evaluation.predictions import evaluate_leaderboard, evaluation_dict, model_folders
from proxy_sft.evaluation.failures import browse_failures, show_turn
from proxy_sft.evaluation.rollouts import evaluate_rollouts
from proxy_sft.evaluation.scores import Evaluation, evaluation_html, judge, rate_figure, table_rows
from proxy_sft.evaluation.generation import (
    answer_limit, answer_in_time, generate_batch, generate_replies, load_model, questions_that_fit, token_batches
)
from proxy_sft.evaluation.servers import Server
from proxy_sft.core.settings import load_settings
from proxy_sft.core.stop_requests import StopRequested


def tool(name, **properties):
    return {
        "type": "function",
        "function": {
            "name": name,
            "parameters": {
                "type": "object",
                "properties": {key: {"type": kind} for key, kind in properties.items()},
                "required": list(properties),
            },
        },
    }

def call(name, **arguments): return {"name": name, "arguments": arguments}

def block(made): return f"<tool_call>\n{json.dumps(made, ensure_ascii=False)}\n</tool_call>"

TOOLS = [
    tool("weather.now", city="string"),
    tool("weather.later", city="string"),
    tool("notes.add", text="string", stars="integer"),
]
WEATHER, NOTE = call("weather.now", city="Zürich"), call("notes.add", text="a", stars=3)
ODD = call("notes.add", text="a", stars="three")  # data that contradicts its own schema


def wrong(expected, text, stopped=True):
    return {metric for metric, right in score_turn(expected, read_answer(text, stopped), TOOLS).items() if not right}


# every metric moves alone; `exact` goes with those that a user of the calls would feel
@pytest.mark.parametrize("expected, text, stopped, moved", [
    ([WEATHER], block(WEATHER), True, set()),
    ([WEATHER, NOTE], block(NOTE) + "\n" + block(WEATHER), True, set()),
    ([WEATHER], "I look.\n" + block(WEATHER) + "\nbye", True, set()),
    ([NOTE], '<tool_call>{"arguments": {"stars": 3, "text": "a"}, "name": "notes.add"}</tool_call>', True, set()),
    ([], "Hello.", True, set()),
    ([], block(WEATHER), True, {"decision"}),
    ([], "<tool_call>nonsense", True, {"decision"}),
    ([], "Hello. Hello.", False, {"stops"}),
    ([WEATHER], block(WEATHER), False, {"stops", "exact"}),
    ([WEATHER], block(WEATHER).removesuffix("</tool_call>"), True, {"parseable", "exact"}),
    ([WEATHER], '<tool_call>{"name": "weather.now", "parameters": {"city": "Zürich"}}</tool_call>', True,
     {"parseable", "exact"}),
    ([WEATHER], block(call("weather.later", city="Zürich")), True, {"names", "exact"}),
    ([WEATHER], block(call("weather.now", city="Bern")), True, {"arguments", "meaning", "exact"}),
    ([NOTE], block(call("notes.add", text="a", stars=4)), True, {"arguments", "meaning", "exact"}),
    ([WEATHER, call("weather.now", city="Bern")], block(WEATHER), True, {"complete", "exact"}),
    ([WEATHER], block(WEATHER) + block(WEATHER), True, {"complete", "exact"}),
    ([ODD], block(ODD), True, {"schema"}),
    ([WEATHER, ODD], block(WEATHER) + block(ODD), True, {"schema"}),
    ([WEATHER], block(WEATHER) + block(NOTE), True, {"names", "complete", "exact"}),
    ([NOTE], block(ODD), True, {"arguments", "meaning", "schema", "exact"}),
    ([WEATHER, NOTE], block(WEATHER), True, {"names", "complete", "exact"}),
    ([WEATHER], block(call("rockets.start", city="Zürich")), True, {"names", "schema", "exact"}),
    ([WEATHER], "It rains.", True, set(METRICS) - {"stops"}),
    ([WEATHER], "<tool_call>\n{\"name\": \"weather", True, set(METRICS) - {"stops", "decision"}),
    ([WEATHER], "", False, set(METRICS)),
])
def test_what_moves(expected, text, stopped, moved): assert wrong(expected, text, stopped) == moved


def test_every_metric_moved_alone():
    alone = {
        "decision": ([], block(WEATHER), True),
        "stops": ([], "Hello.", False),
        "schema": ([ODD], block(ODD), True),
    }
    for metric, case in alone.items(): assert wrong(*case) == {metric}
    for metric, text in {"parseable": block(WEATHER)[:-12], "names": block(call("weather.later", city="Zürich")),
                         "complete": block(WEATHER) * 2}.items():
        assert wrong([WEATHER], text) == {metric, "exact"}
    # other spelling, same meaning
    assert wrong([NOTE], block(call("notes.add", text="a", stars=3.0))) == {"arguments", "exact"}
    assert wrong([NOTE], block(call("notes.add", text="b", stars=3))) == {"arguments", "meaning", "exact"}


@pytest.mark.parametrize("expected, made, same", [
    (1, 1, True), (1, 1.0, False), (1, True, False), (0, False, False), ("1", 1, False), (None, "null", False),
    (1e22, 10**22, False),
    (10**30, 10**30, True), ({"a": 1, "b": [1, 2]}, {"b": [1, 2], "a": 1}, True), ([1, 2], [2, 1], False),
    ("é", "e\u0301", False)])
def test_arguments_are_compared_as_json(expected, made, same):
    verdict = score_turn([call("f", x=expected)], read_answer(block(call("f", x=made))), [])
    assert verdict["arguments"] == verdict["exact"] == same


def test_swapped_arguments_of_two_tools_are_wrong():
    swapped = [call("weather.later", city="Bern"), call("weather.now", city="Genf")]
    expected = [call("weather.now", city="Bern"), call("weather.later", city="Genf")]
    assert wrong(expected, "".join(map(block, swapped))) == {"arguments", "meaning", "exact"}
    twice = [call("weather.now", city="Bern"), call("weather.now", city="Genf")]
    assert wrong(twice, block(twice[1]) + block(twice[0])) == set()
    assert wrong(twice, block(twice[1]) * 2) == {"arguments", "meaning", "exact"}


def test_readings():
    tag = call("notes.add", text="a </tool_call> b", stars=1)
    assert as_server_reads(block(tag)) is None and as_it_was_meant(block(tag)) == [tag]
    opening = call("notes.add", text="a <tool_call> b", stars=1)
    assert as_it_was_meant(block(opening)) == [opening] == as_server_reads(block(opening))
    assert as_server_reads("no call") == [] and read_answer("no call") == Answer(text="no call")
    assert read_answer("<think>\nI could <tool_call></think>\n\nNo.") == Answer(text="No.")
    assert as_it_was_meant('<tool_call>\n```json\n' + json.dumps(WEATHER) + '\n```\n</tool_call>') == [WEATHER]
    assert as_it_was_meant("<tool_call>" + json.dumps([WEATHER, NOTE]) + "</tool_call>") == [WEATHER, NOTE]
    assert as_it_was_meant('<tool_call>{"type": "function", "function": ' + json.dumps(WEATHER) + "}") == [WEATHER]
    assert as_it_was_meant("<tool_call></tool_call>" + block(NOTE)) == [NOTE]
    assert read_answer(block(WEATHER)).parseable and not read_answer("<tool_call></tool_call>").parseable
    assert not read_answer(block(WEATHER) + "<tool_call>").parseable
    assert not read_answer('<tool_call>{"name": "f", "arguments": "{}"}</tool_call>').parseable


def test_reading_survives_anything():
    rng, parts = (
        random.Random(0),
        [
            "<tool_call>",
            "</tool_call>",
            '{"name": "f"',
            ', "arguments": {',
            "}",
            "}",
            "[",
            "\ud800",
            "<think>",
            "\x00",
            "1e999",
            '"',
            "\\",
            "\n",
            "null",
            "NaN",
            "</think>",
            "{" * 9,
            '"parameters": "{}"',
        ],
    )
    for _ in range(4000):
        text = "".join(rng.choices(parts, k=rng.randrange(12)))
        verdict = score_turn([WEATHER], read_answer(text), TOOLS)
        assert set(verdict) == set(METRICS)
    for text in (
        "<tool_call>" + "[" * 200000,
        "<tool_call>" * 20000,
        '<tool_call>{"a":' * 5000,
        "<tool_call>" + "9" * 10000,
    ):
        assert not score_turn([WEATHER], read_answer(text), TOOLS)["parseable"]


def row(i, calls=(WEATHER,), tools=TOOLS):
    asked = {"tool_calls": [{"type": "function", "function": made} for made in calls]} if calls else {}
    return {
        "messages": [
            {"role": "user", "content": f"Question {i}"},
            {"role": "assistant", "content": "", **asked},
            *[{"role": "tool", "content": "1"} for _ in calls],
            {"role": "assistant", "content": f"Answer {i}."},
        ],
        "tools": tools,
    }

def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({k + "_json": json.dumps(v) for k, v in r.items()}) + "\n" for r in rows))
    return path


def test_choice_of_turns(tmp_path):
    path = write(tmp_path / "heldout.jsonl", [row(i, tools=TOOLS if i % 2 else []) for i in range(40)])
    turns, found = choose_turns(path, 12)
    assert found == 40 and len(turns) == 12 and all(t.row % 2 for t in turns) and turns == choose_turns(path, 12)[0]
    named = {(t.messages[0]["content"], t.message) for t in turns}
    write(path, [row(99, tools=[]), *[row(i, tools=TOOLS if i % 2 else []) for i in reversed(range(40))]])
    assert {(t.messages[0]["content"], t.message) for t in choose_turns(path, 12)[0]} == named
    more = choose_turns(path, 20)[0]
    assert named < {(t.messages[0]["content"], t.message) for t in more} and len(choose_turns(path, 999)[0]) == 40
    assert {(t.messages[0]["content"], t.message) for t in choose_turns(path, 12, seed=1)[0]} != named
    assert turns[0].messages[-1]["role"] == "assistant"


@pytest.mark.parametrize("text, says", [
    ("", "no assistant turn"), ("{\n", "Line 1"), ('{"messages_json": "[]"}\n{"x": 1}\n', "Line 2"), ("[]\n", "Line 1"),
    ('{"messages_json": "[", "tools_json": "[]"}', "Line 1")])
def test_broken_held_out_files(tmp_path, text, says):
    (tmp_path / "heldout.jsonl").write_text(text)
    with pytest.raises(EvaluateError, match=says): choose_turns(tmp_path / "heldout.jsonl")
    with pytest.raises(EvaluateError, match="01_convert"): choose_turns(tmp_path / "none.jsonl")
    with pytest.raises(EvaluateError, match="max_turns"): choose_turns(tmp_path / "heldout.jsonl", 0)


def test_slices_and_rates():
    one, several = turns_of(**row(0)), turns_of(**row(1, [WEATHER, NOTE]))
    said = ("language: unknown",)
    assert [t.slices for t in one + several] == [
        ("single", *said),
        ("no call", "after a result", *said),
        ("parallel", *said),
        ("no call", "after a result", *said),
    ]
    turns = one + several
    good = [Reply(expected_text(t.messages[-1]), True, 1) for t in turns]
    found = judge(turns, {"base": [good[1]] * 4, "tuned": good[:2] + [good[0], good[3]]}, found=4)
    assert found.rate("tuned", "exact") == (1, 2) and found.rate("tuned", "exact", "parallel") == (0, 1)
    assert found.rate("base", "decision", "no call") == (2, 2) and found.rate("tuned", "names", "no call") == (0, 0)
    assert found.changed("exact") == (1, 0) and found.changed("decision") == (2, 0) and found.failures("tuned") == [2]
    assert found.failures("tuned", group="single") == [] and found.failures("tuned", group="parallel") == [2]
    assert "tuned" in repr(found) and "wrong: names, complete, exact" in show_turn(found, 2)
    assert all(len(r) == 5 for r in table_rows(found)) and len(rate_figure(found).axes[0].patches) == 2 * len(METRICS)
    pages = browse_failures(found, "base", static=False)
    first = pages.children[1].value
    pages.children[0].value = 1  # the slider moves
    assert pages.children[1].value != first and "wrong: " in first


def test_steps_languages_sources_and_unseen_tools():
    asked = row(0)["messages"][:3]
    messages = [
        {"role": "user", "content": "Wie ist das Wetter?"},
        *asked[1:],
        *asked[1:],
        {"role": "user", "content": "Danke, und du?"},
        {"role": "assistant", "content": "Gut."},
    ]
    turns = turns_of(messages, TOOLS, source="weather", unseen=frozenset({"weather.now"}))
    also = ("language: German", "source: weather")
    assert [t.slices for t in turns] == [
        ("single", "several steps", "unseen tools", *also),
        ("single", "after a result", "several steps", "unseen tools", *also),
        ("no call", "no tool fits", *also),
    ]


def test_html_escapes_models():
    turns = turns_of(**row(0))
    found = Evaluation(
        turns, {"<b>": [Reply("", True, 1)] * 2}, {"<b>": [{"decision": True}] * 2}, about={"x": "<script>"}
    )
    assert (
        "<b>" not in evaluation_html(found)
        and "&lt;b&gt;" in evaluation_html(found)
        and "<script" not in evaluation_html(found)
    )


@pytest.mark.parametrize("right, of, low, high", [
    (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (15, 50, 0.1910, 0.4375)])
def test_wilson(right, of, low, high): assert wilson(right, of) == pytest.approx((low, high), abs=1e-4)


def test_batches_cover_all_prompts():
    rng = random.Random(1)
    for _ in range(200):
        lengths = [rng.randrange(1, 400) for _ in range(rng.randrange(1, 50))]
        size, tokens = rng.randrange(1, 9), rng.randrange(1, 900)
        batches = token_batches(lengths, size, tokens)
        assert sorted(i for b in batches for i in b) == list(range(len(lengths)))
        assert all(len(b) <= size and (len(b) == 1 or len(b) * max(lengths[i] for i in b) <= tokens) for b in batches)


# as the leaderboard declares it
BERKELEY = {**TOOLS[0]["function"], "parameters": {**TOOLS[0]["function"]["parameters"], "type": "dict"}}
ASKED = [row(i, tools=[tool_of(BERKELEY)]) for i in range(4)]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A workspace with a demo model, held-out rows, and a model that was trained on these very rows: what is tested is
    the asking."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    settings = load_settings("demo", workspace=str(tmp_path_factory.mktemp("workspace")))
    write_demo_model(settings.model_dir, n=200)
    write(settings.converted_dir / "heldout.jsonl", ASKED)
    tokenizer = AutoTokenizer.from_pretrained(settings.model_dir)
    train(Qwen3ForCausalLM.from_pretrained(settings.model_dir), tokenizer).save_pretrained(settings.run_dir)
    save_chat_files(settings.run_dir, tokenizer, settings.template)
    yield settings, tokenizer
    torch.set_num_threads(threads)


def train(model, tokenizer, steps=30, rate=4e-3):
    "Learn the asked rows by heart."
    torch.manual_seed(0)
    optimizer, rows = (
        torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=rate),
        [supervise(**row, tokenizer=tokenizer) for row in ASKED],
    )
    width = max(len(row["input_ids"]) for row in rows)
    ids = torch.tensor([row["input_ids"] + [0] * (width - len(row["input_ids"])) for row in rows])
    labels = torch.tensor([row["labels"] + [-100] * (width - len(row["labels"])) for row in rows])
    for _ in range(steps):
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def test_base_beside_tuned(world):
    settings, _ = world
    found = evaluate(settings, max_turns=7)
    assert set(found.replies) == {"base", "tuned"} and len(found.turns) == 7 and found.found == 8
    calling = sum(bool(t.expected) for t in found.turns)
    assert found.rate("base", "names") == (0, calling) and found.rate("base", "stops")[0] == 0
    assert found.rate("tuned", "exact") == (calling, calling) and found.rate("tuned", "stops") == (7, 7)
    saved = json.loads((settings.run_dir / "evaluation.json").read_text())
    assert saved["metrics"]["tuned"]["exact"]["right"] == calling
    assert saved["measured"] == 7 and len(saved["turns"]) == 7
    again = judge(
        found.turns,
        found.replies,
        found=found.found,
        about=found.about,
        losses=found.losses,
        chat_losses=found.chat_losses,
    )
    assert again == found == evaluate(settings, max_turns=7, batch_size=3)  # batches change nothing
    assert not list(settings.run_dir.glob("*.part"))


@pytest.fixture(scope="module")
def adapter(world, tmp_path_factory):
    "An adapter that knows the asked rows by heart, alone, and the same merged into a whole model."
    settings, tokenizer = world
    alone, whole = (tmp_path_factory.mktemp("adapter") / name for name in ("alone", "whole"))
    torch.manual_seed(0)
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(Qwen3ForCausalLM.from_pretrained(settings.model_dir), config)
    train(model, tokenizer, steps=40, rate=1e-2).save_pretrained(alone)
    model.merge_and_unload().save_pretrained(whole)
    for folder in (alone, whole): save_chat_files(folder, tokenizer, settings.template)
    return alone, whole


def test_base_and_an_adapter_from_one_load_answer_as_two_loads_do(world, adapter, tmp_path, monkeypatch):
    settings, (alone, whole) = world[0], adapter
    loads, usual = [], AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained",
                        lambda folder, **more: (loads.append(folder), usual(folder, **more))[1])
    found = []
    for tuned in (alone, whole):
        other = settings.model_copy(update={"output_dir": str(tmp_path / tuned.name)})
        found.append((evaluate(other, tuned=tuned, max_turns=4), len(loads)))
    (one, loaded_once), (two, loaded) = found
    assert loaded_once == 1 and loaded == 3
    assert one.replies == two.replies and one.verdicts == two.verdicts
    for name in ("base", "tuned"):
        assert np.allclose([loss for loss, _ in one.losses[name]], [loss for loss, _ in two.losses[name]], rtol=1e-3)
    assert one.replies["base"] != one.replies["tuned"]
    assert all(verdict["exact"] for verdict in one.verdicts["tuned"] if "exact" in verdict)  # known by heart
    base = evaluate(settings.model_copy(update={"output_dir": str(tmp_path / "base")}), base_only=True, max_turns=4)
    assert base.replies["base"] == one.replies["base"]


def test_killed_and_started_again_an_adapter_is_not_asked_what_was_kept(world, adapter, tmp_path, monkeypatch):
    settings = world[0].model_copy(update={"output_dir": str(tmp_path / "run")})
    usual, asked = generation.generate_batch, []
    def until_the_second(*args, **more):
        asked.append(len(args[2]))
        if len(asked) == 2: raise KeyboardInterrupt
        return usual(*args, **more)
    monkeypatch.setattr(generation, "generate_batch", until_the_second)
    with pytest.raises(KeyboardInterrupt): evaluate(settings, tuned=adapter[0], max_turns=4, batch_size=3)
    found = evaluate(settings, tuned=adapter[0], max_turns=4, batch_size=3)
    assert asked[0] + sum(asked[2:]) == 8 and len(found.replies["tuned"]) == len(found.replies["base"]) == 4


def test_an_adapter_that_does_not_fit_is_refused_in_a_sentence(world, adapter, tmp_path):
    settings, (alone, _) = world[0], adapter
    with pytest.raises(EvaluateError, match="holds an adapter alone.*Name the run's folder"):
        model_folders(settings, tuned=alone)
    for name, change, says in (("kind", {"peft_type": "IA3"}, "expected 'LORA'"), ("size", {"r": 4}, "size mismatch")):
        folder = shutil.copytree(alone, tmp_path / name)
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps({**config, **change}))
        other = settings.model_copy(update={"output_dir": str(tmp_path / f"{name}-run")})
        with pytest.raises(EvaluateError, match=f"The adapter in {name} cannot be loaded.*{says}"):
            evaluate(other, tuned=folder, max_turns=2)


def test_a_stop_keeps_the_answers_and_the_next_start_goes_on(world, monkeypatch):
    settings, _ = world
    whole, batches = evaluate(settings, max_turns=6, batch_size=2), []
    usual = generation.generate_batch
    def then_a_signal(*args, **kwargs):
        batches.append(len(args[2]))
        if len(batches) == 2: os.kill(os.getpid(), signal.SIGTERM)
        return usual(*args, **kwargs)
    monkeypatch.setattr(generation, "generate_batch", then_a_signal)
    with pytest.raises(StopRequested, match="SIGTERM was received"): evaluate(settings, max_turns=6, batch_size=2)
    assert sum(batches) == 4
    assert (
        evaluate(settings, max_turns=6, batch_size=2) == whole
        and sum(batches) == 12
        and not (settings.run_dir / "answers").exists()
    )
    (settings.run_dir / "STOP").touch()
    try:
        with pytest.raises(StopRequested, match="STOP lies in"): evaluate(settings, max_turns=6, batch_size=2)
    finally: (settings.run_dir / "STOP").unlink()


FORK = multiprocessing.get_context("fork")  # a process that has loaded everything already


def on_a_rank(rank, ranks, port, does):
    "What torchrun does for one rank."
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    does()


def on_two_ranks(does):
    "Do it on two ranks; both must end well."
    ranks = [FORK.Process(target=on_a_rank, args=(rank, 2, port, does)) for port in [free_port()] for rank in range(2)]
    for process in ranks: process.start()
    until = time.monotonic() + 900
    while any(p.is_alive() for p in ranks) and not any(p.exitcode for p in ranks) and time.monotonic() < until:
        time.sleep(0.02)
    for process in ranks: process.kill()  # one that waits for the other for ever; nothing where it has ended
    for process in ranks: process.join()
    assert [process.exitcode for process in ranks] == [0, 0]


def kill_when_some_are_kept(does, folder):
    "Start it, and kill -9 when two answers are on disk and the third is asked for; the lines that were there."
    def kept(): return [line for path in folder.glob("*.jsonl") for line in path.read_bytes().splitlines() if line]
    usual = generation.generate_batch
    def waits_for_its_end(*args, **kwargs):
        while len(kept()) >= 2: time.sleep(0.1)
        return usual(*args, **kwargs)
    def until_two_are_kept():
        generation.generate_batch = waits_for_its_end
        does()
    process = FORK.Process(target=until_two_are_kept)
    process.start()
    while process.is_alive() and len(kept()) < 2: time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    return kept()


def test_killed_and_on_two_ranks_the_same_bytes(world):
    settings, _ = world
    written = settings.run_dir / "evaluation.json"
    def ask(): evaluate(settings, max_turns=6, batch_size=1)
    ask()
    straight = written.read_bytes()
    written.unlink()
    lines = kill_when_some_are_kept(ask, settings.run_dir / "answers")
    assert 2 <= len(lines) < 12 and not written.exists()
    ask()
    assert written.read_bytes() == straight and not (settings.run_dir / "answers").exists()
    on_two_ranks(ask)
    assert written.read_bytes() == straight


def test_kept_answers_are_not_asked_again(world):
    settings, _ = world
    def ask(): return evaluate(settings, max_turns=6, batch_size=1)
    first = json.loads(kill_when_some_are_kept(ask, settings.run_dir / "answers")[0])
    for path in (settings.run_dir / "answers").glob("*.jsonl"):
        path.write_text(json.dumps({**first, "text": "kept", "tokens": 1}) + "\n")
    assert [reply.text for replies in ask().replies.values() for reply in replies].count("kept") == 1


@pytest.fixture
def berkeley(tmp_path):
    """Files of the leaderboard: what the model learnt by heart, something that it did not, and a prompt that is too
    long."""
    (tmp_path / "possible_answer").mkdir()
    def entries(name):
        return [
            {
                "id": f"{name}_{i}",
                "question": [[{"role": "user", "content": f"Question {i}" + " again" * (4000 if i == 4 else 0)}]],
                "function": [BERKELEY],
            }
            for i in range(5)
        ]
    for name in ("simple_python", "irrelevance"):
        (tmp_path / f"BFCL_v4_{name}.json").write_text("\n".join(map(json.dumps, entries(name))))
    answers = [
        {
            "id": f"simple_python_{i}",
            "ground_truth": [{"weather.now": {"city": ["zurich", "zürich"] if i < 3 else ["Bern"]}}],
        }
        for i in range(5)
    ]
    (tmp_path / "possible_answer" / "BFCL_v4_simple_python.json").write_text("\n".join(map(json.dumps, answers)))
    return tmp_path


def test_leaderboard(world, berkeley):
    settings, _ = world
    written = settings.run_dir / "bfcl.json"
    def ask():
        return evaluate_leaderboard(settings, berkeley, "simple_python,irrelevance", max_new_tokens=64, batch_size=1)
    board = ask()
    assert board.counts("tuned")["simple_python"] == (3, 5) and board.counts("base") == {
        "simple_python": (0, 5),
        "irrelevance": (4, 5),
    }
    assert board.problems["tuned"] == {"prompt too long": 2} and board.verdicts["tuned"][3].startswith(
        "city: 'Zürich' is none of"
    )
    straight = written.read_bytes()
    written.unlink()
    kill_when_some_are_kept(ask, settings.run_dir / "answers-bfcl")
    on_two_ranks(ask)
    assert written.read_bytes() == straight and not (settings.run_dir / "answers-bfcl").exists()
    assert (
        evaluate_leaderboard(settings, berkeley, "irrelevance", most=2, base_only=True, max_new_tokens=4).counts(
            "base"
        )["irrelevance"][1]
        == 2
    )
    with pytest.raises(EvaluateError, match="BFCL_v4_simple_java"): evaluate_leaderboard(settings, berkeley)


def test_the_command_asks_what_its_options_say(world, berkeley, tmp_path, capsys):
    settings = world[0].model_copy(update={"output_dir": str(tmp_path / "run")})
    given = [word for name in ("workspace", "output_dir") for word in ("-p", name, str(getattr(settings, name)))]
    def said(*words): # what is said on the way is not among the JSON
        capsys.readouterr()
        options = ["--tuned", str(world[0].run_dir), "--max-new-tokens", "64", "--json", *words]
        assert main(["evaluate", "-p", "profile", "demo", *given, *options]) == 0
        return json.loads(capsys.readouterr().out)
    turns = said("--max-turns", "7", "--batch-size", "2")
    found = evaluate(settings, tuned=world[0].run_dir, max_turns=7, max_new_tokens=64)
    assert turns == json.loads(json.dumps(evaluation_dict(found))) and turns["measured"] == 7
    assert {name: len(one) for name, one in said("--rollouts", "2").items()} == {"base": 2, "tuned": 2}
    board = said("--bfcl", str(berkeley), "--bfcl-categories", "simple_python", "--bfcl-most", "2", "--base-only")
    assert list(board["categories"]) == ["simple_python"] and not (tmp_path / "run" / "bfcl.json").exists()


def test_asking_in_training_is_bounded(world):
    settings, tokenizer = world
    model, _ = load_model(settings.run_dir, "cpu")
    turns, prompts = questions_that_fit([t for i in range(4) for t in turns_of(**ASKED[i])], tokenizer, settings)
    counts = answer_in_time(model.train(), tokenizer, turns, prompts, limit=64, seconds=3600)
    assert (
        counts["answered"] == [8, 8] and counts["exact"] == [4, 4] and counts["decision"] == [8, 8] and model.training
    )
    assert answer_in_time(model, tokenizer, turns, prompts, limit=64, seconds=0.0)["answered"] == [0, 8]


def test_base_alone_writes_nothing(world, tmp_path):
    settings, _ = world
    other = load_settings("demo", workspace=settings.workspace, output_dir=str(tmp_path / "run"))
    found = evaluate(other, base_only=True, max_turns=4)
    assert list(found.replies) == ["base"] and not (tmp_path / "run").exists() and "tuned" not in repr(found)
    with pytest.raises(EvaluateError, match="02_train"): evaluate(other, max_turns=4)
    assert list(model_folders(other, tuned=settings.run_dir)) == ["base", "tuned"]


def test_greedy_replies_are_the_models_own(world):
    "Padding and batches against the plain way: one prompt, one token at a time, no cache."
    settings, tokenizer = world
    model, _ = load_model(settings.run_dir, "cpu")
    turns = [t for i in (0, 1) for t in turns_of(**row(i, [WEATHER] * (i + 1), TOOLS[:1]))]
    prompts = [p[-1].tolist() for p in server_prompts(Inspection(tokenizer), [(t.messages, t.tools) for t in turns])]
    stop = [tokenizer.convert_tokens_to_ids("<|im_end|>")]
    replies = generate_replies(model, tokenizer, prompts, stop, limit=12)
    # answers that have ended leave the batch: the others are none the wiser
    assert generate_batch(model, tokenizer, prompts, stop, limit=12, stretch=1) == replies
    for prompt, reply in zip(prompts, replies):
        ids = list(prompt)
        while len(ids) < len(prompt) + 12 and ids[-1] not in stop:
            with torch.inference_mode(): ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        new = ids[len(prompt):]
        assert reply == Reply(tokenizer.decode([i for i in new if i not in stop]), new[-1] in stop, len(new))
    assert {reply.stopped for reply in replies} == {True, False}


def test_prompt_is_the_servers(world):
    settings, tokenizer = world
    turn = turns_of(**row(3))[1]
    ours = server_prompts(Inspection(tokenizer), [(turn.messages, turn.tools)])[0][-1].tolist()
    served = AutoTokenizer.from_pretrained(settings.run_dir).apply_chat_template(
        turn.messages[:-1], tools=turn.tools, add_generation_prompt=True, tokenize=True, return_dict=True)["input_ids"]
    assert ours == served


def test_limit_follows_the_data(world):
    _, tokenizer = world
    turns = turns_of(**row(0, [WEATHER] * 3))
    longest = len(tokenizer(expected_text(turns[0].messages[-1]))["input_ids"])
    assert longest < answer_limit(turns, tokenizer, 1024) < 2 * longest and answer_limit(turns, tokenizer, 7) == 7


def test_what_is_missing_is_named(world, tmp_path):
    settings, tokenizer = world
    empty = load_settings("demo", workspace=str(tmp_path))
    with pytest.raises(EvaluateError, match="01_convert"): evaluate(empty)
    write(empty.converted_dir / "heldout.jsonl", [row(0)])
    with pytest.raises(EvaluateError, match="00_download"): evaluate(empty)
    stock = load_settings("demo", workspace=settings.workspace, template="stock")
    with pytest.raises(EvaluateError, match="another chat template"): evaluate(stock)
    short = load_settings("demo", workspace=settings.workspace, max_length=16)
    with pytest.raises(EvaluateError, match="max_length"): evaluate(short)
    broken = shutil.copytree(settings.run_dir, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(EvaluateError, match="cannot be loaded"): evaluate(settings, tuned=broken, max_turns=1)


def test_long_prompts_are_left_out_and_counted(world):
    settings, tokenizer = world
    long = row(7)
    long["messages"][0]["content"] = "word " * 900
    root = settings.workspace_dir
    other = load_settings("demo", workspace=str(root), dataset="long")
    write(other.converted_dir / "heldout.jsonl", [row(0), long])
    found = evaluate(other, base_only=True, max_new_tokens=4)
    assert (len(found.turns), found.too_long, found.found) == (2, 2, 4)
    assert "2 more were longer than max_length" in repr(found)


def test_turns_without_a_question_before():
    turn = HeldoutTurn(0, 0, [{"role": "assistant", "content": "Hi"}], TOOLS)
    assert turn.slices == ("no call", "no tool fits", "language: unknown") and "nobody" in show_turn(
        judge([turn], {"base": [Reply("Hi", True, 1)]}), 0
    )


# ---- an address at which something else answers

PAGES = {
    "a page": b"<html><body>Sign in</body></html>", "null": b"null", "a list": b"[]", "a text": b'"models"',
    "nothing": b"", "models that are none": b'{"data": [1, {}]}',
    "no data": b'{"object": "list"}', "bytes": b"\xff\x00"}


@pytest.fixture
def strange_server():
    "Answers everything with one text and a good status."
    class Strange(BaseHTTPRequestHandler):
        page = b""
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Type", "text/html" if self.page.startswith(b"<") else "application/json")
            self.send_header("Content-Length", str(len(self.page)))
            self.end_headers()
            self.wfile.write(self.page)
        do_POST = do_GET
        def log_message(self, *words): pass
    server = ThreadingHTTPServer(("127.0.0.1", 0), Strange)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/v1", Strange
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("page", PAGES)
def test_a_strange_server_is_named_before_the_base_model_works(world, berkeley, strange_server, tmp_path, page):
    (url, answers), (settings, _) = strange_server, world
    answers.page = PAGES[page]
    # whoever asked the base model first would hear that it cannot be loaded
    mine = load_settings("demo", workspace=str(shutil.copytree(settings.workspace_dir, tmp_path / "copy")))
    (mine.model_dir / "model.safetensors").write_bytes(b"nothing")
    for ask in (lambda servers: evaluate(mine, servers=servers),
                lambda servers: evaluate_rollouts(mine, servers=servers),
                lambda servers: evaluate_leaderboard(mine, berkeley, "simple_python", servers=servers)):
        for model in ("", "mine"):
            with pytest.raises(EvaluateError, match=rf"{url} (does not list its models|has \d+ models)"):
                ask({"tuned": Server(url, model=model, attempts=1)})


@pytest.mark.parametrize("says", ("/tokenize", "/v1/chat/completions", "garbage", ""))
def test_prompts_at_a_server_are_compared_where_it_says_them(says):
    """One server answers /tokenize, one return_token_ids, one with what is no list of ids, one with 404; the template
    behind the first two is the saved one, or another."""
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            sent = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append(sent)
            known = self.path == says and (says == "/tokenize" or sent["return_token_ids"] and sent["max_tokens"] == 1)
            body = {"tokens": ids} if says == "/tokenize" else {"prompt_token_ids": ids, "choices": []}
            if says == "garbage": known, body = True, {"tokens": ["a"], "prompt_token_ids": None}
            self.send_response(200 if known else 404)
            self.end_headers()
            self.wfile.write(json.dumps(body).encode() if known else b"{}")
        def log_message(self, *args): pass
    asked, ids, turns = [], [5, 6, 7, 8], turns_of(**ASKED[1])
    with HTTPServer(("127.0.0.1", 0), Handler) as site:
        threading.Thread(target=site.serve_forever, daemon=True).start()
        server = Server(f"http://127.0.0.1:{site.server_port}/v1", model="m", timeout=60)
        same = server.compare_prompts(turns[:1], [[5, 6, 7, 8]])
        other, longer = (server.compare_prompts(turns[:1], [prompt]) for prompt in ([5, 6, 9, 8], [5, 6, 7, 8, 9]))
        site.shutdown()
    if not says.startswith("/"): assert same == other == longer == ""; return
    assert "1 prompts" in same and "token for token" in same
    assert "differs from the trained one at token 2 of 4" in other
    assert "differs from the trained one at token 4" in longer
    assert asked[0]["tools"] == turns[0].tools and asked[0]["messages"] == api_messages(turns[0].messages[:-1])
