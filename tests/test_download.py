"`00_download` against a hub on the loopback interface: cut, killed, corrupted, refused, full, offline, bounded."
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

from proxy_sft.data import dataset_files, local, model_files, plans, transfer
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub_server import Fault, HubServer, Repo
from safetensors.numpy import save

from proxy_sft.data.dataset_files import download_dataset, write_rows
from proxy_sft.data.hub import choose_data_files, DownloadError
from proxy_sft.data.model_files import check_weights, download_model
from proxy_sft.data.plans import read_manifest
from proxy_sft.data.transfer import check_disk
from proxy_sft.convert import convert
from proxy_sft.download import download
from proxy_sft.data.files import input_files
from proxy_sft.data.rows import ConvertError
from proxy_sft.core.settings import load_settings

TOKEN = "hf_ThisTokenMustNotBeSeen1234567890"
SHARD, OTHER = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
BIG = 24 << 20  # bytes; the library hands data over in pieces of 10 MiB


def model_repository(big: int = 4096) -> dict:
    "A model's files as the hub has them, its first shard of about `big` bytes."
    rng = np.random.default_rng(0)
    first = {"embed": rng.integers(0, 255, big, dtype="uint8"), "norm": np.ones(8, "float32")}
    second = {"head": np.ones((8, 4), "float32")}
    size = sum(a.nbytes for part in (first, second) for a in part.values())
    where = {**dict.fromkeys(first, SHARD), **dict.fromkeys(second, OTHER)}
    index = {"metadata": {"total_size": size}, "weight_map": where}
    return {SHARD: save(first), OTHER: save(second), "model.safetensors.index.json": json.dumps(index).encode(),
            "config.json": b'{"model_type": "qwen3"}', "generation_config.json": b"{}", "tokenizer_config.json": b"{}",
            "tokenizer.json": b'{"version": "1.0"}', "merges.txt": b"a b\n", "README.md": b"---\nlicense: x\n---\n",
            "pytorch_model.bin": b"pickle", "training_args.bin": b"pickle", "original/consolidated.pt": b"pickle",
            "modeling_qwen3.py": b"raise SystemExit"}


def rows(n: int, source: str = "source_dataset", domain: bool = True, text: str = "Hello") -> list:
    "Rows with a tool call and the ugly things: nulls, a NUL character, text beyond ASCII."
    def message(role, content=None, calls=None, functions=None):
        return {"content": content, "function_calls": calls, "functions": functions, "role": role}
    more = {source: "Dolci Instruct Tool Use", **({"domain": "Tool Use"} if domain else {})}
    return [{"id": f"row-{i}", **more, "messages": [
        message("system", "Call.", None, '[{"name": "now"}]'), message("user", f"{text} \0 {i} ☃"),
        message("assistant", None, f"now(i={i})"), message("environment", "1"), message("assistant", "One.")]}
        for i in range(n)]


def parquet(rows: list, group: int = 4) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink, row_group_size=group)
    return sink.getvalue().to_pybytes()


