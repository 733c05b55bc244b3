"""What a step takes from the step before is what these settings ask for, or is refused with the differences and the
command that mends them. Nothing is taken because of its name."""
import json
import os
import shlex
import shutil
from multiprocessing import get_context

import pytest
import yaml

from proxy_sft.convert import convert
from proxy_sft.core.atomic_folders import file_hash, is_complete, publish, with_checksum
from proxy_sft.core.settings import Conversion, load_settings
from proxy_sft.data.plans import read_manifest, write_manifest
from proxy_sft.data.rows import ConvertError
from proxy_sft.demo.rows import write_demo_data
from proxy_sft.launch.parameters import split_parameters
from proxy_sft.pipeline import ensure_downloaded, ensure_inputs, ensure_prepared
from proxy_sft.tokens import inputs
from proxy_sft.tokens.inputs import differences_of, heldout_differences
from proxy_sft.tokens.keys import PrepareError
from proxy_sft.tokens.preparation import check_folder, prepare, require_inputs
from proxy_sft.training.doctor import matching
from proxy_sft.training.model_card import model_card

SETTINGS = {  # every choice of conversion and download, another value than the default
    "strictness": "strict",
    "tool_rows_only": True,
    "tool_chat_ratio": 1.0,
    "include_sources": ["Demo"],
    "exclude_sources": ["Demo"],
    "drop_duplicates": True,
    "heldout_fraction": 0.4,
    "heldout_tools": ["taxi.order"],
    "split_seed": 7,
    "max_rows": 5,
    "dataset_revision": "v2",
    "model_revision": "v2",
}
SMALL = dict(max_length=1024, num_proc=1, bf16=False, device="cpu", demo_rows=200)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    "A workspace as downloads from a hub leave it: the demo's model and rows, with records that name a hub."
    workspace = tmp_path_factory.mktemp("inputs") / "workspace"
    demo = load_settings("demo", workspace=str(workspace), **SMALL)
    ensure_downloaded(demo)
    settings = hub_settings(workspace)
    settings.model_dir.parent.mkdir(parents=True)
    settings.data_dir.parent.mkdir(parents=True)
    demo.model_dir.rename(settings.model_dir)
    demo.data_dir.rename(settings.data_dir)
    record = {"revision": "main", "commit": "c" * 40, "license": "mit"}
    model = {**read_manifest(settings.model_dir), **record, "repo": "lab/model"}
    write_manifest(settings.model_dir, model)
    made = {"rows": 200, "from": {"files": [], "max_rows": None}, "blake3": file_hash(settings.train_file)}
    data = {**record, "repo": "lab/rows-v1.5", "kind": "dataset", "files": [], "train": made}
    write_manifest(settings.data_dir, data)
    convert(settings, progress=False)
    return workspace


def hub_settings(root, **given):
    return load_settings("qwen3_8b", **{
        "workspace": str(root), "model": "lab/model", "dataset": "lab/rows-v1.5", **SMALL, **given})


def test_what_was_made_from_these_settings_is_taken(world):
    assert differences_of(hub_settings(world)) == []
    for name in ("max_train_samples", "max_length", "learning_rate", "seed"):  # settings of later steps
        assert differences_of(hub_settings(world, **{name: 16})) == []
    assert differences_of(hub_settings(world, model_revision="c" * 40)) == []  # the commit that main is


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_of_an_earlier_step_is_refused_or_has_its_effect(world, name):
    "Given to training alone: the refusal names the page, and its command says the setting."
    assert {*Conversion.model_fields} <= {*SETTINGS}
    settings = hub_settings(world, **{name: SETTINGS[name]})
    with pytest.raises(PrepareError, match="Nothing was prepared") as raised: prepare(settings)
    [difference] = differences_of(settings)
    assert difference.command in str(raised.value)
    _, _, given = split_parameters(shlex.split(difference.command)[1:])
    found = getattr(load_settings(given.pop("profile", "qwen3_8b"), **given), name)
    assert found == SETTINGS[name]


