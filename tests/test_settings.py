"""Settings: layers, refusals, profiles, and the tables that the docs show of them."""
import hardware_table
import pytest
import settings_pages

from proxy_sft.core.settings import (
    configs_dir, load_settings, notebook_parameters, profile_names, save_settings, Settings, SettingsError
)


@pytest.mark.parametrize("tables", [settings_pages, hardware_table], ids=["settings", "hardware"])
@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_tables_are_those_of_the_code(tables, language):
    page = tables.PAGES[language]
    text = page.read_text(encoding="utf-8")
    assert tables.with_table(text, language) == text, "run make tables"


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
