"""What only a GPU runs, as far as it can be run without one: tensors without content, kernels with the refusals of the
real ones, and the signatures of packages that may be installed."""
import inspect
import json
import shutil
import sys
from contextlib import nullcontext

import pytest
import torch
import transformers.modeling_flash_attention_utils as flash
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen3Config, Qwen3ForCausalLM
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from proxy_sft.training.attention import block, VARLEN
from proxy_sft.training.cost import PACKAGES
from proxy_sft.training.model import LIGER, optimizer_arguments
from proxy_sft.core.settings import load_settings
from proxy_sft.train import train
from test_train import rows_apart, slopes_apart
from trainings import logged, run_training, TINY

COLLATE = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
BLOCK = block([[(7 * i + n) % 256 for i in range(n)] for n in (24, 31, 17)], COLLATE)


# ---- shapes and precisions

class Kernels(TorchDispatchMode):
    "What PyTorch's kernel for packed rows was given."
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.torch_attn._varlen_attn.default: self.calls.append(args)
        return function(*args, **(kwargs or {}))


def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
                           softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
                           alibi_slopes=None, deterministic=False, return_attn_probs=False, block_table=None):
    "flash-attention 2.8's parameters; the result has its shape."
    assert causal and dropout_p == 0 and window_size == (-1, -1)
    TAKEN.append((q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k))
    # the shape, and a way for gradients
    return (q.unflatten(1, (k.shape[1], -1)) + k[:, :, None] + v[:, :, None]).flatten(1, 2)


TAKEN = []


@pytest.fixture
def flash_attention(monkeypatch):
    "flash-attention, as far as transformers asks it."
    TAKEN.clear()
    for name, value in (
        ("_loaded_implementation", "flash_attention_2"),
        ("_flash_fn", None),
        ("_flash_varlen_fn", flash_attn_varlen_func),
        ("_flash_with_kvcache_fn", None),
        ("_process_flash_kwargs_fn", flash._lazy_define_process_function(flash_attn_varlen_func)),
        ("_process_with_kvcache_kwargs_fn", dict),
    ):
        monkeypatch.setattr(flash, name, value, raising=False)  # older versions of transformers lack some


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [VARLEN, "flash_attention_2"])
def test_each_kernel_gets_what_it_takes(name, dtype, flash_attention):
    """Forwards and backwards, with Qwen3's width of heads, on tensors that have shapes and no content; weights of 32
    bits under autocast."""
    config = Qwen3Config(
        vocab_size=256,
        hidden_size=512,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=128,
    )
    with FakeTensorMode() as mode, Kernels() as seen:
        model = Qwen3ForCausalLM._from_config(config, dtype=dtype, attn_implementation="sdpa").train()
        model.config._attn_implementation = name
        batch = {n: mode.from_tensor(v) if torch.is_tensor(v) else v for n, v in BLOCK.items()}
        with torch.autocast("cpu", torch.bfloat16) if dtype == torch.float32 else nullcontext():
            logits = model(**{n: v for n, v in batch.items() if n != "labels"}, use_cache=False).logits
        logits.sum().backward()
    assert logits.shape == (1, 72, 256) and all(
        p.grad.shape == p.shape and p.grad.dtype == dtype for p in model.parameters()
    )
    calls = [call[:7] for call in seen.calls] + TAKEN
    assert len(calls) == 2  # one in each layer
    for query, key, value, ends, ends_k, longest, longest_k in calls:
        assert {t.dtype for t in (query, key, value)} == {torch.bfloat16} and all(
            t.stride(-1) == 1 for t in (query, key, value)
        )
        assert (query.shape, key.shape, value.shape) == ((72, 4, 128), (72, 2, 128), (72, 2, 128))
        assert ends.dtype == ends_k.dtype == torch.int32 and ends.is_contiguous() and ends.shape == ends_k.shape == (4,)
        assert type(longest) is type(longest_k) is int and longest == longest_k == 31


# ---- kernels that know 16 bits only

def train_with_the_gpus_kernel(settings):
    "PyTorch's kernel for packed rows, on the CPU, and with the real one's refusal of 32 bits."
    def forward(query, key, value, ends, ends_k, longest, longest_k, dropout, causal, debug, *, scale=None, **more):
        if query.dtype not in (torch.float16, torch.bfloat16):
            raise RuntimeError("FlashAttention only support fp16 and bf16 data type")
        empty = torch.empty(0)
        return rows_apart(query, key, value, ends, scale), torch.zeros(query.shape[1], len(query)), empty, empty, empty

    def backward(slope, query, key, value, out, sums, ends, *more, scale=None, **rest):
        made = [
            slopes_apart(*(t[a:b].float().transpose(0, 1) for t in (slope, query, key, value)), scale)
            for a, b in zip(ends.tolist(), ends.tolist()[1:])
        ]
        return tuple(torch.cat([part[i].transpose(0, 1) for part in made]).to(query.dtype) for i in range(3))

    library = torch.library.Library("aten", "IMPL")
    library.impl("_flash_attention_forward", forward, "CPU")
    library.impl("_flash_attention_backward", backward, "CPU")
    train(settings)