@pytest.mark.parametrize("name", ["strictness", "heldout_fraction", "split_seed"])
def test_a_choice_that_was_changed_in_place_is_named(world, tmp_path, name):
    "The folder's name is right, the record in it says something else."
    workspace = shutil.copytree(world, tmp_path / "workspace")
    settings = hub_settings(workspace, **{name: SETTINGS[name]})
    shutil.copytree(hub_settings(workspace).converted_dir, settings.converted_dir)
    [difference] = differences_of(settings)
    assert difference.page == "nbs/01_convert.ipynb" and any(line.startswith(f"{name}: ") for line in difference.lines)


def change_rows(settings):
    "As many bytes as before, other rows."
    text = settings.train_file.read_bytes()
    settings.train_file.write_bytes(text.replace(b"weather", b"Weather", 1))


def change_converted(settings):
    path = settings.converted_dir / "train.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[1:]))


def change_heldout(settings): (settings.converted_dir / "heldout.jsonl").write_text("{}\n")
def lose_report(settings): (settings.converted_dir / "report.json").unlink()
def lose_rows(settings): settings.train_file.unlink()
def lose_model(settings): (settings.model_dir / "config.json").unlink()


def old_code(settings):
    path = settings.converted_dir / "report.json"
    path.write_text(json.dumps(with_checksum({**json.loads(path.read_text()), "code": "0" * 16})))


def other_repository(settings):
    write_manifest(settings.model_dir, {**read_manifest(settings.model_dir), "repo": "lab/other"})


def foreign_rows(settings): (settings.data_dir / "download.json").unlink()


def other_download(settings):
    "Another version of the rows was downloaded after the conversion."
    change_rows(settings)
    record = read_manifest(settings.data_dir)
    record["train"]["blake3"] = file_hash(settings.train_file)
    write_manifest(settings.data_dir, record)


def other_part(settings): write_manifest(settings.data_dir, {**read_manifest(settings.data_dir), "split": "train_gen"})


@pytest.mark.parametrize("change, page, words", [
    (change_rows, "00_download", "train.jsonl is not as it was downloaded"),
    (other_download, "01_convert", "other rows than were converted"),
    (other_part, "00_download", "dataset_split: train_gen when"),
    (change_converted, "01_convert", "train.jsonl is not as it was written"),
    (change_heldout, "01_convert", "heldout.jsonl is not as it was written"),
    (lose_report, "01_convert", "has no record"),
    (old_code, "01_convert", "code of the conversion has changed"),
    (lose_rows, "00_download", "rows-v1.5 is not there"),
    (lose_model, "00_download", "model is not there"),
    (other_repository, "00_download", "lab/other lies in"),
    (foreign_rows, "00_download", "has no record"),
], ids=lambda v: getattr(v, "__name__", ""))
def test_files_that_were_changed_are_refused(world, tmp_path, change, page, words):
    settings = hub_settings(shutil.copytree(world, tmp_path / "workspace"))
    assert differences_of(settings) == []
    change(settings)
    [difference] = differences_of(settings)
    assert difference.page == f"nbs/{page}.ipynb" and any(words in line for line in difference.lines)
    with pytest.raises(PrepareError, match=page): prepare(settings)


# Damages: every file of every folder, in every way; the next step notices

def flip(path, other, at):
    "One bit, at the time stamp that the file had."
    content, stat = bytearray(path.read_bytes()), path.stat()
    content[min(int(at * len(content)), len(content) - 1)] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


