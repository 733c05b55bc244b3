"""Refusals of atomic folders and checkpoints that no other test meets: the situation is made for real, and the words
say what was found."""
from pathlib import Path

from proxy_sft.core import atomic_folders
from proxy_sft.training import checkpoint_writer, checkpoints
import pytest
import torch
from transformers import TrainingArguments


from proxy_sft.core.settings import load_settings

FACTS = checkpoints.checkpoint_facts(load_settings("demo"), "key", 1)


def make(folder: Path, files=("model.safetensors",), **facts) -> Path:
    aside = folder.with_name(".aside")
    aside.mkdir(parents=True)
    for name in files:
        (aside / name).parent.mkdir(exist_ok=True)
        torch.save({"cpu": torch.get_rng_state()}, aside / name)
    atomic_folders.publish(aside, folder, facts)
    return folder


def test_atomic_folders(tmp_path):
    whole = make(tmp_path / "whole", step=1)
    (tmp_path / "again").mkdir()
    with pytest.raises(atomic_folders.AtomicFolderError, match="complete already"):
        atomic_folders.publish(tmp_path / "again", whole, {})
    with pytest.raises(atomic_folders.AtomicFolderError, match="is not complete: its marker COMPLETE"):
        atomic_folders.verify(tmp_path / "again")
    (whole / "link").symlink_to(whole / "model.safetensors")
    with pytest.raises(atomic_folders.AtomicFolderError, match="link is a link"): atomic_folders.verify(whole)


def test_checkpoints_that_are_not_gone_on_from(tmp_path):
    settings = load_settings("demo", output_dir=str(tmp_path))
    (tmp_path / "checkpoint-100").mkdir()
    with pytest.raises(checkpoints.CheckpointError, match="checkpoint-100 was not written by this project"):
        checkpoints.sweep(tmp_path)
    (tmp_path / "checkpoint-100").rmdir()
    make(tmp_path / "checkpoint-4", step=4)
    with pytest.raises(checkpoints.CheckpointError, match="does not tell settings, data_key, world_size"):
        checkpoints.checkpoint_to_resume(settings, FACTS)
    make(tmp_path / "checkpoint-5", **FACTS, step=5)
    with pytest.raises(checkpoints.CheckpointError, match="lacks rng_state.pth: without the random state"):
        checkpoints.checkpoint_to_resume(settings, FACTS)
    make(tmp_path / "checkpoint-6", ["rng_state.pth"], **FACTS, step=6)
    with pytest.raises(checkpoints.CheckpointError, match="data_key: 'key' then, 'other' now"):
        checkpoints.checkpoint_to_resume(settings, {**FACTS, "data_key": "other"})
    assert checkpoints.checkpoint_to_resume(settings, FACTS).name == "checkpoint-6"
    (tmp_path / "broken.pt").write_bytes(b"no pickle")
    with pytest.raises(checkpoints.CheckpointError, match="broken.pt cannot be read without running it"):
        checkpoints.refuse_acting_pickles(tmp_path)


def test_saves_that_lack_something(tmp_path):
    trainer = checkpoint_writer.CompleteCheckpoints()
    trainer.args = TrainingArguments(str(tmp_path / "out"), use_cpu=True, report_to=[])
    with pytest.raises(atomic_folders.AtomicFolderError, match="the weights were not written"):
        trainer._completed(tmp_path, "weights")
    (tmp_path / "model.safetensors").touch()
    assert trainer._completed(tmp_path, "weights") == tmp_path
    with pytest.raises(atomic_folders.AtomicFolderError, match="rng_state.pth was not written"):
        trainer._completed(tmp_path, "checkpoint")


def test_a_final_model_that_cannot_be_written(tmp_path):
    last = make(tmp_path / "checkpoint-8", step=8)
    (tmp_path / "model.safetensors").mkdir() # something is in the way
    with pytest.raises(
        checkpoints.CheckpointError, match="The final model could not be written.*checkpoint-8 is complete"
    ):
        checkpoint_writer.publish_final(last, tmp_path)
    assert not atomic_folders.is_complete(tmp_path) and atomic_folders.verify(last)