def test_weights_of_32_bits_are_trained_with_a_kernel_that_knows_16(tmp_path):
    "The proof must use the run's arithmetic, or a kernel for 16 bits is refused on every single GPU."
    given = dict(workspace=str(tmp_path), bf16=True)
    for name, more in (
        ("dense", {}),
        ("kernel", dict(attention=VARLEN, activation_checkpointing="selective", act=train_with_the_gpus_kernel)),
    ):
        done = run_training(**{**TINY, **given, "run_name": name, **more})
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert f"Attention: {VARLEN}, as the settings say. Checked: packed rows lose" in done.stdout
    assert logged(tmp_path / "runs" / "kernel") == pytest.approx(logged(tmp_path / "runs" / "dense"), rel=2e-2)


# ---- packages that may be installed

STAND_IN = '''import torch

class _AdamW(torch.optim.AdamW):
    "torchao 0.18's parameters; like there the learning rate is a tensor, and states have the precision of the weights."
    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2, amsgrad=False, *,
                 bf16_stochastic_round=False):
        super().__init__(params, torch.tensor(lr), betas, eps, weight_decay, amsgrad, foreach=False)
'''


def test_adamw_in_bfloat16_trains_and_goes_on(tmp_path, monkeypatch):
    "With torchao where it is installed, else with a stand-in of its interface."
    try: import torchao.optim  # noqa: F401 (is it there?)
    except ImportError:
        (tmp_path / "packages" / "torchao" / "optim").mkdir(parents=True)
        (tmp_path / "packages" / "torchao" / "__init__.py").write_text("")
        (tmp_path / "packages" / "torchao" / "optim" / "__init__.py").write_text(STAND_IN)
        monkeypatch.syspath_prepend(str(tmp_path / "packages"))
    settings = load_settings(
        **{
            **TINY,
            "workspace": str(tmp_path),
            "run_name": "half",
            "optimizer": "adamw_bf16",
            "bf16": True,
            "weights": "bfloat16",
            "preflight": "warn",
        }
    )
    train(settings)
    expected, run_dir = logged(tmp_path / "runs" / "half"), settings.run_dir
    assert len(expected) == 3 and expected[2] < expected[0]
    states = torch.load(run_dir / "checkpoint-2" / "optimizer.pt", weights_only=True)["state"].values()
    assert {s["exp_avg"].dtype for s in states} == {s["exp_avg_sq"].dtype for s in states} == {torch.bfloat16}
    shutil.rmtree(run_dir / "checkpoint-3")
    train(settings)
    assert logged(tmp_path / "runs" / "half") == pytest.approx(expected, rel=2e-2)


def test_our_words_fit_the_packages_that_are_installed():
    "Each call of an optional package, bound to its signature."
    bound = []
    if inspect.isclass(made := getattr(pytest.importorskip("bitsandbytes").optim, "AdamW", None)):
        inspect.signature(made).bind(
            [], lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0, optim_bits=8, is_paged=False
        )
        bound.append("bitsandbytes")
    try: from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN as liger
    except ImportError: liger = None
    if liger:
        # liger leaves out, without a word, what it does not know
        assert set(LIGER) <= set(inspect.signature(liger["qwen3"]).parameters)
        bound.append("liger")
    try: from torchao.optim import _AdamW  # noqa: F401 (is it there?)
    except ImportError: pass
    else:
        given = optimizer_arguments(
            load_settings("demo", optimizer="adamw_bf16", weights="bfloat16"),
            torch.bfloat16,
            torch.device("cpu"),
            False,
        )[1]
        inspect.signature(given[0]).bind([], **given[1])
        bound.append("torchao")
    assert "bitsandbytes" in bound and set(PACKAGES.values()) == {"bitsandbytes", "torchao"}


