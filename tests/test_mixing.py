"""Several data sets in one training: amounts are met exactly, each data set stays what it is alone, and whatever cannot
be meant is refused before anything is prepared."""
import json
import re
import shlex
import shutil
from collections import Counter

import numpy as np
import pytest
import yaml
from transformers import AutoTokenizer

from proxy_sft.convert import convert
from proxy_sft.core.atomic_folders import file_hash
from proxy_sft.core.settings import command_line, load_settings, save_settings, SettingsError
from proxy_sft.data.ledger import row_facts
from proxy_sft.data.mixing import dataset_of_rows, ensure_mix, mix_of, wanted_rows
from proxy_sft.data.rows import ConvertError
from proxy_sft.demo.rows import write_demo_data
from proxy_sft.download import download
from proxy_sft.evaluation.answers import HeldoutTurn, Reply
from proxy_sft.evaluation.predictions import prepare_questions
from proxy_sft.evaluation.scores import judge, loss_rows
from proxy_sft.launch.parameters import split_parameters
from proxy_sft.launch.report import report_html
from proxy_sft.launch.status import run_snapshot, snapshot_text
from proxy_sft.pipeline import ensure_inputs, ensure_prepared
from proxy_sft.tokens.inputs import differences_of
from proxy_sft.tokens.blocks import sources_of
from proxy_sft.tokens.keys import cache_key, key_parts, PrepareError
from proxy_sft.training.checkpoints import checkpoint_facts, differences
from proxy_sft.training.doctor import check_data, matching
from proxy_sft.training.model_card import model_card
from proxy_sft.training.run import write_mix

SMALL = dict(max_length=1024, num_proc=1, demo_rows=200, max_eval_samples=None)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    "The demo beside another data set of demo rows, converted and prepared as three parts of one and one of the other."
    folder = tmp_path_factory.mktemp("mixing")
    write_demo_data(folder / "own", n=200, seed=7)
    settings = mixed(folder, [{"dataset": "demo", "share": 0.75}, {"dataset": str(folder / "own"), "share": 0.25}])
    return folder, settings, ensure_prepared(settings)


def mixed(folder, data, **given):
    return load_settings("demo", **{"workspace": str(folder / "workspace"), "data": data, **SMALL, **given})


def own(folder, **amount): return [{"dataset": "demo"}, {"dataset": str(folder / "own"), **amount}]


def lines_of(path): return path.read_bytes().splitlines(keepends=True)


def test_a_list_of_one_data_set_is_the_setting_dataset(world):
    folder, few = world[0], {"max_train_samples": 30, "max_eval_samples": 5}
    alone = load_settings("demo", **{"workspace": str(folder / "workspace"), **SMALL, **few})
    for amount in ({}, {"share": 1}, {"epochs": 1.0}):
        assert mixed(folder, [{"dataset": "demo", **amount}], **few) == alone
    for name in ("models", "data", "converted"): shutil.copytree(folder / "workspace" / name, folder / "alone" / name)
    elsewhere = mixed(folder, [{"dataset": "demo"}], workspace=str(folder / "alone"), **few)
    prepared = [ensure_prepared(settings) for settings in (alone, elsewhere)]
    one, two = ({path.name: file_hash(path) for path in p.folder.glob("*.arrow")} for p in prepared)
    assert one == two and {"train.arrow", "heldout.arrow"} <= {*one} and prepared[0].key == prepared[1].key
    assert "mix" not in prepared[0].manifest["key_parts"] and "by_dataset" not in prepared[0].splits["train"]


def test_each_data_set_stays_what_it_is_alone_and_its_rows_are_taken_unchanged(world):
    folder, settings, _ = world
    alone = [load_settings("demo", workspace=str(folder / "workspace"), dataset=one.dataset, **SMALL)
             for one in settings.parts]
    assert [one.converted_dir for one in alone] == [one.converted_dir for one in settings.parts]
    lines, at = lines_of(settings.converted_dir / "train.jsonl"), 0
    for one, part in zip(alone, mix_of(settings.converted_dir)):
        assert convert(one, progress=False).why == "nothing has changed since the last conversion"
        theirs = Counter(lines_of(one.converted_dir / "train.jsonl"))
        assert not Counter(lines[at:at + part["train"]]) - theirs
        at += part["train"]
    assert at == len(lines)
    names = [source.split(":")[0] for source in row_facts(settings.converted_dir / "train.jsonl")["source"].to_pylist()]
    assert Counter(names) == {part["name"]: part["train"] for part in mix_of(settings.converted_dir)}


