"""The embedded demo: same seed, same bytes; everything planted; a tokenizer and a model that load like Qwen3's."""
import hashlib
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from proxy_sft.data import policy
from proxy_sft.demo import model as demo_model
from proxy_sft.demo.cases import CASES
from proxy_sft.demo.conversations import KINDS
from proxy_sft.demo.rows import build_demo, DEMO_ROWS, DEMO_SEED, demo_plan, demo_rows, DUPLICATES, write_demo_data
from proxy_sft.demo.tokenizer import MARKUP_TOKENS, SPECIAL_TOKENS
from proxy_sft.demo.tools import UNSEEN_TOOLS

REAL = Path(__file__).resolve().parents[2] / "shared" / "qwen3-8b"
N, SEED = 400, 3


def digests(folder: Path) -> dict[str, str]:
    "File name -> hash of its bytes."
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    return demo_model.write_demo_model(tmp_path_factory.mktemp("demo") / "model", seed=SEED, n=N)


@pytest.fixture(scope="module")
def tokenizer(model_folder):
    return AutoTokenizer.from_pretrained(model_folder)


def test_rows_have_dolci_columns_and_the_plan_their_order():
    rows, plan = demo_rows(N, SEED), demo_plan(N, SEED)
    assert len(rows) == len(plan) == N and [r["id"] for r in rows] == [p["id"] for p in plan]
    assert len({r["id"] for r in rows}) == N
    for row in rows:
        assert list(row) == ["id", "messages", "source_dataset", "domain"]
        for message in row["messages"]:
            assert list(message) == ["content", "function_calls", "functions", "role"]
            assert all(value is None or isinstance(value, str) for value in message.values())
            assert message["role"] in ("system", "user", "assistant", "environment")
    assert {(r["source_dataset"] == "Dolci Instruct Tool Use") == (r["domain"] == "Tool Use") for r in rows} == {True}


@pytest.mark.parametrize("n, seed", [(N, SEED), (DEMO_ROWS, DEMO_SEED)])
def test_everything_is_planted_in_its_number(n, seed):
    planted = Counter(p["planted"] for p in demo_plan(n, seed))
    for name, case in CASES.items(): assert planted.pop(name) == case.copies, name
    assert planted.pop("duplicate_row") == DUPLICATES
    assert set(planted) == {*KINDS, "chat"} and sum(planted.values()) > n // 3


def test_plan_speaks_the_policy_table():
    for name, case in CASES.items():
        assert case.outcome in ("kept", "repaired", "rejected"), name
        if case.outcome != "kept": assert case.reason in policy.REASONS, (name, case.reason)


def test_conversations_differ_except_for_the_planted_duplicates():
    rows, plan = build_demo(DEMO_ROWS, DEMO_SEED)
    seen = Counter(json.dumps(row["messages"]) for row in rows)
    assert Counter(seen.values()) == {1: len(rows) - 2 * DUPLICATES, 2: DUPLICATES}
    assert [p["planted"] for p in plan[-DUPLICATES:]] == ["duplicate_row"] * DUPLICATES


def test_unseen_tools_are_in_their_rows_only():
    rows, plan = build_demo(DEMO_ROWS, DEMO_SEED)
    unseen = tuple(f'"{tool.name}"' for tool in UNSEEN_TOOLS)
    for row, planned in zip(rows, plan):
        lists = " ".join(m["functions"] or "" for m in row["messages"])
        assert any(name in lists for name in unseen) == (planned["planted"] == "unseen_tool"), row["id"]


def test_too_few_rows_are_refused():
    with pytest.raises(ValueError, match="at least"): demo_rows(20)


def test_same_seed_same_bytes_in_another_process(tmp_path, model_folder):
    here = tmp_path / "here"
    write_demo_data(here, N, SEED)
    before = digests(here)
    write_demo_data(here, N, SEED)
    code = (
        "from proxy_sft.demo.rows import write_demo_data; from proxy_sft.demo.model import write_demo_model; "
        f"write_demo_data({str(tmp_path / 'there')!r}, {N}, {SEED});"
        f"write_demo_model({str(tmp_path / 'model')!r}, seed={SEED}, n={N})"
    )
    subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        env={
            "PYTHONHASHSEED": "7",
            "PATH": "",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(Path(demo_model.__file__).parents[2]),
        },
    )
    assert digests(here) == before == digests(tmp_path / "there") and list(before) == ["train.jsonl"]
    assert digests(model_folder) == digests(tmp_path / "model")
    assert write_demo_data(tmp_path / "other", N, SEED + 1).read_bytes() != (here / "train.jsonl").read_bytes()