LIGER_STAND_IN = '''import torch

def _apply_liger_kernel_to_instance(model, **config):
    "Liger's entry, for layers of its own: every norm is counted, and computes in another way."
    assert config["rms_norm"] and not config["fused_linear_cross_entropy"]
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"): module.forward = norm_of(module)

CALLS = []

def norm_of(module):
    def forward(rows):
        CALLS.append(torch.is_grad_enabled())
        return torch.nn.functional.rms_norm(rows.float(), rows.shape[-1:], module.weight.float()).to(rows.dtype)
    return forward
'''


def prove_with_kernels(settings):
    "The proof of attention as `build_trainer` has it, on a trainer whose layers are to run with kernels."
    import liger_kernel.transformers as liger
    from proxy_sft.pipeline import ensure_prepared
    from proxy_sft.training.arguments import speed_record
    from proxy_sft.training.checkpoints import checkpoint_facts
    from proxy_sft.training.model import kernel_arguments
    from proxy_sft.training.run import start_processes
    from proxy_sft.training.trainer import build_trainer
    prepared = ensure_prepared(settings)
    start_processes(settings)
    trainer = build_trainer(settings, prepared, checkpoint_facts(settings, prepared.key, 1), resumed=True)
    assert not liger.CALLS
    with trainer.accelerator.autocast(): assert not torch.is_autocast_cache_enabled()
    for name, value in kernel_arguments("liger").items(): setattr(trainer.args, name, value)
    record = speed_record(trainer, settings)
    proved = [grad for grad in liger.CALLS]
    print(json.dumps({"kernels": record["kernels"], "proved": len(proved), "with_slopes": sum(proved)}))


def test_attention_is_proved_on_the_layers_that_train(tmp_path, monkeypatch):
    "The fused layers must be there when packed rows are compared, or something else is proved than is trained."
    home = tmp_path / "packages"
    for name, text in (("__init__.py", ""), ("transformers.py", LIGER_STAND_IN)):
        (home / "liger_kernel").mkdir(parents=True, exist_ok=True)
        (home / "liger_kernel" / name).write_text(text)
    (home / "liger_kernel-0.8.5.dist-info").mkdir()
    (home / "liger_kernel-0.8.5.dist-info" / "METADATA").write_text("Name: liger-kernel\nVersion: 0.8.5\n")
    done = run_training(**{**TINY, "workspace": str(tmp_path), "run_name": "proof", "bf16": True},
                        act=PathFirst(str(home), prove_with_kernels))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    # packed, three rows alone, joined, and once with slopes: each norm of the model every time
    assert found["kernels"] == "liger" and found["proved"] >= 6 and found["with_slopes"] > 0


class PathFirst:
    "An `act` of a training that finds packages in a folder."
    def __init__(self, folder, act): self.folder, self.act = folder, act

    def __call__(self, settings):
        sys.path.insert(0, self.folder)
        from transformers.utils import import_utils
        import_utils.is_liger_kernel_available.cache_clear()
        self.act(settings)


def test_the_rehearsals_tensors_are_ligers(monkeypatch):
    "Kept and made, to the byte, by Liger's own functions; their kernels, which need a GPU, are left out."
    norms = pytest.importorskip("liger_kernel.ops.rms_norm", exc_type=ImportError)
    from liger_kernel.ops import rope, swiglu

    from proxy_sft.training.cost import AllocationMeter
    from proxy_sft.training.fused_kernels import GateTensors, NormTensors, TurnTensors
    class Nothing:
        def __getitem__(self, grid): return lambda *args, **kwargs: None
    for module in (norms, rope, swiglu):
        for name in dir(module):
            if name.endswith(("_kernel", "_tiled", "_triton_rope")): monkeypatch.setattr(module, name, Nothing())

    def allocated(act, given):
        given = [t.clone().requires_grad_() * 1 for t in given]
        with AllocationMeter(given) as meter:
            before, out = meter.live, act(*given)
            after, out = meter.live, out if isinstance(out, tuple) else (out,)
            torch.autograd.backward(out, [torch.ones_like(one) for one in out])
        return after - before, meter.peak - before
    row, wide, head = torch.randn(1, 8, 64), torch.randn(1, 8, 128), torch.randn(1, 8, 2, 16).transpose(1, 2)
    turn = torch.randn(1, 8, 16)
    norm = lambda rows, weight: norms.LigerRMSNormFunction.apply(rows, weight, 1e-6, 0.0, "llama", True, None)
    for theirs, ours, given in ((norm, NormTensors.apply, (row, torch.ones(64))),
                                (swiglu.LigerSiLUMulFunction.apply, GateTensors.apply, (wide, wide)),
                                (rope.LigerRopeFunction.apply, TurnTensors.apply, (head, head, turn, turn))):
        assert allocated(theirs, given) == allocated(ours, given)
