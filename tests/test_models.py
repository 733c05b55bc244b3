"""A model of another family than Qwen3 through the whole chain: parity, doctor, training, resume, adapter, merge,
reload."""

import pytest
from long_form import soak
from model_families import FAMILIES, STEPS, try_family

SHORT = ("Llama, tied embeddings",)


@pytest.mark.parametrize("family", [
    *SHORT, *(pytest.param(name, marks=soak) for name in FAMILIES if name not in SHORT)])
def test_a_family_goes_through_the_whole_chain(family, tmp_path):
    assert try_family(family, tmp_path) == dict.fromkeys(STEPS, "")
