"""Settings: layers, refusals, profiles, the tables that the docs show of them, what a command line writes, and
places."""
import re
import shlex
import subprocess
import sys

import hardware_table
import pytest
import settings_pages

from proxy_sft.launch.parameters import split_parameters
from proxy_sft.core.settings import (
    command_line, configs_dir, Conversion, load_settings, notebook_parameters, profile_names, save_settings,
    Settings, SettingsError
)


@pytest.mark.parametrize("tables", [settings_pages, hardware_table], ids=["settings", "hardware"])
@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_tables_are_those_of_the_code(tables, language):
    page = tables.PAGES[language]
    text = page.read_text(encoding="utf-8")
    assert tables.with_table(text, language) == text, "run make tables"
    assert "| `lora_rank` |" in text or "| 8 × H100 80 GB |" in text


def test_the_settings_page_shows_what_a_profile_uses():
    lines = settings_pages.settings_table().splitlines()
    row = next(line for line in lines if "`gradient_accumulation`" in line).split("|")
    assert [cell.strip(" `") for cell in row[2:5]] == ["32", "", "4"]
    assert sorted(settings_pages.PROFILES) == sorted(profile_names())


@pytest.mark.parametrize("name", profile_names())
def test_every_profile_loads_and_survives_being_saved(name, tmp_path):
    settings = load_settings(name)
    again = load_settings(str(save_settings(settings, tmp_path)))
    assert again.model_dump(exclude={"profile"}) == settings.model_dump(exclude={"profile"})


def test_layers_defaults_then_profile_then_overrides(tmp_path):
    (tmp_path / "mine.yaml").write_text("extends: demo\nmax_steps: 7\nlearning_rate: 1e-5\n")
    mine = load_settings(str(tmp_path / "mine.yaml"), save_steps=3, max_eval_samples="null", seed=None)
    assert (mine.max_steps, mine.learning_rate, mine.save_steps, mine.model, mine.max_eval_samples) == (
        7,
        1e-5,
        3,
        "demo",
        None,
    )
    assert mine.seed == Settings.model_fields["seed"].default


@pytest.mark.parametrize("content, words", [
    ("max_stepz: 3", "Did you mean 'max_steps'"), ("max_steps: 0", "greater than or equal to 1"),
    ("packing: 'yes please'", "valid boolean"),
    ("- a\n- b", "holds a list"), ("a: [", "not valid YAML"), ("extends: nothing", "no profile 'nothing'"),
    ("bf16: 1", "valid boolean"),
])
def test_profiles_that_cannot_be_read_are_refused_in_words(tmp_path, content, words):
    (tmp_path / "bad.yaml").write_text(content + "\n")
    with pytest.raises(SettingsError, match=words): load_settings(str(tmp_path / "bad.yaml"))


def test_a_notebooks_variables_are_settings_or_refused():
    assert notebook_parameters({"max_steps": 3, "profile": "demo", "_mine": 1, "os": __import__("os")}) == {
        "max_steps": 3,
        "profile": "demo",
    }
    with pytest.raises(SettingsError, match="Did you mean 'max_train_samples'"):
        notebook_parameters({"max_train_sample": 3})


def test_under_nbdev_test_the_default_is_the_demo(monkeypatch):
    monkeypatch.setenv("IN_TEST", "1")
    assert load_settings().is_demo
    monkeypatch.delenv("IN_TEST")
    assert load_settings().model == "Qwen/Qwen3-8B" and (configs_dir() / "demo.yaml").is_file()


# What a command line writes is read as it is meant, or the message shows the spelling that works

def from_command_line(*words):
    "Settings as papermill and `proxy-sft` hand them over."
    _, _, given = split_parameters(list(words))
    return load_settings(given.pop("profile", "demo"), **given)


@pytest.mark.parametrize("words, name, value", [
    ("-p packing false", "packing", False), ("-p packing False", "packing", False), ("-p bf16 TRUE", "bf16", True),
    ("-p report_to wandb", "report_to", ["wandb"]), ("-y 'report_to: [a, b]'", "report_to", ["a", "b"]),
    ("-p exclude_sources mine", "exclude_sources", ["mine"]),
    ("-p heldout_tools taxi.order", "heldout_tools", ["taxi.order"]),
    ("-p heldout_tools 0.2", "heldout_tools", 0.2), ("-r heldout_tools 0.2", "heldout_tools", 0.2),
    ("-p max_steps 1e3", "max_steps", 1000), ("-p epochs 1", "epochs", 1.0),
    ("-p learning_rate 1e-5", "learning_rate", 1e-5),
    ("-p shared_file_system true", "shared_file_system", "true"),
    ("-p shared_file_system True", "shared_file_system", "true"),
    ("-r run_name 20261127", "run_name", "20261127"), ("-y 'run_name: \"7\"'", "run_name", "7"),
    ("-p run_name 2026-11-27", "run_name", "2026-11-27"), ("-p max_train_samples null", "max_train_samples", None),
])
def test_values_of_a_command_line_are_read_as_meant(words, name, value):
    found = getattr(from_command_line(*shlex.split(words)), name)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize("words", [
    "-p run_name 20261127", "-p run_name 007", "-p output_dir 1e5", "-p template 3", "-p model 8", "-p resume True",
    "-p report_to tensorboard,wandb", "-p include_sources 'a, b'", "-p report_to '[a, b]'",
])
def test_a_value_of_another_type_is_refused_with_the_spelling_that_works(words):
    with pytest.raises(SettingsError) as raised: from_command_line(*shlex.split(words))
    option, name, value = shlex.split(words)
    spelled = shlex.split(re.search(r"`(-[ry] .*)` on the command line", str(raised.value))[1])
    assert getattr(from_command_line(*spelled), name)