def test_shares_are_met_and_recounted_by_rows_and_by_supervised_tokens(world):
    _, settings, prepared = world
    (demo, theirs), counted = mix_of(settings.converted_dir), prepared.splits["train"]["by_dataset"]
    assert demo["train"] == demo["of"] or theirs["train"] == theirs["of"]  # as large as it can be
    assert demo["train"] == 3 * theirs["train"]
    facts, rows = prepared.facts("train").to_pandas(), prepared.splits["train"]["rows"]
    for name, chosen in (("demo", facts.line < demo["train"]), ("own", facts.line >= demo["train"])):
        assert counted[name]["rows"] == chosen.sum()
        assert counted[name]["supervised_tokens"] == facts.used_supervised[chosen].sum() > 0
    labels = np.concatenate([np.asarray(block) for block in prepared.dataset("train")["labels"]])
    assert sum(one["supervised_tokens"] for one in counted.values()) == (labels != -100).sum()
    assert f"own: {theirs['train'] / rows:.1%} of the rows" in repr(prepared)


def test_every_place_tells_the_data_sets(world, tmp_path):
    folder, settings, prepared = world
    card = model_card(settings, prepared)
    assert "demo's dataset and a local dataset" in card and "`own`: 25.0% of the rows" in card
    hub = load_settings("qwen3_8b", workspace=str(folder / "workspace"), data=[
        {"dataset": "lab/one", "share": 0.5}, {"dataset": "allenai/Dolci-Instruct-SFT", "share": 0.5}])
    for one in hub.parts: one.data_dir.mkdir(parents=True, exist_ok=True)
    text = model_card(hub, prepared)
    assert yaml.safe_load(text.split("---\n")[1])["datasets"] == ["lab/one", "allenai/Dolci-Instruct-SFT"]
    assert "allenai/Dolci-Instruct-SFT: Dolci-Instruct-SFT is published by" in text
    (run := tmp_path / "run").mkdir()
    write_mix(run, prepared)
    text = snapshot_text(run_snapshot(run), 0)
    assert "data own" in text and "25.0% of the rows" in text
    save_settings(settings, run)
    page = report_html(run)
    assert "<h3>own</h3>" in page and "25.0%" in page and str(folder) not in page
    assert set(prepared.parity["by_dataset"]) == {"demo", "own"}
    counted = [one["counts"]["rows"] for one in prepared.parity["by_dataset"].values()]
    assert sum(counted) == prepared.parity["counts"]["rows"]


