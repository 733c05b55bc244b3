"""Preparation: ids equal to the reference, caches that are whole or not there, one builder for many, rows that do not
see each other.

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

from proxy_sft.core import atomic_folders
from proxy_sft.tokens import blocks as block_files, caches, encoding, preparation
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import builder
from proxy_sft.chat.parity import line_starts
from proxy_sft.chat.encoder import ChatEncoder
from proxy_sft.chat.masks import IGNORED, supervise
from proxy_sft.data.conversion import convert_file, hashes
from proxy_sft.tokens.lengths import Borders, cut_to_fit, FATES, pack
from proxy_sft.pipeline import ensure_inputs
from proxy_sft.tokens.encoding import encode_rows
from proxy_sft.tokens.keys import cache_key, key_parts, PrepareError
from proxy_sft.tokens.preparation import build, prepare, Prepared
from proxy_sft.core.atomic_folders import is_complete, with_checksum
from proxy_sft.core.settings import load_settings
from proxy_sft.core.build_once import Claim

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
SOAK = os.environ.get("PROXY_SFT_SOAK") == "1"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "A workspace with the demo's model and conversations."
    workspace = tmp_path_factory.mktemp("prepare") / "workspace"
    ensure_inputs(settings_in(workspace))
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
    kept = (
        whole
        if len(ids(whole)["input_ids"]) <= limit
        else cut_to_fit(whole, limit, cut, lambda r: len(ids(r)["input_ids"]))
    )
    if kept is None: return "dropped: too long", None
    found = ids(kept)
    if all(label == IGNORED for label in found["labels"][1:]): return "dropped: nothing to learn", None
    return "whole" if kept is whole else "cut", found


def rows_in(prepared, split="train"):
    "The conversations in the blocks."
    for block in prepared.dataset(split).with_format("numpy"):
        ends = np.cumsum([0, *block["seq_lengths"]])
        for a, b in zip(ends, ends[1:]):
            yield tuple(block["input_ids"][a:b].tolist()), tuple(block["labels"][a:b].tolist())


def compare_with_reference(rows, tokenizer, template, settings):
    "Every row."
    found = encode_rows(
        rows, np.arange(len(rows)), ChatEncoder(tokenizer, template, "all"), Borders.of(tokenizer), settings
    )
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
    if not (SHARED / "qwen3-8b" / "tokenizer.json").is_file():
        pytest.skip("the real tokenizer is not here: ../shared/qwen3-8b")
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
    for name in ("rows", "tokens", "supervised_tokens", *FATES):
        assert sum(c[name] for c in by_source.values()) == train[name]
    assert train["tokens"] == sum(len(ids) for ids, _ in expected.elements()) and "Dolci Instruct Tool Use" in by_source
    assert train["supervised_tokens"] == sum(
        label != IGNORED for _, labels in expected.elements() for label in labels[1:]
    )
    [line] = [entry for entry in prepared.statistics["train"]["max_length"] if entry["max_length"] == 512]
    assert {fate: line[fate] for fate in FATES} == {fate: train[fate] for fate in FATES} and line["tokens"] == train[
        "tokens"
    ]


def test_processes_and_ranks_do_not_change_a_byte(workspace, monkeypatch):
    alone = prepare(settings_in(workspace))
    monkeypatch.setattr(encoding, "PIECE_BYTES", 20_000)
    monkeypatch.setattr(encoding, "WORTH_BYTES", (0, 0))
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
    monkeypatch.setattr(encoding, "ChatEncoder", Wrong)
    heard = []
    folder = build(settings, heard.append)
    assert any("reference path, because the fast path differs" in text for text in heard)
    assert Prepared(folder).manifest["path"].startswith("reference")
    same = lambda f: json.loads((f / "manifest.json").read_text())["files"]["train.arrow"]
    assert same(folder) == same(folder.with_name("kept"))


def test_a_damaged_line_and_a_row_that_no_template_renders(workspace):
    settings, source = settings_in(workspace), settings_in(workspace).converted_dir / "train.jsonl"
    lines = source.read_bytes().splitlines(keepends=True)
    bad = json.dumps(
        {
            "messages_json": json.dumps([{"role": "user"}, {"role": "assistant", "content": [1], "tool_calls": 3}]),
            "tools_json": "[]",
        }
    )
    encoder = ChatEncoder(AutoTokenizer.from_pretrained(settings.model_dir), "nothink", "all")
    rows = [json.loads(line) for line in (lines[0], bad, lines[1])]
    found = encode_rows(rows, np.arange(3), encoder, Borders.of(encoder.tokenizer), settings)
    assert [FATES[fate] for fate in found.facts["fate"].to_pylist()] == [
        "whole",
        "dropped: not renderable",
        "whole",
    ] and len(found.rows) == 2
    source.write_bytes(b"".join([*lines[:5], lines[5][:40] + b"\n", *lines[6:]]))
    with pytest.raises(PrepareError, match=r"line 6 is no JSON"):
        encoding.read_rows(source, starts := line_starts(source), np.arange(len(starts) - 1))


def test_packing_of_dolci_s_lengths_is_over_99_percent_full():
    draw = np.random.default_rng(0)
    # tool rows, chat, long reasoning
    parts = [draw.lognormal(7.0, 0.6, 10_600), draw.lognormal(6.2, 1.0, 85_000), draw.lognormal(8.5, 0.7, 4_400)]
    for block in (8192, 32768):
        lengths = np.concatenate(parts).clip(16, block).astype(np.int32)
        blocks = pack(lengths, block)
        assert sorted(row for some in blocks for row in some) == list(range(len(lengths)))
        assert max(int(lengths[some].sum()) for some in blocks) <= block
        assert lengths.sum() / (len(blocks) * block) >= 0.99


# What may go wrong with a folder

def test_any_flipped_bit_is_found(workspace):
    settings = settings_in(workspace)
    folder, draw = prepare(settings).folder, random.Random(7)
    files = sorted(f for f in folder.rglob("*") if f.is_file())
    sizes = [f.stat().st_size for f in files]
    for turn in range(1000 if SOAK else 100):
        victim = files[turn] if turn < len(files) else draw.choices(files, sizes)[0]  # each file once, then by size
        whole = victim.read_bytes()
        broken = bytearray(whole)
        broken[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        victim.write_bytes(broken)
        with pytest.raises((PrepareError, atomic_folders.AtomicFolderError)): preparation.check_folder(folder)
        victim.write_bytes(whole)
    preparation.check_folder(folder)


@pytest.mark.parametrize("harm", ["cut", "removed", "added", "row missing"])
def test_a_harmed_folder_is_not_trained_on(workspace, harm):
    settings = settings_in(workspace)
    prepared = prepare(settings)
    victim = prepared.folder / "train.arrow"
    if harm == "cut": os.truncate(victim, victim.stat().st_size - 8)
    if harm == "removed": victim.unlink()
    if harm == "added": (prepared.folder / "other").touch()
    if harm == "row missing":
        left = encoding.read_stream(victim).slice(1)
        encoding.write_stream(victim.with_name("new"), block_files.BLOCKS, iter(left.to_batches()))
        victim.with_name("new").replace(victim)
    with pytest.raises(PrepareError, match="delete"): prepare(settings)


def test_what_changed_is_shown(workspace, capsys):
    prepare(settings_in(workspace))
    capsys.readouterr()
    converted = settings_in(workspace).converted_dir
    with (converted / "heldout.jsonl").open("rb+") as file:
        file.truncate(file.read().rstrip(b"\n").rindex(b"\n") + 1)
    (converted / "heldout.rows.parquet").unlink()
    record = json.loads((converted / "report.json").read_text())  # as a conversion that had written these files
    names = [one["name"] for one in record["files"] if (converted / one["name"]).is_file()]
    record["files"] = hashes([converted / name for name in names])
    (converted / "report.json").write_text(json.dumps(with_checksum(record)))
    build(settings_in(workspace, cut="keep_newest"), print)
    shown = capsys.readouterr().out
    assert (
        "data/heldout.jsonl" in shown
        and "settings/cut (was 'keep_oldest', is 'keep_newest')" in shown
        and "data/train.jsonl" not in shown
    )


# Builders that die, builders that meet. Real processes, without a notebook.

def start(workspace, rank=0, size=1, local=None, local_size=None, **given):
    "A process that prepares, as a rank of so many; see `builder.build`."
    env = {
        "OMP_NUM_THREADS": "1",
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(rank if local is None else local),
        "LOCAL_WORLD_SIZE": str(local_size or size),
    }
    given = {"workspace": str(workspace), **given}
    if given.get("processes", 1) == 1: return builder.started(env, workspace.parent, given)
    path = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    return subprocess.Popen(
        [sys.executable, builder.__file__, json.dumps(given)],
        env={**os.environ, **env, "PYTHONPATH": path},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def result(process, ok=True):
    out, err = process.communicate(timeout=900)
    assert (process.returncode == 0) == ok, err[-3000:]
    return next((line for line in out.splitlines() if line.startswith("prepared")), "") if ok else err


def leftovers(workspace):
    return [f.name for f in (workspace / "prepared").glob(".*")]


def test_two_jobs_that_want_the_same_build_it_once(workspace):
    jobs = [start(workspace, seconds=2, run=f"job-{i}") for i in range(2)]
    outs = [job.communicate(timeout=900) for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], outs
    assert sum("building" in out for out, _ in outs) == 1 and len({out.splitlines()[-1] for out, _ in outs}) == 1
    assert not leftovers(workspace)


def test_a_builder_that_is_killed_leaves_nothing_that_counts_and_the_next_one_cleans_up(workspace):
    settings = settings_in(workspace)
    expected, draw = cache_key(key_parts(settings)), random.Random(3)
    whole = result(start(workspace))
    shutil.rmtree(workspace / "prepared")
    begun = time.monotonic()
    assert result(start(workspace)) == whole
    took, killed = time.monotonic() - begun, 0
    for moment in range(20) if SOAK else (0, 1, 3):
        shutil.rmtree(workspace / "prepared", ignore_errors=True)
        victim = start(workspace, processes=2 if moment % 4 == 3 else 1, seconds=3600 if moment == 0 else 0)
        while moment % 4 == 3 and victim.poll() is None and not leftovers(workspace):
            time.sleep(0.02)  # that one imports everything first
        if moment: time.sleep(took * draw.uniform(0, 1.05))
        else:
            # this one dies with its claim, however slow it was
            wait_until(lambda: "building" in victim.out.read_text(), victim)
        victim.kill()
        killed += victim.wait() == -signal.SIGKILL
        victim.communicate()
        if is_complete(workspace / "prepared" / expected): preparation.check_folder(workspace / "prepared" / expected)
        elif moment % 4 == 0: assert result(start(workspace)) == whole and not leftovers(workspace)
        else:
            assert build(settings, lambda text: None).name == expected and not leftovers(workspace)
            preparation.check_folder(workspace / "prepared" / expected)
    assert killed


def test_ranks_wait_for_a_slow_builder_beyond_any_collective_s_timeout(workspace):
    "A collective has 5 s here unless it says otherwise; the build takes 8 s and more, and no collective waits for it."
    ranks = [start(workspace, rank=r, size=2, seconds=8, shared="auto", meet=5) for r in range(2)]
    outs = [rank.communicate(timeout=900) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], outs
    assert all("met" in out for out, _ in outs) and ["building" in out for out, _ in outs] == [True, False]


def test_ranks_stop_at_once_when_their_builder_is_killed_or_fails(workspace):
    ranks = [start(workspace, seconds=3600, rank=r, size=3) for r in range(3)]
    for rank in ranks[1:]: wait_until(lambda: "waits. " in rank.out.read_text(), rank)  # it has heard of the builder
    wait_until(lambda: "building" in ranks[0].out.read_text(), ranks[0])
    ranks[0].kill()
    for rank in ranks[1:]:
        assert "the builder died" in (said := result(rank, ok=False)) and "it is not there any more" in said
    ranks[0].communicate()
    (workspace / "converted" / "demo" / "train.jsonl").write_text("{broken\n")
    waiting = start(workspace, rank=1, size=2)
    wait_until((workspace / "runs" / "run" / ".waiting-1").exists, waiting)  # what fails at once would not wait for it
    for rank in (start(workspace, rank=0, size=2), waiting): assert "line 1" in result(rank, ok=False)


def wait_until(there, process):
    "Until it is there, which the process must live to see."
    while not there():
        assert process.returncode is None, process.communicate()
        time.sleep(0.05)


def test_a_machine_that_sees_another_disk_prepares_for_itself(workspace, tmp_path):
    "Two machines of two ranks with a workspace each: the probe finds out, and both get the same rows."
    other = Path(shutil.copytree(workspace, tmp_path / "other"))
    place = lambda r: dict(rank=r, size=4, local=r % 2, local_size=2, shared="auto", answer=8)
    ranks = [start(other if r > 1 else workspace, **place(r)) for r in range(4)]
    outs = [rank.communicate(timeout=900) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * 4, outs
    assert [("building" in out, "no shared folder" in out) for out, _ in outs] == [
        (True, False),
        (False, False),
        (True, True),
        (False, False),
    ]
    assert len({out.splitlines()[-1] for out, _ in outs}) == 1


def test_what_a_dead_builder_left_holds_nobody_up_and_what_a_living_one_holds_stays(workspace):
    settings = settings_in(workspace)
    folder = settings.prepared_dir / cache_key(key_parts(settings))
    claim = preparation.claim_of(folder)
    settings.prepared_dir.mkdir()
    # nothing, words, garbage
    for left in (b"", b"process 7 on a host that is no more, since yesterday\nrows 3\n", b"\xff" * 5000):
        claim.write_bytes(left)
        (settings.prepared_dir / f".building-{folder.name}-0123").mkdir()
        heard = []
        assert is_complete(build(settings, heard.append)) and not leftovers(workspace)
        assert any("died while building" in text for text in heard) == bool(left)
        shutil.rmtree(folder)
    folder.mkdir() # renamed, and its builder has not yet marked it
    claim = Claim(preparation.claim_of(folder))
    assert claim.acquire() and preparation.remove_abandoned(settings.prepared_dir) == [] and folder.is_dir()
    claim.release()
    assert preparation.remove_abandoned(settings.prepared_dir) == [folder] and not folder.exists()


def test_workers_of_a_killed_builder_end_by_themselves(workspace):
    killed = start(workspace, processes=2, hold=3600)
    while (said := killed.stdout.readline()) != "a piece\n": assert said, killed.communicate()
    assert len(alive := children_of(killed.pid)) >= 3  # a worker or two, and what the library starts beside them
    killed.kill()
    killed.communicate()
    end = time.monotonic() + 600
    while any(map(lives, alive)) and time.monotonic() < end: time.sleep(0.2)
    assert not [pid for pid in alive if lives(pid)]


def lives(pid):
    try: return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError): return False


def children_of(pid):
    "All processes below one."
    found, new = set(), {pid}
    while new:
        step = set()
        for parent in new:
            for task in Path(f"/proc/{parent}/task").glob("*/children"):
                try: step |= set(map(int, task.read_text().split()))
                except (FileNotFoundError, ProcessLookupError): continue
        new = step - found
        found |= step
    return found


def test_old_caches_are_pruned_and_those_of_runs_stay(workspace):
    old, needed = prepare(settings_in(workspace)).folder, prepare(settings_in(workspace, max_length=512)).folder
    for folder in (old, needed): os.utime(folder / "COMPLETE", (1, 1))
    new = prepare(settings_in(workspace, max_length=700)).folder
    checkpoint = workspace / "runs" / "mine" / "checkpoint-3"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text(json.dumps({"data_key": needed.name}))
    assert caches.prune_caches(settings_in(workspace)) == [old] and not old.exists()
    assert [(c.folder, c.runs) for c in caches.list_caches(settings_in(workspace))] == [(new, ()), (needed, ("mine",))]
    prepare(settings_in(workspace, max_length=512))  # used again
    assert caches.list_caches(settings_in(workspace))[0].folder == needed


# Rows in a block do not see each other

@pytest.mark.parametrize("attention", ["eager", "sdpa", pytest.param("flex_attention", marks=pytest.mark.skipif(
    not SOAK, reason="compiles C++ first, and not with every compiler: set PROXY_SFT_SOAK=1"))])
def test_the_loss_of_a_packed_block_is_the_token_weighted_loss_of_its_rows_alone(workspace, attention):
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
    settings = settings_in(workspace)
    prepared = prepare(settings)
    model = AutoModelForCausalLM.from_pretrained(settings.model_dir, dtype=torch.float32, attn_implementation=attention)
    collate = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    blocks = prepared.dataset("train")
    some = [blocks[i] for i in range(len(blocks)) if len(blocks[i]["seq_lengths"]) > 2][:6 if SOAK else 2]
    for block in some:
        batch = collate([block])
        packed, alone, tokens = loss_of(model, batch), 0.0, 0
        assert "attention_mask" not in batch
        ends = np.cumsum([0, *block["seq_lengths"]])
        for a, b in zip(ends, ends[1:]):
            row = {"input_ids": torch.tensor([block["input_ids"][a:b]]), "labels": torch.tensor([block["labels"][a:b]])}
            count = int((row["labels"][0, 1:] != IGNORED).sum())
            alone, tokens = alone + loss_of(model, row) * count, tokens + count
        assert tokens and packed == pytest.approx(alone / tokens, abs=1e-5)
        leaking = dict(batch, position_ids=torch.arange(len(block["input_ids"]))[None])
        assert abs(loss_of(model, leaking) - alone / tokens) > 1e-4  # the measure sees a leak


def loss_of(model, batch):
    with torch.no_grad():
        return float(model(**{n: v for n, v in batch.items() if torch.is_tensor(v)}, use_cache=False).loss)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_without_packing_padded_and_padding_free_batches_have_the_loss_of_their_rows_alone(workspace, attention):
    from proxy_sft.training.arguments import training_arguments
    from proxy_sft.training.trainer import trainer_columns
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
    losses, alone, tokens = {}, 0.0, 0
    for free in (False, True):
        settings = settings_in(workspace, packing=False, padding_free=free)
        data = trainer_columns(prepare(settings).dataset("train"), settings)
        model = AutoModelForCausalLM.from_pretrained(
            settings.model_dir, dtype=torch.float32, attn_implementation=attention
        )
        rows = [data[i] for i in (0, 5, 9)]
        batch = DataCollatorForLanguageModeling(
            pad_token_id=0, padding_free=training_arguments(settings, resumed=False).padding_free
        )(rows)
        assert ("attention_mask" in batch, "position_ids" in batch) == (not free, free) and len(batch["input_ids"]) == (
            1 if free else 3
        )
        losses[free] = loss_of(model, batch)
    for row in rows:
        one = {name: torch.tensor(row[name])[None] for name in ("input_ids", "labels")}
        count = int((one["labels"][0, 1:] != IGNORED).sum())
        alone, tokens = alone + loss_of(model, one) * count, tokens + count
    assert [losses[False], losses[True]] == pytest.approx([alone / tokens] * 2, abs=1e-5)