DAMAGES = {
    "first bit": lambda path, other: flip(path, other, 0),
    "a bit": lambda path, other: flip(path, other, 0.37),
    "a late bit": lambda path, other: flip(path, other, 0.98),
    "cut": lambda path, other: os.truncate(path, path.stat().st_size // 2),
    "last bytes": lambda path, other: os.truncate(path, max(path.stat().st_size - 2, 0)),
    "empty": lambda path, other: os.truncate(path, 0),
    "another's": lambda path, other: path.write_bytes(other),
    "deleted": lambda path, other: path.unlink(),
}


def unnoticed(folder, noticed):
    "The damages that nothing was said about; every file is put back."
    files, left = sorted(path for path in folder.iterdir() if path.is_file() and path.name[0] != "."), []
    assert files
    for path, beside in zip(files, files[1:] + files[:1]):
        content, stat = path.read_bytes(), path.stat()
        other = beside.read_bytes() if beside.read_bytes() != content else b"{}"
        for name, damage in DAMAGES.items():
            if not content and name != "deleted" and name != "another's": continue
            damage(path, other)
            inputs._content_hash.cache_clear()  # as another process has it
            if not noticed(): left.append((path.name, name))
            path.write_bytes(content)
            os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    inputs._content_hash.cache_clear()
    return left


def refused(step, error):
    "Whether a step ends in one clear error."
    try: step()
    except error as found: return len(str(found)) < 3000
    return False


@pytest.mark.filterwarnings("ignore:.*cannot be read")
def test_damages_of_what_was_downloaded_are_noticed(world, tmp_path):
    settings = hub_settings(shutil.copytree(world, tmp_path / "workspace"))
    for folder in (settings.model_dir, settings.data_dir):
        assert unnoticed(folder, lambda: refused(lambda: require_inputs(settings), PrepareError)) == []
    assert unnoticed(settings.data_dir, lambda: refused(lambda: convert(settings, progress=False), ConvertError)) == []
    assert differences_of(settings) == []


def test_damages_of_converted_rows_are_noticed(world, tmp_path):
    settings = hub_settings(shutil.copytree(world, tmp_path / "workspace"))
    assert unnoticed(settings.converted_dir, lambda: refused(lambda: require_inputs(settings), PrepareError)) == []
    assert differences_of(settings) == []
    for path in sorted(settings.converted_dir.iterdir()):  # and the conversion mends what it finds
        if not path.is_file() or path.name[0] == ".": continue
        flip(path, b"", 0.5)
        assert convert(settings, progress=False).why.startswith("converted")
        assert differences_of(settings) == []


def test_damages_of_prepared_data_are_noticed(world, tmp_path):
    settings = hub_settings(shutil.copytree(world, tmp_path / "workspace"))
    folder = prepare(settings).folder
    def noticed(): return not is_complete(folder) or refused(lambda: check_folder(folder), PrepareError)
    assert unnoticed(folder, noticed) == []
    content = (folder / "train.arrow").read_bytes()
    (folder / "manifest.json").write_text("{}")  # no complete folder: it is built again
    assert prepare(settings).folder == folder and (folder / "train.arrow").read_bytes() == content


# Several starts at once

FORKS = get_context("forkserver")
FORKS.set_forkserver_preload(["proxy_sft.pipeline"])  # imported once


def prepared_key(given):
    return ensure_prepared(load_settings("demo", **given)).key


def converted_rows(given):
    return convert(load_settings("qwen3_8b", **given), progress=False).kept


@pytest.mark.parametrize("step", [prepared_key, converted_rows], ids=["prepare", "convert"])
def test_three_at_once_on_an_empty_workspace(tmp_path, step):
    "Each makes what is missing, or waits for who does; none touches what another one is writing."
    given = dict(workspace=str(tmp_path / "workspace"), **SMALL)
    if step is converted_rows: given["dataset"] = str(write_demo_data(tmp_path / "own", n=2000))
    with FORKS.Pool(3) as pool: found = pool.map(step, [given] * 3, chunksize=1)
    assert len({*found}) == 1
    left = [path for path in (tmp_path / "workspace").rglob("*") if path.name.endswith(".part")]
    assert left == [] and not list((tmp_path / "workspace").glob("prepared/.building-*"))


def test_two_files_of_one_name_are_two_datasets(world, tmp_path):
    "v1 is converted, then v2, then v1 is prepared: v1's rows are trained; a third file is refused."
    given, trained = dict(model=str(hub_settings(world).model_dir), workspace=str(tmp_path / "workspace")), {}
    for number, name in enumerate(["v1/train.jsonl", "v2/train.jsonl", "tools.v1.jsonl", "tools.v2.jsonl"]):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_demo_data(tmp_path / "made", n=400, seed=number)
        (tmp_path / "made" / "train.jsonl").rename(tmp_path / name)
        convert(hub_settings(world, **given, dataset=str(tmp_path / name)), progress=False)
    for name in ("v1/train.jsonl", "v2/train.jsonl", "tools.v1.jsonl"):
        settings = hub_settings(world, **given, dataset=str(tmp_path / name))
        trained[name] = prepare(settings).manifest["key_parts"]["data/train.jsonl"]
        record = json.loads((settings.converted_dir / "report.json").read_text())
        assert [one["blake3"] for one in record["files"] if one["name"] == "train.jsonl"] == [trained[name]]
    assert len({*trained.values()}) == 3
    found = {name: matching(hub_settings(world, **given, dataset=str(tmp_path / name)))[0]
             for name in [*trained, "tools.v2.jsonl"]}
    assert found.pop("tools.v2.jsonl") is None  # the doctor does not take another's data for them
    assert {name: one.manifest["key_parts"]["data/train.jsonl"] for name, one in found.items()} == trained
    with pytest.raises(PrepareError, match="other.jsonl.* does not exist"):
        prepare(hub_settings(world, **given, dataset="/nowhere/other.jsonl"))


def test_the_demo_makes_again_what_was_made_from_something_else(tmp_path):
    given = dict(workspace=str(tmp_path), **SMALL)
    for more in ({}, dict(strictness="strict"), dict(heldout_fraction=0.4), dict(max_rows=180), {}):
        settings = load_settings("demo", **{**given, **more})
        ensure_inputs(settings)
        assert differences_of(settings) == []
        record = json.loads((settings.converted_dir / "report.json").read_text())
        for name in ("strictness", "heldout_fraction"): assert record["choices"][name] == getattr(settings, name)
        assert record["rows"] == (more.get("max_rows") or 200)


def test_only_the_rows_that_a_run_was_kept_from_are_asked(tmp_path):
    "Trained, then converted again with another share: some held-out rows had been trained."
    settings = load_settings("demo", workspace=str(tmp_path), **SMALL)
    prepared = ensure_prepared(settings)
    for name, facts in (("new", {"made_from": prepared.manifest["key_parts"]}), ("old", {})):
        (tmp_path / "aside").mkdir()
        publish(tmp_path / "aside", tmp_path / name, {**facts, "data_key": prepared.key, "step": 1})
        assert heldout_differences(settings, tmp_path / name) == []
    ensure_inputs(load_settings("demo", workspace=str(tmp_path), **{**SMALL, "heldout_fraction": 0.4}))
    for name in ("new", "old"): assert "is not the held-out file" in heldout_differences(settings, tmp_path / name)[0]
    ensure_inputs(settings)
    assert heldout_differences(settings, tmp_path / "new") == []


# The model card

@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return ensure_prepared(load_settings("demo", workspace=str(tmp_path_factory.mktemp("card")), **SMALL))


@pytest.mark.parametrize("name", ["data: own, v2 [a]", "a # b", "- x", "'", "x: |", "ü\u2028z", "*a", "null", "1e5"])
@pytest.mark.parametrize("form", ["./{}", "/x/{}/train.jsonl"])
def test_a_card_is_yaml_whatever_a_folder_is_called(world, prepared, name, form):
    run_name = name.replace("\u2028", " ")  # no line of its own in a run's name
    settings = hub_settings(world, dataset=form.format(name), model=form.format(name), run_name=run_name)
    card = model_card(settings, prepared)
    matter = yaml.safe_load(card.split("---\n")[1])
    assert set(matter) == {"library_name", "tags"} and "ODC-BY" not in card and "/x/" not in card
    assert f"# {settings.name}\n" in card


def test_a_card_says_what_is_known(world, prepared):
    settings = hub_settings(world)
    matter = yaml.safe_load(model_card(settings, prepared).split("---\n")[1])
    assert (matter["base_model"], matter["datasets"], matter["license"]) == ("lab/model", ["lab/rows-v1.5"], "mit")
    assert "ODC-BY" not in model_card(settings, prepared) and "its page states it: mit" in model_card(settings,
            prepared)
    dolci = hub_settings(world, dataset="allenai/Dolci-Instruct-SFT")
    assert "Allen Institute for AI under ODC-BY" in model_card(dolci, prepared)
