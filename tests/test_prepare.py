"""Preparation: ids equal to the reference, caches that are whole or not there, one builder for many, rows that do not see each other.

The long forms (more moments, more places) run with PROXY_SFT_SOAK=1.
"""
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import proxy_sft.prepare as room
from proxy_sft.chat import IGNORED, ChatEncoder, supervise
from proxy_sft.convert import convert_file
from proxy_sft.lengths import FATES, Borders, cut_to_fit, pack
from proxy_sft.prepare import PrepareError, Prepared, build, cache_key, encode_rows, key_parts, prepare, require_inputs
from proxy_sft.sealed import is_complete
from proxy_sft.settings import load_settings
from proxy_sft.waiting import Announcer, Claim

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
SOAK = os.environ.get("PROXY_SFT_SOAK") == "1"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "A workspace with the demo's model and conversations."
    workspace = tmp_path_factory.mktemp("prepare") / "workspace"
    require_inputs(settings_in(workspace))
    return workspace


@pytest.fixture
def workspace(made, tmp_path):
    "A copy of it in which nothing is prepared."
    return Path(shutil.copytree(made, tmp_path / "workspace", ignore=shutil.ignore_patterns("prepared", "runs")))


def settings_in(workspace, **given):
    return load_settings("demo", **{"workspace": str(workspace), "demo_rows": 200, "num_proc": 1, **given})


def whole_row(row):
    return {"messages": json.loads(row["messages_json"]), "tools": json.loads(row["tools_json"])}


def reference(row, tokenizer, template, limit, cut="keep_oldest"):
    "Fate, ids and labels of a row by the slow path alone."
    ids = lambda r: supervise(r["messages"], r["tools"], tokenizer, template)
    whole = whole_row(row)
    kept = whole if len(ids(whole)["input_ids"]) <= limit else cut_to_fit(whole, limit, cut, lambda r: len(ids(r)["input_ids"]))
    if kept is None: return "dropped: too long", None
    found = ids(kept)
    if all(label == IGNORED for label in found["labels"][1:]): return "dropped: nothing to learn", None
    return "whole" if kept is whole else "cut", found


def rows_in(prepared, split="train"):
    "The conversations in the blocks."
    for block in prepared.dataset(split).with_format("numpy"):
        ends = np.cumsum([0, *block["seq_lengths"]])
        for a, b in zip(ends, ends[1:]): yield tuple(block["input_ids"][a:b].tolist()), tuple(block["labels"][a:b].tolist())


def compare_with_reference(rows, tokenizer, template, settings):
    "Every row."
    found = encode_rows(rows, np.arange(len(rows)), ChatEncoder(tokenizer, template, "all"), Borders.of(tokenizer), settings)
    places = iter(range(len(found.rows)))
    for row, fate in zip(rows, found.facts["fate"].to_pylist()):
        expected, encoded = reference(row, tokenizer, template, settings.max_length, settings.cut)
        assert FATES[fate] == expected
        if encoded: assert found.rows[next(places)] == encoded
    assert next(places, None) is None


@pytest.mark.parametrize("limit, cut", [(1024, "keep_oldest"), (400, "keep_newest")])
@pytest.mark.parametrize("template", ["nothink", "empty_think"] + ["stock"] * SOAK)
def test_every_row_of_the_demo_has_the_reference_s_ids_and_labels(made, template, limit, cut):
    settings = settings_in(made, max_length=limit, cut=cut)
    rows = [json.loads(line) for line in (settings.converted_dir / "train.jsonl").open()]
    compare_with_reference(rows, AutoTokenizer.from_pretrained(settings.model_dir), template, settings)


def test_every_row_of_the_shared_files_has_the_reference_s_ids_and_labels(made, tmp_path):
    if not (SHARED / "qwen3-8b" / "tokenizer.json").is_file(): pytest.skip("the real tokenizer is not here: ../shared/qwen3-8b")
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "qwen3-8b")
    rows = []
    for name in ("real", "bfcl"):
        convert_file(SHARED / "dolci" / f"{name}_rows.jsonl", tmp_path / f"{name}.jsonl")
        rows += [json.loads(line) for line in (tmp_path / f"{name}.jsonl").open()]
    assert len(rows) > 390
    compare_with_reference(rows, tokenizer, "nothink", settings_in(made, max_length=1536))


