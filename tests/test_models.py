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


@pytest.mark.parametrize("lost, said", [(("lm_head.weight",), False),
                                        (("lm_head.weight", "model.embed_tokens.weight"), True)])
def test_a_weight_that_is_tied_is_not_missing(lost, said, monkeypatch):
    "A checkpoint holds tied weights once; no warning when it is loaded; weights that are gone are warned of."
    from transformers import LlamaConfig, LlamaForCausalLM, trainer

    from proxy_sft.training.trainer import ToolTrainer
    sizes = dict(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    model = LlamaForCausalLM(LlamaConfig(tie_word_embeddings=True, **sizes))
    weights = {name: weight for name, weight in model.state_dict().items() if name not in lost}
    loading = ToolTrainer.__new__(ToolTrainer)
    loading.model, words = model, []
    monkeypatch.setattr(trainer.logger, "warning", words.append)
    loading._issue_warnings_after_load(model.load_state_dict(weights, strict=False))
    assert bool(words) == said, words
