"""A real server on loopback (`transformers serve`) with a small model that was trained by heart: tools in, `tool_calls`
out; the token ids that its model gets are those of the parity check; and the smoke test as a user runs it."""
import copy
import json
import os
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from pathlib import Path

import httpx
import numpy as np
import pytest
from ports import free_port

from proxy_sft.chat.encoder import row_parts
from proxy_sft.chat.masks import IGNORED, supervise
from proxy_sft.chat.parity_turns import Inspection, server_prompts, server_turns, turn_parity
from proxy_sft.chat.servers import api_messages, RefusedRequest, SERVERS
from proxy_sft.chat.templates import apply_template, ROW_ERRORS
from proxy_sft.evaluation.answers import read_reply, turns_of
from proxy_sft.evaluate import evaluate
from proxy_sft.evaluation.servers import Server
from proxy_sft.evaluation.serving import serving_notes
from server_requests import requests
from test_evaluate import ASKED, WEATHER, row, world  # noqa: F401 (a fixture)
from test_servers import converted

SOAK = os.environ.get("PROXY_SFT_SOAK") == "1"
HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="module")
def served(world):
    settings, _ = world
    port, log = free_port(), settings.workspace_dir / "serve.log"
    with open(log, "wb") as out:
        process = subprocess.Popen(
            [
                sys.executable,
                HERE / "logged_serve.py",
                settings.workspace_dir / "prompts.jsonl",
                "serve",
                ".",
                "--port",
                str(port),
                "--host",
                "127.0.0.1",
                "--device",
                "cpu",
            ],
            cwd=settings.run_dir,
            stdout=out,
            stderr=out,
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        )
    try:
        until = time.monotonic() + 900
        while True:
            assert process.poll() is None and time.monotonic() < until, log.read_text()
            try: urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=60).close(); break
            except OSError: time.sleep(0.2)
        yield settings, f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait()


def test_tools_in_tool_calls_out(served):
    settings, url = served
    server = Server(url, model=".", concurrency=2, timeout=600)
    turns = turns_of(**ASKED[1])
    called, said = server.replies(turns, 60)
    assert (
        called.calls is not None
        and read_reply(called).calls == [WEATHER]
        and read_reply(called).parseable
        and called.stopped
    )
    assert said.text.startswith("Answer ") and not said.calls and not said.problem


def test_evaluation_by_a_server_is_that_of_the_process(served):
    settings, url = served
    here = evaluate(settings, max_turns=6)
    there = evaluate(settings, max_turns=6, servers={"tuned": Server(url, model=".", concurrency=2, timeout=600)})
    assert there.verdicts == here.verdicts and not there.problems and there.about["models"]["tuned"] == url
    assert not (settings.run_dir / "answers").exists() and not there.losses


def test_smoke_test_as_a_user_runs_it(served, tmp_path):
    settings, url = served
    _, script = serving_notes(settings, tmp_path)
    asked, known = row(2)["messages"], json.dumps(ASKED[2]["tools"])
    code = (f"import sys; sys.path.insert(0, {str(script.parent)!r}); import json, smoke_test\n"
            f"sys.exit(smoke_test.main({url!r}, '.', {asked[0]['content']!r}, json.loads({known!r}), '1'))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (
        done.returncode == 0
        and 'call:   weather.now {"city": "Zürich"}' in done.stdout
        and "answer: Answer " in done.stdout
    ), done
    wrong = subprocess.run([sys.executable, script, url, "another-name"], capture_output=True, text=True)
    assert wrong.returncode != 0


def built(url, log, messages, tools):
    "The ids that the server's model gets for a request; None where the server refuses it."
    before = log.stat().st_size if log.exists() else 0
    sent = {"model": ".", "messages": messages, "max_tokens": 1, "temperature": 0}
    if tools is not None: sent["tools"] = tools
    response = httpx.post(f"{url}/chat/completions", json=sent, timeout=600)
    lines = log.read_bytes()[before:].splitlines() if log.exists() else []
    if not lines:
        assert response.status_code >= 400, response.text
        return None
    ids, = json.loads(lines[0])
    assert len(lines) == 1  # an answer that ends within a call is an error of the server's parser, after the generation
    assert response.status_code == 500 or response.json()["usage"]["prompt_tokens"] == len(ids)
    return ids


def test_the_server_s_prompts_are_those_that_the_check_compares(served, world):
    "Every turn of the demo's and of Dolci's rows, sent as a client sends it: the ids inside the server's process."
    settings, url = served
    log, inspection, seen = settings.workspace_dir / "prompts.jsonl", Inspection(world[1]), Counter()
    for number, data in enumerate([*ASKED[:1], *converted()]):
        messages, tools = row_parts(data)
        if not SOAK and number % 9 or inspection.server.pattern.search(json.dumps([messages, tools])): continue
        out = supervise(messages, tools, world[1])
        ids, trained = np.array(out["input_ids"], np.int32), np.array(out["labels"]) != IGNORED
        turns = turn_parity(inspection, messages, ids, trained, server_prompts(inspection, [(messages, tools)])[0])
        there = server_turns(inspection, "transformers", messages, tools, turns)
        outcomes = {turn.message: turn.outcome for turn in there}
        for turn in turns:
            if not turn.supervised: continue
            theirs = built(url, log, api_messages(messages[:turn.message]), tools or None)
            assert outcomes[turn.message] in ("same", "changed") and turn.exact
            assert (theirs == ids[:len(theirs)].tolist() and len(theirs) == turn.body[0]) == (
                outcomes[turn.message] == "same"), (messages, tools, turn)
            seen[outcomes[turn.message]] += 1
    assert seen["same"] > (500 if SOAK else 40) and seen["changed"] < seen["same"], seen


def test_the_model_of_the_server_is_the_server(served, world):
    "Requests in every spelling: what the server's process builds is what our model of it hands to the saved template."
    settings, url = served
    source, seen = (settings.run_dir / "chat_template.jinja").read_text(encoding="utf-8"), Counter()
    for request in requests(2000 if SOAK else 60, 11):
        messages, tools = request["messages"], request["tools"]
        theirs = built(url, settings.workspace_dir / "prompts.jsonl", messages, tools)
        try:
            given = SERVERS["transformers"].view(copy.deepcopy(messages), copy.deepcopy(tools), source)
            ours = world[1](apply_template(*given, world[1], source, {}, True), add_special_tokens=False)["input_ids"]
        except (RefusedRequest, *ROW_ERRORS): ours = None
        assert theirs == ours, request
        seen["refused" if ours is None else "built"] += 1
    assert seen["built"] > 20, seen