def test_held_out_rows_are_of_each_data_set_and_never_trained(world, tmp_path):
    folder, settings, prepared = world
    parts = mix_of(settings.converted_dir)
    assert all(part["heldout"] for part in parts)
    assert prepared.splits["heldout"]["rows"] == sum(part["heldout"] for part in parts)
    for most in (4, 8, 12, 20, 32):  # in equal numbers, not by chance
        few = sources_of(mixed(folder, settings.data, max_eval_samples=most))["heldout"]
        assert {own.sum() for _, own in dataset_of_rows(few.path, few.chosen)} == {most // 2}
    most = parts[1]["heldout"] * 2 + 2  # more than the smaller one has
    few = sources_of(mixed(folder, settings.data, max_eval_samples=most))["heldout"]
    assert sorted(own.sum() for _, own in dataset_of_rows(few.path, few.chosen)) == [most // 2 - 1, most // 2 + 1]
    # the same conversations under another name: what is held out of one is trained by none
    shutil.copytree(folder / "own", tmp_path / "copy")
    twins = mixed(folder, [{"dataset": str(folder / "own")}, {"dataset": str(tmp_path / "copy")}], heldout_fraction=0.3,
                  heldout_tools=[])
    convert(twins, progress=False)
    train, heldout = ({*lines_of(twins.converted_dir / f"{side}.jsonl")} for side in ("train", "heldout"))
    assert train and heldout and not train & heldout


def test_the_same_settings_give_the_same_bytes_and_another_split_other_rows(world):
    folder, settings, _ = world
    data = own(folder, rows=20)
    one, two, other = (mixed(folder, data, workspace=str(folder / name), split_seed=seed)
                       for name, seed in (("workspace", 42), ("again", 42), ("workspace", 43)))
    for settings in (one, two, other): ensure_inputs(settings)
    files = [lines_of(settings.converted_dir / "train.jsonl") for settings in (one, two, other)]
    assert files[0] == files[1] and files[0] != files[2]
    more = mixed(folder, own(folder, rows=30))
    ensure_inputs(more)
    assert not Counter(files[0]) - Counter(lines_of(more.converted_dir / "train.jsonl"))  # a choice only grows


@pytest.mark.parametrize("listed", [False, True])
def test_another_seed_trains_otherwise_on_the_same_split_and_another_split_is_another(world, tmp_path, listed):
    "What goes in and what is asked hang on `split_seed` alone: alone and in a mix."
    folder = world[0]
    data = {"data": own(folder, rows=40)} if listed else {"dataset": str(folder / "own"), "data": None}
    def of(**given):
        few = {"max_eval_samples": 5, "max_train_samples": 30, "heldout_fraction": 0.2, "heldout_tools": 0.1}
        return mixed(folder, **{"workspace": str(tmp_path), **few, **data, **given})
    def asked(settings):
        tokenizer = AutoTokenizer.from_pretrained(settings.model_dir)
        questions = prepare_questions(settings, tokenizer, 4, 4, 16, batching={})[0]
        return questions.turns, questions.prompts, questions.chats
    def rows(settings): return {side: source.chosen.tolist() for side, source in sources_of(settings).items()}
    one, other, split = of(), of(seed=7), of(split_seed=7)
    ensure_inputs(one)
    assert one.converted_dir == other.converted_dir != split.converted_dir and differences_of(other, made=True) == []
    assert rows(one)["heldout"] == rows(other)["heldout"] and rows(one)["train"] != rows(other)["train"]
    assert asked(one) == asked(other)
    ensure_inputs(split)
    sides = [{*lines_of(settings.converted_dir / "heldout.jsonl")} for settings in (one, split)]
    assert sides[0] - sides[1] and sides[1] - sides[0] and asked(one) != asked(split)


@pytest.mark.parametrize("data, expected", [
    ([{"dataset": "demo", "share": 0.5}, {"dataset": "./own", "share": 0.6}], "sum to 1.1 .*entry 2.*expected 1"),
    ([{"dataset": "demo", "share": 0.5}, {"dataset": "./own", "share": 0.4}], "sum to 0.9 .*entry 1.*expected 1"),
    ([{"dataset": "demo"}, {"dataset": "./own", "share": 1.0}], "shares sum to 1 .*leave nothing.*less than 1"),
    ([{"dataset": "demo", "rows": 5, "share": 0.5}, {"dataset": "./own"}], "entry 1.*share and rows.*expected one of"),
    ([{"dataset": "demo"}, {"dataset": "./own", "epochs": 2, "rows": 5}], "entry 2.*rows and epochs"),
    ([{"dataset": "demo"}, {"dataset": "./own", "shar": 0.5}], "entry 2.*'shar'; 'share' is near. Expected data"),
    ([{"dataset": "demo"}, {"dataset": "./own"}, {"dataset": "./b/../own", "rows": 3}], "entry 3.*entry 2.*each once"),
    ([{"dataset": "demo"}, {"dataset": "demo"}], "entry 2.*entry 1"),
    ([{"dataset": "demo"}, {"dataset": "./own", "share": 1.5}], "entry 2.*share is 1.5.*less than or equal to 1"),
    ([{"dataset": "demo"}, {"dataset": "./own", "rows": 0}], "entry 2.*rows is 0"),
    ([{"dataset": "demo"}, {"dataset": "./own", "rows": 2.5}], "entry 2.*rows is 2.5"),
    ([{"dataset": "demo"}, {"dataset": "./own", "epochs": float("nan")}], "entry 2.*epochs"),
    ([{"dataset": "demo"}, {"share": 0.5}], "entry 2.*dataset is missing"),
    ([{"dataset": "demo"}, "./own"], "entry 2 of data is './own'"),
    ([{"dataset": "demo"}, {"dataset": "./own", "split": 3}], "entry 2.*split is 3"),
    ([], "empty list"),
    ("demo", "valid list"),
    ({"dataset": "demo"}, "valid list"),
])
def test_a_list_that_cannot_be_meant_names_the_entry(data, expected):
    with pytest.raises(SettingsError, match=f"(?s)'data' in the overrides.*{expected}"):
        load_settings("demo", data=data)


def test_no_setting_beside_the_list_goes_without_effect():
    data = [{"dataset": "demo"}, {"dataset": "./own"}]
    for name in ("dataset_split", "dataset_config"):
        for some in (data, data[:1]):
            with pytest.raises(SettingsError, match=f"{name} is 'x' beside a list"):
                load_settings("demo", data=some, **{name: "x"})
    with pytest.raises(SettingsError, match="'dataset'.*they also have a list"):
        load_settings("demo", data=data, dataset="./x")
    with pytest.raises(SettingsError, match="profile 'own_data' has a list"): load_settings("own_data", dataset="./x")
    assert load_settings("own_data", dataset="./x", data="null").dataset == "./x"


@pytest.mark.parametrize("data, expected", [
    (lambda f: own(f, rows=5000), "ntry 2 of data.*training conversations; rows: 5000 needs 5,000.*epochs: "),
    (lambda f: own(f, share=0.9), "ntry 2 of data.*share: 0.9 needs"),
    (lambda f: own(f, epochs=0.0001), "ntry 2 of data.*takes none of them"),
    (lambda f: own(f, split="dev"), "no split 'dev'; the splits are train"),
    (lambda f: [{"dataset": "demo"}, {"dataset": str(f / "own/train.jsonl"), "split": "dev"}], "one file and has no"),
    (lambda f: [{"dataset": "demo"}, {"dataset": str(f / "gone")}], "gone"),
])
def test_what_the_data_do_not_have_is_refused_before_anything_is_prepared_and_by_the_doctor(world, data, expected):
    folder, _, _ = world
    settings = mixed(folder, data(folder))
    before = sorted(settings.prepared_dir.iterdir())
    found = check_data(settings, *matching(settings))
    assert found.level in ("fail", "warn")
    with pytest.raises(Exception, match=f"(?s){expected}"): ensure_prepared(settings)
    assert sorted(settings.prepared_dir.iterdir()) == before and not (settings.converted_dir / "train.jsonl").exists()
    assert re.search(f"(?s){expected}", found.text), found.text


def test_amounts():
    def count(*data, of=(400, 100)):
        return wanted_rows([{"dataset": str(i), **one} for i, one in enumerate(data)], [*of])
    assert count({"share": 0.9}, {"share": 0.1}) == [400, 44] and count({}, {}) == [400, 100]
    assert count({}, {"share": 0.1}) == [400, 44] and count({"rows": 30}, {"epochs": 2.5}) == [30, 250]
    assert count({"rows": 30}, {"share": 0.25}) == [30, 10] and count({"epochs": 0.5}, {}) == [200, 100]
    with pytest.raises(ConvertError, match="entry 1 of data .0. has 0"): count({}, {}, of=(0, 5))


def test_a_changed_list_or_share_is_other_data_and_a_resume_says_so(world):
    folder, settings, prepared = world
    then = checkpoint_facts(settings, prepared.key, 1)
    for data in (own(folder, rows=20), [{"dataset": "demo", "rows": 100}, settings.data[1]]):
        other = mixed(folder, data)
        ensure_inputs(other)
        key = cache_key(key_parts(other))
        assert key != prepared.key == cache_key(key_parts(settings)) and other.converted_dir != settings.converted_dir
        found = differences(then, checkpoint_facts(other, key, 1))
        assert [line.split(":")[0] for line in found] == ["data", "data_key"] and repr(data) in found[0]
    alone = load_settings("demo", workspace=str(folder / "workspace"), **SMALL)
    assert any(line.startswith("data: [") for line in differences(then, checkpoint_facts(alone, "x", 1)))


def test_a_changed_data_set_is_refused_by_its_entry_until_it_is_converted_and_then_mixed_anew(world, tmp_path):
    folder, _, _ = world
    shutil.copytree(folder / "own", tmp_path / "own")
    settings = mixed(tmp_path, [{"dataset": str(folder / "own")}, {"dataset": str(tmp_path / "own"), "rows": 20}],
                     model=str(folder / "workspace" / "models" / "demo"))
    assert differences_of(settings)[0].page == "nbs/01_convert.ipynb"
    convert(settings, progress=False)
    assert differences_of(settings, made=True) == []
    path = tmp_path / "own" / "train.jsonl"
    path.write_bytes(path.read_bytes().replace(b"weather", b"Weather"))
    with pytest.raises(PrepareError, match="Entry 2 of data.*other rows than were converted.*-y 'data: "):
        ensure_inputs(settings)
    [difference] = differences_of(settings)
    _, _, given = split_parameters(shlex.split(difference.command)[1:])
    assert load_settings(given.pop("profile"), **given).data == settings.data
    before = file_hash(settings.converted_dir / "train.jsonl")
    convert(settings.parts[1], progress=False)
    assert "have changed since they were mixed" in differences_of(settings, made=True)[0].lines[0]
    assert differences_of(settings) == []  # the mix is made by whoever prepares
    ensure_inputs(settings)
    assert differences_of(settings, made=True) == [] and file_hash(settings.converted_dir / "train.jsonl") != before


@pytest.mark.parametrize("name", ["train.jsonl", "heldout.jsonl", "train.rows.parquet", "report.json"])
def test_a_damaged_mix_is_noticed_and_made_again(world, name):
    folder, _, _ = world
    settings = mixed(folder, own(folder, rows=15))
    ensure_inputs(settings)
    path = settings.converted_dir / name
    whole = path.read_bytes()
    path.write_bytes(whole[:-9] + b"X" + whole[-8:])
    assert differences_of(settings, made=True) and not differences_of(settings)
    assert ensure_mix(settings).why.startswith("mixed: ")
    assert differences_of(settings, made=True) == []
    assert json.loads(path.read_text()) == json.loads(whole) if name == "report.json" else path.read_bytes() == whole


def test_the_command_line_a_profile_and_yaml_say_the_same(world, tmp_path):
    folder, settings, _ = world
    _, _, given = split_parameters(shlex.split(command_line(settings, "02_train"))[1:])
    profile = tmp_path / "mine.yaml"
    profile.write_text(yaml.safe_dump({"extends": "demo", "data": settings.data}))
    assert load_settings(given.pop("profile"), **given).data == settings.data == load_settings(str(profile)).data
    assert mixed(folder, [{"share": "75e-2", "dataset": "demo"}, settings.data[1]]).data == settings.data
    written = yaml.safe_load(save_settings(settings, tmp_path).read_text())
    assert written["data"] == settings.data


def test_the_download_brings_every_data_set_and_names_each(world):
    folder, settings, _ = world
    report = download(settings)
    assert list(report) == ["model", "dataset demo", "dataset own"] and report["dataset demo"]["train"]["rows"] == 200


def test_losses_of_answers_are_told_by_data_set():
    "Planted losses: each data set's mean over its tokens, and none of the other's."
    ask = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    turns = [HeldoutTurn(i, 1, ask, [], source=source) for i, source in enumerate(["demo: x", "own", "own"])]
    losses = {"base": [(8.0, 4), (3.0, 1), (3.0, 2)], "tuned": [(4.0, 4), (1.0, 1), (5.0, 2)]}
    replies = {name: [Reply("Hello", True, 2)] * 3 for name in losses}
    found = {row[0]: row[2:] for row in loss_rows(judge(turns, replies, losses=losses))}
    assert [cell.split()[0] for cell in found["answer loss: own"]] == ["2.000", "2.000", "+0.000"]
    assert [cell.split()[0] for cell in found["answer loss: demo: x"]] == ["2.000", "1.000", "-1.000"]
    alone = judge(turns[1:], {n: r[1:] for n, r in replies.items()}, losses={n: v[1:] for n, v in losses.items()})
    assert not [row for row in loss_rows(alone) if row[0].startswith("answer loss")]
