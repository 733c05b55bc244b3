"""`proxy-sft upload` against a hub on the loopback interface: what arrives, what does not, and what breaks on the
way."""
import shutil

import pytest
from upload_hub import UploadHub

from proxy_sft import commands
from proxy_sft.core.atomic_folders import publish
from proxy_sft.demo.model import write_demo_model
from proxy_sft.launch.upload import UploadError, upload

CARD = "---\nlicense: apache-2.0\nlibrary_name: transformers\n---\n# A model\n"
STATES = {"optimizer.pt": "states", "scheduler.pt": "states", "rng_state.pth": "states", "trainer_state.json": "{}",
          "steps.json": "{}",
          "settings.yaml": "model: /home/somebody/secret\n"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_demo_model(tmp_path_factory.mktemp("model") / "model", n=200)


@pytest.fixture()
def run(model, tmp_path):
    "A finished run as training leaves it."
    aside = tmp_path / ".aside"
    shutil.copytree(model, aside)
    (aside / "download.json").unlink(missing_ok=True)
    for name, text in {"README.md": CARD, **STATES}.items(): (aside / name).write_text(text)
    publish(aside, tmp_path / "mine", {"step": 8})
    (tmp_path / "mine" / "logs").mkdir()
    (tmp_path / "mine" / "logs" / "rank-0.log").write_text("a log")
    return tmp_path / "mine"


@pytest.fixture()
def hub(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "right")
    with UploadHub({}, tokens=("right",)) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        yield hub


def files_on(hub, name):
    repo = hub.repos["model", name]
    return repo.commits[repo.branches["main"]]


def test_the_model_arrives_and_nothing_else(hub, run):
    address = upload(run, "lab/mine", endpoint=hub.url)
    found = files_on(hub, "lab/mine")
    assert hub.repos["model", "lab/mine"].private and "/commit/" in address
    assert {"config.json", "tokenizer.json", "README.md"} <= found.keys()
    assert any(name.endswith(".safetensors") for name in found)
    for name, body in found.items():
        if name != ".gitattributes": assert body == (run / name).read_bytes(), name
    assert not found.keys() & {*STATES, "manifest.json", "COMPLETE", "logs/rank-0.log"}


def test_a_second_upload_sends_no_large_file_again_and_leaves_visibility_alone(hub, run):
    upload(run, "lab/mine", private=False, endpoint=hub.url)
    sent = sum(request["method"] == "PUT" for request in hub.requests)
    upload(run, "lab/mine", endpoint=hub.url)
    assert sent >= 1 and sum(request["method"] == "PUT" for request in hub.requests) == sent
    assert not hub.repos["model", "lab/mine"].private


def test_an_upload_that_broke_goes_on(hub, run):
    hub.broken_puts = 1
    with pytest.raises(UploadError): upload(run, "lab/mine", endpoint=hub.url)
    assert files_on(hub, "lab/mine") == {}
    upload(run, "lab/mine", endpoint=hub.url)
    assert "config.json" in files_on(hub, "lab/mine")


def test_other_bytes_on_the_hub_are_no_success(hub, run):
    hub.changes_a_byte = True
    with pytest.raises(UploadError, match="safetensors in lab/mine is not the file of"): upload(run, "lab/mine",
            endpoint=hub.url)


@pytest.mark.parametrize("change, words", [
    (lambda run: (run / "COMPLETE").unlink(), "Only a finished model is uploaded"),
    (lambda run: next(run.glob("*.safetensors")).write_bytes(b"x"), "is not what was written"),
    (lambda run: (run / "config.json").unlink(), "is not what was written"),
])
def test_what_is_not_whole_is_not_sent(hub, run, change, words):
    change(run)
    with pytest.raises(UploadError, match=words): upload(run, "lab/mine", endpoint=hub.url)
    assert not hub.repos


def test_refusals_of_the_hub_and_of_names(hub, run, monkeypatch, capsys):
    with pytest.raises(UploadError, match="is no name of a repository"): upload(run, "a/b/c", endpoint=hub.url)
    monkeypatch.setenv("HF_TOKEN", "wrong")
    with pytest.raises(UploadError, match=r"refused lab/mine \(40"): upload(run, "lab/mine", endpoint=hub.url)
    assert commands.main(["upload", str(run), "lab/mine", "--dry-run"]) == 0
    assert "config.json" in capsys.readouterr().out and not hub.repos
    assert commands.main(["upload", str(run.parent), "lab/mine"]) != 0
    assert len(capsys.readouterr().err.splitlines()) == 1