def test_folder_holds_the_reference_s_rows_and_counts_add_up(workspace):
    settings = settings_in(workspace, max_length=512)
    prepared, tokenizer = prepare(settings), AutoTokenizer.from_pretrained(settings.model_dir)
    expected, fates = Counter(), Counter()
    for line in (settings.converted_dir / "train.jsonl").open():
        fate, encoded = reference(json.loads(line), tokenizer, settings.template, 512)
        fates[fate] += 1
        if encoded: expected[tuple(encoded["input_ids"]), tuple(encoded["labels"])] += 1
    assert Counter(rows_in(prepared)) == expected and fates["cut"] and fates["dropped: too long"]
    train, by_source = prepared.splits["train"], prepared.statistics["train"]["by_source"]
    assert {fate: n for fate in FATES if (n := train[fate])} == dict(fates) and train["rows"] == fates.total()
    for name in ("rows", "tokens", "supervised_tokens", *FATES): assert sum(c[name] for c in by_source.values()) == train[name]
    assert train["tokens"] == sum(len(ids) for ids, _ in expected.elements()) and "Dolci Instruct Tool Use" in by_source
    assert train["supervised_tokens"] == sum(label != IGNORED for _, labels in expected.elements() for label in labels[1:])
    [line] = [entry for entry in prepared.statistics["train"]["max_length"] if entry["max_length"] == 512]
    assert {fate: line[fate] for fate in FATES} == {fate: train[fate] for fate in FATES} and line["tokens"] == train["tokens"]


def test_processes_and_ranks_do_not_change_a_byte(workspace, monkeypatch):
    alone = prepare(settings_in(workspace))
    monkeypatch.setattr(room, "PIECE_BYTES", 20_000)
    monkeypatch.setattr(room, "WORTH_BYTES", (0, 0))
    monkeypatch.setenv("WORLD_SIZE", "8")
    shutil.move(alone.folder, alone.folder.with_name("first"))
    [folder] = [build(settings_in(workspace, num_proc=2))]
    assert folder == alone.folder
    first = json.loads((folder.with_name("first") / "manifest.json").read_text())["files"]
    assert first == json.loads((folder / "manifest.json").read_text())["files"]


def test_without_packing_a_block_is_a_row_in_the_file_s_order(workspace):
    prepared = prepare(settings_in(workspace, packing=False))
    lengths = [len(row) for row in prepared.dataset("train")["input_ids"]]
    assert prepared.splits["train"]["blocks"] == len(lengths)
    assert lengths == [n for n in prepared.facts("train")["used_tokens"].to_pylist() if n]


def test_a_difference_from_the_reference_falls_back_for_the_whole_run_and_says_so(workspace, monkeypatch):
    right, settings = prepare(settings_in(workspace)), settings_in(workspace)
    shutil.rmtree(right.folder.parent / "kept", ignore_errors=True)
    shutil.move(right.folder, right.folder.with_name("kept"))
    class Wrong(ChatEncoder):
        def encode(self, rows, parallel=None):
            found = super().encode(rows, parallel)
            if not self.fallback: found.ids[-1] ^= 1
            return found
    monkeypatch.setattr(room, "ChatEncoder", Wrong)
    heard = []
    folder = build(settings, heard.append)
    assert any("reference path, because the fast path differs" in text for text in heard)
    assert Prepared(folder).manifest["path"].startswith("reference")
    same = lambda f: json.loads((f / "manifest.json").read_text())["files"]["train.arrow"]
    assert same(folder) == same(folder.with_name("kept"))


def test_a_damaged_line_and_a_row_that_no_template_renders(workspace):
    settings, source = settings_in(workspace), settings_in(workspace).converted_dir / "train.jsonl"
    lines = source.read_bytes().splitlines(keepends=True)
    bad = json.dumps({"messages_json": json.dumps([{"role": "user"}, {"role": "assistant", "content": [1], "tool_calls": 3}]), "tools_json": "[]"})
    encoder = ChatEncoder(AutoTokenizer.from_pretrained(settings.model_dir), "nothink", "all")
    rows = [json.loads(line) for line in (lines[0], bad, lines[1])]
    found = encode_rows(rows, np.arange(3), encoder, Borders.of(encoder.tokenizer), settings)
    assert [FATES[fate] for fate in found.facts["fate"].to_pylist()] == ["whole", "dropped: not renderable", "whole"] and len(found.rows) == 2
    source.write_bytes(b"".join([*lines[:5], lines[5][:40] + b"\n", *lines[6:]]))
    with pytest.raises(PrepareError, match=r"line 6 is no JSON"): room.read_rows(source, starts := room.line_starts(source), np.arange(len(starts) - 1))


def test_packing_of_dolci_s_lengths_is_over_99_percent_full():
    draw = np.random.default_rng(0)
    parts = [draw.lognormal(7.0, 0.6, 10_600), draw.lognormal(6.2, 1.0, 85_000), draw.lognormal(8.5, 0.7, 4_400)]  # tool rows, chat, long reasoning
    for block in (8192, 32768):
        lengths = np.concatenate(parts).clip(16, block).astype(np.int32)
        blocks = pack(lengths, block)
        assert sorted(row for some in blocks for row in some) == list(range(len(lengths)))
        assert max(int(lengths[some].sum()) for some in blocks) <= block
        assert lengths.sum() / (len(blocks) * block) >= 0.99