@pytest.mark.parametrize("words, spelled", [
    ("packing no", "`-p packing false`"), ("bf16 1", "`-p bf16 true`"), ("report_to null", "report_to: []")])
def test_what_is_refused_shows_a_value_that_works(words, spelled):
    with pytest.raises(SettingsError, match=re.escape(spelled)): from_command_line("-p", *words.split())


@pytest.mark.parametrize("old, new", [
    ("certificate", "parity"), ("gradient_checkpointing", "activation_checkpointing")])
def test_old_names_are_refused_with_the_new_one(tmp_path, old, new):
    (tmp_path / "old.yaml").write_text(f"{old}: warn\n")
    for load in (lambda: load_settings("demo", **{old: "warn"}), lambda: load_settings(str(tmp_path / "old.yaml")),
                 lambda: notebook_parameters({old: "warn"})):
        with pytest.raises(SettingsError, match=f"{old}.*called '{new}' now"): load()


def test_a_printed_command_gives_the_same_settings():
    given = dict(
        profile="qwen3_8b_8gpu", strictness="strict", exclude_sources=["a, b", "it's", "1"], include_sources="null",
        dataset="./my data/x.jsonl", heldout_tools=["a.b"], run_name="007", max_eval_samples="null", packing=False,
        workspace="True", tool_chat_ratio=2.0, output_dir="1e5", template="null.jinja",
    )
    settings = load_settings(**given)
    words = shlex.split(command_line(settings, "01_convert"))
    assert words[:3] == ["papermill", "nbs/01_convert.ipynb", "out.ipynb"]
    assert from_command_line(*words[3:]).model_dump() == settings.model_dump()


# Where things lie

def test_relative_paths_are_the_repositorys_from_wherever_it_is_called(tmp_path):
    "In a process of its own: from another folder, nothing appears there, and DeepSpeed's configuration is found."
    code = ("from proxy_sft.core.settings import load_settings, deepspeed_file, repository_root\n"
            "s = load_settings('qwen3_8b_8gpu', dataset='./mine')\n"
            "print(repository_root(), s.run_dir, s.train_file, deepspeed_file(s), sep='\\n')")
    root = configs_dir().parent
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(p) for p in (
        root, root / "workspace/runs/qwen3_8b_8gpu", root / "mine/train.jsonl", root / "ds_config_zero2.json")]
    assert not list(tmp_path.iterdir())


def test_a_profile_is_found_from_the_repository_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_settings("configs/demo.yaml").is_demo
    (tmp_path / "own.yaml").write_text("extends: demo\nmax_steps: 7\n")
    assert load_settings("own.yaml").max_steps == 7


OTHER = dict(
    strictness="strict", tool_rows_only=True, tool_chat_ratio=1.0, include_sources=["a"], exclude_sources=["a"],
    drop_duplicates=True, heldout_fraction=0.4, heldout_tools=["a"], split_seed=7,
)


def test_no_two_inputs_share_a_folder_of_converted_rows(tmp_path):
    "Local paths that differ in any part, hub names with dots, and every choice of conversion."
    assert {*Conversion.model_fields} <= {*OTHER}
    names = ["/x/v1/train.jsonl", "/x/v2/train.jsonl", "/x/v1/train.jsonl.gz", "/x/tools.v1.jsonl", "/x/tools.v2.jsonl",
             "./dolci-v1.5", "./dolci-v1.6", "lab/mix-v0.5", "lab/mix-v1.0", "lab/mix-v1", "x/train", "./x/train"]
    all_settings = [load_settings("qwen3_8b", dataset=name) for name in names]
    all_settings += [load_settings("qwen3_8b", dataset="lab/mix-v1", **{n: v}) for n, v in OTHER.items()]
    folders = [settings.converted_dir for settings in all_settings]
    assert len({*folders}) == len(folders)
    assert load_settings("qwen3_8b").converted_dir.parts[-3:] == ("converted", "allenai", "Dolci-Instruct-SFT")
    for name in ("lab/mix-v0.5", "lab/mix.json"):  # a hub's name is never a file
        settings = load_settings("qwen3_8b", dataset=name, workspace=str(tmp_path))
        assert settings.train_file == tmp_path / "data" / name / "train.jsonl"
    (tmp_path / "rows.parquet").mkdir()  # a folder, whatever it is called
    assert load_settings("qwen3_8b", dataset=str(tmp_path / "rows.parquet")).data_dir == tmp_path / "rows.parquet"


def test_a_run_is_named_for_what_it_trains():
    name = lambda **given: load_settings("qwen3_8b", **given).run_dir.name
    assert [name(), name(max_train_samples=1000), name(max_train_samples=1000, run_name="mine")] == [
        "qwen3_8b", "qwen3_8b-1000", "mine"]
