"""A real server on loopback (`transformers serve`) with a small model that was trained by heart: tools in, `tool_calls`
out; and the smoke test as a user runs it."""
import json
import os
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from ports import free_port

from proxy_sft.evaluation.answers import read_reply, turns_of
from proxy_sft.evaluate import evaluate
from proxy_sft.evaluation.servers import Server
from proxy_sft.evaluation.serving import serving_notes
from test_evaluate import ASKED, WEATHER, row, world  # noqa: F401 (a fixture)


@pytest.fixture(scope="module")
def served(world):
    settings, _ = world
    port, log = free_port(), settings.workspace_dir / "serve.log"
    with open(log, "wb") as out:
        process = subprocess.Popen(
            [
                Path(sys.executable).parent / "transformers",
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