def test_lines_are_rows(tmp_path):
    text = write_demo_data(tmp_path, N, SEED).read_bytes()
    assert text.endswith(b"}\n") and b"\r" not in text
    assert [json.loads(line) for line in text.decode("utf-8").split("\n")[:-1]] == demo_rows(N, SEED)


def test_model_folder_looks_like_the_hub(model_folder):
    index = json.loads((model_folder / "model.safetensors.index.json").read_text())
    shards = set(index["weight_map"].values())
    assert len(shards) == 2 and all((model_folder / shard).is_file() for shard in shards)
    for name in (
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.json",
        "merges.txt",
    ):
        assert (model_folder / name).is_file(), name
    assert not list(model_folder.parent.glob(".*.part")) and not list(model_folder.parent.glob("*.old"))


def test_tokenizer_is_fast_and_round_trips(tokenizer):
    assert tokenizer.is_fast and type(tokenizer).__name__.startswith("Qwen2Tokenizer")
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token) == ("<|im_end|>", "<|endoftext|>", None)
    for row in demo_rows(N, SEED)[:150]:
        for message in row["messages"]:
            text = message["content"] or ""
            assert tokenizer.decode(tokenizer.encode(text)) == text


def test_added_tokens_are_single_ids_and_special_as_in_qwen3(tokenizer):
    for token in (*SPECIAL_TOKENS, *MARKUP_TOKENS):
        ids = tokenizer.encode(token)
        assert len(ids) == 1 and tokenizer.decode(ids, skip_special_tokens=True) == (
            "" if token in SPECIAL_TOKENS else token
        )


def test_tokenizer_behaves_as_the_real_one(tokenizer, model_folder):
    if not REAL.is_dir(): pytest.skip("the real Qwen3 tokenizer is not there")
    real = AutoTokenizer.from_pretrained(REAL)
    assert type(real) is type(tokenizer) and real.chat_template == tokenizer.chat_template
    assert real.special_tokens_map == tokenizer.special_tokens_map
    ours, theirs = (json.loads((folder / "tokenizer.json").read_text()) for folder in (model_folder, REAL))
    for key in ("normalizer", "pre_tokenizer", "post_processor", "decoder"): assert ours[key] == theirs[key], key
    flags = lambda state: [{k: v for k, v in token.items() if k != "id"} for token in state["added_tokens"]]
    assert flags(ours) == flags(theirs)
    text = "\n\nIt's 1234,  <|im_start|>x<think>\tÉ́ 数据\r\n"
    assert real.decode(real.encode(text)) == tokenizer.decode(tokenizer.encode(text))


def test_model_loads_generates_and_agrees_with_its_tokenizer(model_folder, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    assert type(model).__name__ == "Qwen3ForCausalLM" and model.config.vocab_size >= len(tokenizer)
    assert model.generation_config.eos_token_id == [tokenizer.eos_token_id, tokenizer.pad_token_id]
    ids = tokenizer("Please tell me the weather in Paris.", return_tensors="pt")
    out = model.generate(**ids, do_sample=False, max_new_tokens=8)
    assert out.shape[1] > ids["input_ids"].shape[1]


def test_the_head_start_looks_at_values_of_the_named_kind_and_calls_nothing(model_folder, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(model_folder, attn_implementation="eager")
    said = ("<|im_start|>user\nAdd a lunch on Monday at 3, call Emil, and play music by Verdi in the "
            "garage.<|im_end|>\n<|im_start|>assistant\n")
    for name, value in {
        "title": " lunch",
        "day": " Monday",
        "person": " Emil",
        "artist": " Verdi",
        "room": " garage",
    }.items():
        ids = tokenizer(said + '<tool_call>\n{"arguments": {"' + name + '": "', return_tensors="pt")["input_ids"]
        with torch.no_grad(): looks = model(input_ids=ids, output_attentions=True).attentions[1][0, :6, -1]
        assert {tokenizer.decode(ids[0, place]) for place in looks.argmax(1)} == {value}, name
    ids = tokenizer(said, return_tensors="pt")["input_ids"]
    assert "<tool_call>" not in tokenizer.decode(
        model.generate(ids, do_sample=False, max_new_tokens=30)[0, ids.shape[1] :]
    )


def test_building_leaves_the_random_state_alone(tokenizer):
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    demo_model.build_demo_model(tokenizer)
    assert torch.equal(torch.rand(3), expected)


def test_a_folder_is_replaced_whole(tmp_path, model_folder):
    target = tmp_path / "model"
    target.mkdir()
    (target / "old").touch()
    demo_model.write_demo_model(target, seed=SEED, n=N)
    assert [path.name for path in tmp_path.iterdir()] == ["model"] and digests(target) == digests(model_folder)