def data_files(all_rows: list, files: int = 3) -> dict:
    step = -(-len(all_rows) // files)
    parts = [all_rows[i:i + step] for i in range(0, len(all_rows), step)]
    train = {f"data/train-{i:05}-of-{files:05}.parquet": parquet(part) for i, part in enumerate(parts)}
    return {**train, "README.md": b"# Rows", "data/test-00000-of-00001.parquet": parquet(all_rows[:1])}


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    "No address, token or log-in of this machine reaches a test; no bars in the logs."
    for name in ("HF_ENDPOINT", "HF_TOKEN", "HF_HUB_OFFLINE"): monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(plans, "get_token", lambda: os.environ.get("HF_TOKEN"))
    for module in (transfer, model_files, dataset_files): monkeypatch.setattr(module, "MARGIN", 0)
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")


@pytest.fixture
def hub():
    model = Repo(model_repository(), card={"license": "apache-2.0"})
    data = Repo(data_files(rows(10)), kind="dataset", card={"license": "odc-by"})
    with HubServer({"ex/model": model, "ex/data": data}, page_size=3) as server: yield server


@pytest.fixture
def big_hub():
    with HubServer({"ex/model": Repo(model_repository(BIG))}) as server: yield server


def fetch(hub, folder, **more):
    return download_model("ex/model", folder, endpoint=hub.url, token=False, margin=0, **more)


def fetch_rows(hub, folder, **more):
    return download_dataset("ex/data", folder, endpoint=hub.url, token=False, margin=0, **more)


def read_rows(folder):
    return [json.loads(line) for line in (folder / "train.jsonl").read_text(encoding="utf-8").splitlines()]


def files_in(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and p.name != ".download.lock")


def from_profile(folder, **more):
    return load_settings("qwen3_8b", **{"model": "ex/model", "dataset": "ex/data", "workspace": str(folder), **more})


# ---- the whole thing

def test_model_is_pinned_verified_and_free_of_code(hub, tmp_path):
    report = fetch(hub, tmp_path)
    wanted = sorted(n for n in model_repository() if not n.endswith((".bin", ".py", ".pt")))
    assert files_in(tmp_path) == sorted([*wanted, "download.json"])
    assert all((tmp_path / name).read_bytes() == model_repository()[name] for name in wanted)
    record = json.loads((tmp_path / "download.json").read_text())
    commit = hub.repos["model", "ex/model"].branches["main"]
    stated = {name: record[name] for name in ("repo", "revision", "commit", "license")}
    assert stated == {"repo": "ex/model", "revision": "main", "commit": commit, "license": "apache-2.0"}
    assert {f["path"] for f in record["files"]} == set(wanted)
    assert all(("sha256" in f) != ("git_sha1" in f) for f in record["files"])
    assert report["weights"]["tensors"] == 3
    asked = [r["path"] for r in hub.requests if "/resolve/" in r["path"]]
    assert asked and all(commit in path for path in asked)  # the commit is asked for, never the branch


def test_files_of_one_content_do_not_share_a_partial_file(tmp_path):
    same = {f"same-{i:02}.json": b"{}" * 50_000 for i in range(24)}
    with HubServer({"ex/model": Repo({**model_repository(), **same})}) as hub: fetch(hub, tmp_path)
    assert {(tmp_path / name).read_bytes() for name in same} == {b"{}" * 50_000}


def test_second_run_makes_no_request_and_a_moved_branch_waits_for_refresh(hub, tmp_path):
    fetch(hub, tmp_path)
    newer = {"config.json": b'{"model_type": "qwen3", "new": 1}', "merges.txt": b"b c\n"}
    hub.repos["model", "ex/model"].commit({**model_repository(), **newer})
    hub.requests.clear()
    assert fetch(hub, tmp_path)["fetched"] == [] and hub.requests == []
    assert fetch(hub, tmp_path, verify=True)["fetched"] == [] and hub.requests == []
    assert sorted(fetch(hub, tmp_path, refresh=True)["fetched"]) == ["config.json", "merges.txt"]
    assert len(hub.bodies()) == 2


def test_offline_second_run(hub, tmp_path):
    fetch(hub, tmp_path / "m"); fetch_rows(hub, tmp_path / "d")
    nowhere = {"endpoint": "http://127.0.0.1:9", "token": False}
    assert download_model("ex/model", tmp_path / "m", **nowhere)["fetched"] == []
    assert download_dataset("ex/data", tmp_path / "d", **nowhere)["train"]["rows"] == 10
    (tmp_path / "m" / "config.json").unlink()
    with pytest.raises(DownloadError, match="config.json.*127.0.0.1:9.*\n.*no connection"):
        download_model("ex/model", tmp_path / "m", **nowhere)


def test_another_revision_replaces_and_removes(hub, tmp_path):
    fetch(hub, tmp_path)
    files = {k: v for k, v in model_repository().items() if k != "merges.txt"}
    hub.repos["model", "ex/model"].commit({**files, "config.json": b'{"model_type": "other"}'}, branch="v2")
    report = fetch(hub, tmp_path, revision="v2")
    assert report["fetched"] == ["config.json"] and not (tmp_path / "merges.txt").exists()
    with pytest.raises(DownloadError, match="holds model ex/model"):
        download_model("ex/other", tmp_path, endpoint=hub.url, token=False)


# ---- cut, killed, corrupted

@pytest.mark.parametrize("reset", [False, True])
def test_cut_at_half_is_resumed_with_a_range(big_hub, tmp_path, reset):
    body = model_repository(BIG)[SHARD]
    big_hub.faults[SHARD] = Fault(cut_at=len(body) // 2, reset=reset)
    fetch(big_hub, tmp_path)
    ranges = [r["range"] for r in big_hub.bodies() if r["path"].endswith(hashlib.sha256(body).hexdigest())]
    assert ranges[0] is None and len(ranges) == 2, ranges
    assert reset or int(ranges[1].removeprefix("bytes=").rstrip("-")) >= 10 << 20  # a reset drops what is under way
    assert (tmp_path / SHARD).read_bytes() == body


def record_of(folder, name): return next(f for f in read_manifest(folder)["files"] if f["path"] == name)


def test_line_that_stays_cut_gives_up_and_the_next_run_goes_on(big_hub, tmp_path, monkeypatch):
    body = model_repository(BIG)[SHARD]
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    big_hub.faults[SHARD] = Fault(cut_at=11 << 20, times=1000)
    with pytest.raises(DownloadError, match="no connection|cut|not a hub"): fetch(big_hub, tmp_path)
    part = next((tmp_path / ".parts").glob(f"*/{SHARD}"))
    assert part.stat().st_size >= 10 << 20 and not (tmp_path / SHARD).exists()
    big_hub.faults.clear(); big_hub.requests.clear()
    resumed = part.stat().st_size
    fetch(big_hub, tmp_path)
    assert f"bytes={resumed}-" in [r["range"] for r in big_hub.bodies()]
    assert (tmp_path / SHARD).read_bytes() == body and not (tmp_path / ".parts").exists()


def run_python(code: str, *arguments, **env):
    env = {**os.environ, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", **env}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=env)


CLIENT = """
import sys
from proxy_sft.data.model_files import download_model
print(download_model("ex/model", sys.argv[1], margin=0)["fetched"])
"""


def test_killed_process_leaves_a_part_that_the_next_one_continues(big_hub, tmp_path):
    body = model_repository(BIG)[SHARD]
    big_hub.faults[SHARD] = held = Fault(hold_at=22 << 20)
    client = run_python(CLIENT, tmp_path, HF_ENDPOINT=big_hub.url)
    parts = tmp_path / ".parts" / hashlib.sha256(body).hexdigest() / SHARD
    while not (parts.exists() and parts.stat().st_size >= 10 << 20):  # the rest is held back, so it is still at it
        assert client.poll() is None, client.communicate()[0].decode()
        time.sleep(0.02)
    client.send_signal(signal.SIGKILL); client.wait()
    held.let_go.set()
    size = parts.stat().st_size
    assert 10 << 20 <= size < len(body) and not (tmp_path / SHARD).exists()
    big_hub.requests.clear()
    client = run_python(CLIENT, tmp_path, HF_ENDPOINT=big_hub.url)
    output = client.communicate(timeout=600)[0].decode()
    assert client.returncode == 0, output
    assert f"bytes={size}-" in [r["range"] for r in big_hub.bodies()]
    assert not [r for r in big_hub.requests if r["path"].startswith("/api/models")]  # the commit is the first run's
    assert (tmp_path / SHARD).read_bytes() == body


def test_two_processes_share_one_download(big_hub, tmp_path):
    clients = [run_python(CLIENT, tmp_path, HF_ENDPOINT=big_hub.url) for _ in range(2)]
    outputs = [client.communicate(timeout=600)[0].decode() for client in clients]
    assert [client.returncode for client in clients] == [0, 0], outputs
    assert sum("[]" in output for output in outputs) == 1  # the second found everything there
    assert sum(r["cdn"] for r in big_hub.bodies()) == 3  # two shards and tokenizer.json, each once


def test_flipped_bit_on_disk_is_found_and_fetched_again(hub, tmp_path):
    fetch(hub, tmp_path)
    path, good = tmp_path / SHARD, (tmp_path / SHARD).read_bytes()
    stamp = path.stat().st_mtime_ns
    bad = bytearray(good); bad[-1] ^= 1
    path.write_bytes(bad); os.utime(path, ns=(stamp, stamp))
    hub.requests.clear()
    assert fetch(hub, tmp_path)["fetched"] == []  # size and time stamp are trusted
    assert fetch(hub, tmp_path, verify=True)["fetched"] == [SHARD] and path.read_bytes() == good
    path.write_bytes(bad)  # a new time stamp: seen without verify
    assert fetch(hub, tmp_path)["fetched"] == [SHARD] and path.read_bytes() == good
    (tmp_path / "config.json").write_text("{}")
    assert fetch(hub, tmp_path)["fetched"] == ["config.json"]


def test_wrong_bytes_once_are_fetched_again(hub, tmp_path):
    hub.faults[SHARD] = Fault(flip_at=3000)
    hub.faults["config.json"] = Fault(flip_at=3)
    fetch(hub, tmp_path)
    for name in (SHARD, "config.json"): assert (tmp_path / name).read_bytes() == model_repository()[name]


def test_wrong_bytes_twice_are_an_error_and_leave_nothing(hub, tmp_path):
    hub.faults[SHARD] = Fault(flip_at=3000, times=2)
    with pytest.raises(DownloadError, match="twice a file whose hash is not the one") as error: fetch(hub, tmp_path)
    assert SHARD in str(error.value) and not (tmp_path / SHARD).exists()
    assert record_of(tmp_path, SHARD).get("mtime_ns") is None
    fetch(hub, tmp_path)
    assert (tmp_path / SHARD).read_bytes() == model_repository()[SHARD]


def test_busy_server_is_asked_again(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    hub.faults[SHARD] = Fault(status=503, times=2)
    fetch(hub, tmp_path)
    assert (tmp_path / SHARD).read_bytes() == model_repository()[SHARD]


# ---- refused

@pytest.mark.parametrize("repo, revision, words", [
    ("ex/modle", "main", "401, no such repository is visible.*\n.*spelling"),
    ("ex/model", "v9", "404, the repository has no such revision.*\n.*commit"),
    ("ex/gated", "main", "401, the repository is gated.*\n.*accept its conditions.*HF_TOKEN"),
    ("ex/hidden", "main", "no such repository is visible.*\n.*private one set HF_TOKEN"),
    ("a b/c", "main", "no name of a repository.*\n.*owner/name")])
def test_refusals_are_explained(hub, tmp_path, repo, revision, words):
    hub.repos["model", "ex/gated"] = Repo(model_repository(), gated=True, readers=(TOKEN,))
    hub.repos["model", "ex/hidden"] = Repo(model_repository(), private=True, readers=(TOKEN,))
    with pytest.raises(DownloadError, match="(?s)" + words) as error:
        download_model(repo, tmp_path, revision, endpoint=hub.url, token=False)
    assert repo in str(error.value) and hub.url in str(error.value) and "HF_ENDPOINT" in str(error.value)
    assert files_in(tmp_path) == []


@pytest.mark.parametrize("token, repo, words", [
    (TOKEN, "ex/modle", "404, no such repository"),
    ("hf_expired", "ex/model", "401, the token was refused"),
    ("hf_stranger", "ex/gated", "403, the repository is gated")])
def test_refusals_with_a_token(hub, tmp_path, monkeypatch, token, repo, words):
    hub.tokens |= {TOKEN, "hf_stranger"}
    hub.repos["model", "ex/gated"] = Repo(model_repository(), gated=True, readers=(TOKEN,))
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(DownloadError, match=words) as error: download_model(repo, tmp_path, endpoint=hub.url)
    assert token not in str(error.value)


def test_token_opens_a_gated_repository_and_is_seen_nowhere(hub, tmp_path):
    hub.tokens.add(TOKEN)
    hub.repos["model", "ex/model"] = Repo(model_repository(), gated=True, readers=(TOKEN,))
    hub.faults[SHARD] = Fault(flip_at=9, times=9)
    home = tmp_path / "home"
    env = {"HF_TOKEN": TOKEN, "HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_VERBOSITY": "debug"}
    failed = run_python(CLIENT, tmp_path / "m", **env)
    output = failed.communicate(timeout=600)[0]
    assert failed.returncode == 1 and b"twice a file" in output
    hub.faults.clear()
    done = run_python(CLIENT, tmp_path / "m", **env)
    output += done.communicate(timeout=600)[0]
    assert done.returncode == 0, output.decode()
    assert TOKEN.encode() not in output
    assert all(TOKEN.encode() not in p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())
    assert {r["token"] for r in hub.requests if "ex/model" in r["path"]} == {f"Bearer {TOKEN}"}
    assert {r["token"] for r in hub.requests if r["cdn"]} == {None}


def test_no_connection_and_pages_that_are_no_hub(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(DownloadError, match="(?s)127.0.0.1:9 .from HF_ENDPOINT.*no connection.*HF_ENDPOINT"):
        download_model("ex/model", tmp_path, token=False)
    monkeypatch.setenv("HF_ENDPOINT", "mirror.example")
    with pytest.raises(DownloadError, match="HF_ENDPOINT"): download_model("ex/model", tmp_path, token=False)
    hub.not_a_hub = True
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    with pytest.raises(DownloadError, match="not a hub's"): download_model("ex/model", tmp_path, token=False)
    hub.not_a_hub = False  # the environment is read at each call
    assert download_model("ex/model", tmp_path, token=False, margin=0)["weights"]["shards"] == 2


def test_path_that_leaves_the_folder_is_refused(hub, tmp_path):
    hub.repos["model", "ex/model"] = Repo({**model_repository(), "../evil.json": b"{}"})
    with pytest.raises(DownloadError, match="leaves the folder"): fetch(hub, tmp_path / "m")
    assert not (tmp_path / "evil.json").exists()


# ---- disk

def test_full_disk_is_seen_before_the_first_byte(hub, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 0, 1000))
    with pytest.raises(DownloadError, match="(?s)GB of disk below.*only 0.00 GB are free.*workspace"):
        fetch(hub, tmp_path)
    with pytest.raises(DownloadError, match="only 0.00 GB are free"): fetch_rows(hub, tmp_path / "d")
    assert hub.bodies() == [] and not (tmp_path / SHARD).exists()


@pytest.fixture
def small_disk(tmp_path):
    if os.geteuid() or not shutil.which("mount"): pytest.skip("mounting a small tmpfs needs root")
    place = tmp_path / "small"; place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", place], capture_output=True).returncode:
        pytest.skip("no tmpfs can be mounted here")
    yield place
    subprocess.run(["umount", place], check=True)


def test_really_small_disk(big_hub, small_disk, monkeypatch):
    with pytest.raises(DownloadError, match="only 0.01 GB are free"): fetch(big_hub, small_disk / "m")
    assert big_hub.bodies() == []
    for module in (model_files, dataset_files):
        # another process fills the disk after the check
        monkeypatch.setattr(module, "check_disk", lambda *a, **k: None)
    with pytest.raises(DownloadError, match="the disk is full"): fetch(big_hub, small_disk / "m")
    assert not (small_disk / "m" / SHARD).exists()


def test_disk_that_fills_while_lines_are_written(small_disk, tmp_path):
    (tmp_path / "rows.parquet").write_bytes(parquet(rows(40, text="x" * 300_000), group=10))
    with pytest.raises(DownloadError, match="the disk is full"):
        write_rows([tmp_path / "rows.parquet"], small_disk / "train.jsonl")
    assert list(small_disk.iterdir()) == []


def test_needs_on_one_file_system_are_summed(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    check_disk([(tmp_path / "a", free // 3)], margin=0)
    with pytest.raises(DownloadError):
        check_disk([(tmp_path / "a", free // 3 * 2), (tmp_path / "b", free // 3 * 2)], margin=0)


# ---- rows

@pytest.mark.parametrize("source, domain", [("source_dataset", True), ("source", False), ("dataset_source", False)])
def test_three_releases_keep_their_columns(tmp_path, source, domain):
    data = rows(10, source, domain)
    with HubServer({"ex/data": Repo(data_files(data), kind="dataset")}) as hub:
        report = fetch_rows(hub, tmp_path)
    assert read_rows(tmp_path) == data and report["train"]["rows"] == 10
    assert report["train"]["columns"] == list(data[0])
    assert not (tmp_path / "raw" / "data" / "test-00000-of-00001.parquet").exists()


def test_taste_fetches_only_what_it_needs_and_the_rest_comes_later(hub, tmp_path):
    report = fetch_rows(hub, tmp_path, max_rows=5)
    assert report["fetched"] == ["README.md", "data/train-00000-of-00003.parquet", "data/train-00001-of-00003.parquet"]
    assert read_rows(tmp_path) == rows(5)
    hub.requests.clear()
    assert not fetch_rows(hub, tmp_path, max_rows=5)["train"]["written"] and hub.requests == []
    assert fetch_rows(hub, tmp_path, max_rows=3)["train"]["rows"] == 3 and hub.requests == []
    assert fetch_rows(hub, tmp_path)["fetched"] == ["data/train-00002-of-00003.parquet"]
    assert read_rows(tmp_path) == rows(10)


def test_lines_are_written_again_when_they_were_touched(hub, tmp_path):
    fetch_rows(hub, tmp_path)
    (tmp_path / "train.jsonl").write_text("{}\n")
    assert fetch_rows(hub, tmp_path)["train"]["written"] and read_rows(tmp_path) == rows(10)


def test_wrong_columns_and_damaged_parquet(tmp_path):
    (tmp_path / "a.parquet").write_bytes(parquet([{"prompt": "x"}]))
    with pytest.raises(DownloadError, match="prompt, no messages"): write_rows(tmp_path, tmp_path / "train.jsonl")
    (tmp_path / "a.parquet").write_bytes(parquet([{"messages": "x"}]))
    with pytest.raises(DownloadError, match="messages of type string"): write_rows(tmp_path, tmp_path / "train.jsonl")
    (tmp_path / "a.parquet").write_bytes(parquet(rows(3))[:-30])
    with pytest.raises(DownloadError, match="rows of a.parquet"): write_rows(tmp_path, tmp_path / "train.jsonl")
    assert not [p for p in tmp_path.iterdir() if p.name != "a.parquet"]


MEMORY = """
import sys
from pathlib import Path
from proxy_sft.data.dataset_files import write_rows
def peak():  # MiB; not ru_maxrss, which a child inherits from its parent
    line = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return int(line.split()[1]) >> 10
before = peak()
write_rows([Path(sys.argv[1])], Path(sys.argv[2]))
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_memory_does_not_grow_with_the_data(tmp_path):
    text = np.random.default_rng(0).integers(65, 90, 1 << 22, dtype="uint8").tobytes().decode()
    data = rows(20_000)
    for i, row in enumerate(data): row["messages"][1]["content"] = text[i:i + 10_000]
    pq.write_table(pa.Table.from_pylist(data), tmp_path / "rows.parquet", row_group_size=10_000)
    client = run_python(MEMORY, tmp_path / "rows.parquet", tmp_path / "train.jsonl")
    output = client.communicate(timeout=600)[0].decode()
    assert client.returncode == 0, output
    assert (tmp_path / "train.jsonl").stat().st_size > 200 << 20
    assert int(output.split()[-1]) < 150, f"{output.split()[-1]} MiB of memory for 200 MiB of lines"  # about 100


# ---- weights

def break_weights(folder, how):
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    if how == "a shard is missing": (folder / SHARD).unlink()
    if how == "a shard is short": (folder / SHARD).write_bytes((folder / SHARD).read_bytes()[:-1])
    if how == "a header is damaged": (folder / SHARD).write_bytes(b"\xff" * 8 + (folder / SHARD).read_bytes()[8:])
    if how == "a tensor is elsewhere": index["weight_map"]["norm"] = "model-00002-of-00002.safetensors"
    if how == "a tensor is nowhere": index["weight_map"]["ghost"] = SHARD
    if how == "a tensor is extra": index["weight_map"].pop("norm")
    if how == "the sum is wrong": index["metadata"]["total_size"] += 1
    if how == "a shard is outside": index["weight_map"]["norm"] = "../x.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("how, words", [
    ("a shard is missing", f"names {SHARD}, which is not there"), ("a shard is short", "no readable safetensors file"),
    ("a header is damaged", "no readable safetensors file"), ("a tensor is elsewhere", "the tensor norm is in"),
    ("a tensor is nowhere", "the tensor ghost is not in"), ("a tensor is extra", "the tensor norm is in"),
    ("the sum is wrong", "promises 4161 bytes of tensors|promises"), ("a shard is outside", "leaves the folder")])
def test_weights_that_do_not_fit_together(tmp_path, how, words):
    for name, body in model_repository().items():
        if "/" not in name: (tmp_path / name).write_bytes(body)
    assert check_weights(tmp_path)["tensors"] == 3
    break_weights(tmp_path, how)
    with pytest.raises(DownloadError, match=words): check_weights(tmp_path)


def test_repository_without_safetensors(hub, tmp_path):
    hub.repos["model", "ex/model"] = Repo({"config.json": b"{}", "pytorch_model.bin": b"pickle"})
    with pytest.raises(DownloadError, match="none of them model"): fetch(hub, tmp_path)


# ---- settings: hub, local, demo

def test_download_by_settings(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    settings = from_profile(tmp_path, max_rows=7)
    report = download(settings, margin=0)
    assert report["dataset"]["train"]["rows"] == 7 and len(settings.train_file.read_text().splitlines()) == 7
    assert (settings.model_dir / "config.json").is_file() and list((settings.data_dir / "raw").rglob("*.parquet"))
    hub.requests.clear()
    again = download(settings, margin=0)
    assert hub.requests == []
    assert again["model"]["fetched"] == again["dataset"]["fetched"] == []


def test_misspelt_dataset_is_seen_before_the_model_is_fetched(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    with pytest.raises(DownloadError, match="dataset ex/dta"): download(from_profile(tmp_path, dataset="ex/dta"))
    assert hub.bodies() == []


@pytest.mark.parametrize("read_only", [False, True])
def test_local_folders_are_used_in_place(tmp_path, read_only):
    model, data = tmp_path / "model", tmp_path / "data"
    model.mkdir(); data.mkdir()
    for name, body in model_repository().items():
        if "/" not in name: (model / name).write_bytes(body)
    (data / "b.parquet").write_bytes(parquet(rows(4)))
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    if read_only: data.chmod(0o555)
    settings = from_profile(tmp_path / "w", model=str(model), dataset=str(data), strictness="lenient")
    record = download(settings, margin=0)["dataset"]
    assert record["train"]["rows"] == 4 and record["train"]["paths"] == [str(data / "b.parquet")]
    assert not settings.workspace_dir.exists()
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before, "nothing is written beside a user's data"
    assert convert(settings).kept == 4 and {p.name for p in data.iterdir()} == {"b.parquet"}
    data.chmod(0o755)
    (model / SHARD).unlink()
    with pytest.raises(DownloadError, match="which is not there"): download(settings)


@pytest.mark.parametrize("content, words", [
    ("", "the file is empty"), ("\n \n", "only blank lines"), ("not json\n", "not JSON"),
    ('{"a": 1}\n', "no list `messages`"), (None, "no such")])
def test_bad_local_lines(tmp_path, content, words):
    path = tmp_path / "rows.jsonl"
    if content is not None: path.write_text(content)
    with pytest.raises(DownloadError, match=words): local.local_dataset(path)
    assert not [p for p in tmp_path.iterdir() if p != path]


def test_demo_has_the_same_layout_and_is_made_once(tmp_path):
    settings = load_settings("demo", workspace=str(tmp_path), demo_rows=400)
    first = download(settings, margin=0)
    stamps = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()}
    again = download(settings, margin=0)
    assert first["model"]["fetched"] and not again["model"]["fetched"] and not again["dataset"]["fetched"]
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()} == stamps
    assert len(settings.train_file.read_text().splitlines()) == 400
    assert read_manifest(settings.model_dir)["repo"] == "demo"
    (settings.model_dir / "config.json").unlink()
    assert download(settings, margin=0)["model"]["fetched"]


def test_unwritable_workspace(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    (tmp_path / "file").write_text("")
    with pytest.raises(DownloadError, match="(?s)Not a directory|File exists.*workspace"):
        download(from_profile(tmp_path / "file"))


# ---- which files: splits and configurations

def listed(*paths): return [{"path": path, "size": 1, "git_sha1": "0" * 40} for path in paths]


def chosen(paths, *more):
    return [f["path"] for f in choose_data_files(listed(*paths), *more) if f["path"].endswith(".parquet")]


@pytest.mark.parametrize("paths, wanted", [
    (["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet", "data/test-00000-of-00001.parquet"],
     [0, 1]),
    (["constraints/test-0.parquet", "constraints/train-0.parquet"], [1]),
    (["post-training/test-0.parquet", "post-training/train-0.parquet"], [1]),
    (["train.parquet", "latest.parquet", "validation.parquet"], [0]), (["a.parquet", "b.parquet"], [0, 1]),
    (["Train-1.parquet", "val-1.parquet"], [0]),
    (["train/0000.parquet", "test/0000.parquet"], [0]), (["data/train/a.parquet", "data/dev/a.parquet"], [0]),
    (["training_3.parquet", "eval.parquet"], [0]),
    (["default/partial-train/0000.parquet", "default/test/0000.parquet"], [0]),
    (["train_sft-00000-of-00001.parquet", "test_sft-00000-of-00001.parquet"], [0]),
    (["train-00000-of-00001-0123456789abcdef.parquet", "test-00000-of-00001-0123456789abcdef.parquet"], [0])])
def test_the_training_split_is_taken(paths, wanted): assert chosen(paths) == [paths[i] for i in wanted]


@pytest.mark.parametrize("paths, words", [
    (["train_sft-0.parquet", "train_gen-0.parquet"], "train_gen, train_sft.*dataset_split"),
    (["test.parquet", "validation.parquet"], "splits are test, validation"),
    (["constraints/test-0.parquet"], "splits are test"),
    (["en/train.parquet", "fr/train.parquet"], "configs are en, fr.*dataset_config"),
    (["post-training/test-0.parquet", "constraints/test-0.parquet"], "configs are"),
    (["eval/0.parquet"], "splits are test"), (["a.parquet", "test.parquet"], "say none")])
def test_a_choice_among_several_is_a_persons(paths, words):
    with pytest.raises(DownloadError, match=f"(?s){words}"): chosen(paths)


@pytest.mark.parametrize("names, missing", [
    (["train-00000-of-00003.parquet", "train-00002-of-00003.parquet"], "train-00001-of-00003"),
    (["train_1_of_2.jsonl"], "train_2_of_2"), (["data/train-00001-of-00002.parquet"], "00000-of-00002"),
    (["train-00000-of-00001.jsonl", "test-00000-of-00002.jsonl"], ""), (["a-1-of-2.jsonl", "a-2-of-2.jsonl"], "")])
def test_a_folder_that_lacks_a_file_of_a_series_is_not_taken_for_whole(tmp_path, names, missing):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    if not missing: assert len(input_files(tmp_path)) == len([name for name in names if "test" not in name])
    else:
        with pytest.raises(ConvertError, match=f"series are missing: .*{missing}"): input_files(tmp_path)


def test_the_settings_choose():
    paths = ["en/train_sft-0.parquet", "en/train_gen-0.parquet", "en/test-0.parquet", "fr/train-0.parquet"]
    assert chosen(paths, "fr") == paths[3:] and chosen(paths, "en", "test") == paths[2:3]
    assert chosen(paths, "en", "train_gen+train_sft") == [paths[1], paths[0]]
    for wrong in (("de",), ("en", "dev"), ("en", "train")):
        with pytest.raises(DownloadError, match="there is no (config|split)"): chosen(paths, *wrong)
    card = [{"config_name": "small", "data_files": "fr/*", "default": True},
            {"config_name": "big", "data_files": [{"split": "train", "path": ["en/train_*"]}]}]
    assert chosen(paths, None, None, card) == paths[3:] and chosen(paths, "big", None, card) == [paths[1], paths[0]]


def test_another_split_of_the_hub_is_another_download(tmp_path):
    files = {f"data/{split}-00000-of-00001.parquet": parquet(rows(n)) for split,
             n in (("train_sft", 3), ("train_gen", 4), ("test_sft", 5))}
    with HubServer({"ex/data": Repo(files, kind="dataset")}) as hub:
        options = dict(endpoint=hub.url, token=False, margin=0)
        with pytest.raises(DownloadError, match="dataset_split"): download_dataset("ex/data", tmp_path / "d", **options)
        for split, count in (("train_sft", 3), ("train_gen", 4), ("train_gen+train_sft", 7)):
            assert download_dataset("ex/data", tmp_path / "d", split=split, **options)["train"]["rows"] == count
        hub.requests.clear()
        assert download_dataset("ex/data", tmp_path / "d", split="train_gen+train_sft",
                                **options)["train"]["rows"] == 7 and not hub.requests
    one, two = (load_settings("qwen3_8b", workspace=str(tmp_path), dataset="ex/data",
                              dataset_split=split) for split in ("a", None))
    assert one.data_dir != two.data_dir and one.converted_dir != two.converted_dir


@pytest.mark.parametrize(
    "name",
    ["rows.jsonl", "rows.jsonl.gz", "rows.jsonl.zst", "rows.parquet", "own.v1.jsonl",
     "v1.5/train.jsonl", "v1.5/rows.jsonl.gz", "v1.5/a.parquet"])
@pytest.mark.parametrize("named", ["file", "folder"])
def test_local_data_of_every_ending_is_read_by_both_steps(tmp_path, name, named):
    import gzip
    import zstandard
    place = tmp_path / "v2.0" / name
    place.parent.mkdir(parents=True)
    text = ("\n \n" + "".join(json.dumps(row) + "\n" for row in rows(9))).encode()
    (place.parent.parent / "other.parquet").write_bytes(parquet(rows(2))) if name.startswith("v1.5") else None
    if name.endswith(".parquet"): place.write_bytes(parquet(rows(9)))
    else: place.write_bytes({".gz": gzip.compress, ".zst": zstandard.compress}.get(place.suffix, bytes)(text))
    before = {p: p.stat().st_mtime_ns for p in place.parent.rglob("*")}
    settings = load_settings("qwen3_8b", workspace=str(tmp_path / "w"),
                             dataset=str(place if named == "file" else place.parent), strictness="lenient", max_rows=5)
    from proxy_sft.data.local import dataset_job
    from contextlib import ExitStack
    with ExitStack() as stack: record = dataset_job(settings, stack, False, False, 0)[1]()
    assert record["train"]["paths"] == [str(place)] and convert(settings).rows == 5
    assert {p: p.stat().st_mtime_ns for p in place.parent.rglob("*")} == before


def test_a_local_folder_with_several_kinds_is_a_question(tmp_path):
    (tmp_path / "train.jsonl").write_text(json.dumps(rows(1)[0]) + "\n")
    (tmp_path / "test.jsonl").write_text("")
    (tmp_path / "dataset_infos.json").write_text("{}")
    assert local.local_dataset(tmp_path)["train"]["paths"] == [str(tmp_path / "train.jsonl")]
    (tmp_path / "train-00000-of-00001.parquet").write_bytes(parquet(rows(1)))
    with pytest.raises(DownloadError, match="lines and parquet files of one split"): local.local_dataset(tmp_path)
    (tmp_path / "train.jsonl").unlink()
    (tmp_path / "de").mkdir()
    (tmp_path / "de" / "train.parquet").write_bytes(parquet(rows(1)))
    with pytest.raises(DownloadError, match="configs are de, default.*\n.*dataset_config"):
        local.local_dataset(tmp_path)
    assert local.local_dataset(tmp_path, config="de")["train"]["rows"] == 1
