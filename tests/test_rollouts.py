"""Rollouts that were killed go on: no reply is asked for twice, and the replies are let go of when all is written."""
import json

import pytest

from proxy_sft.core.settings import load_settings
from proxy_sft.evaluation.answers import Reply
from proxy_sft.evaluation.generation import digest
from proxy_sft.evaluation.rollouts import evaluate_rollouts

CALL = {"name": "clock", "arguments": {}}
TOOLS = [{"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}}}]


class Planted:
    "A server that answers as the data do, keeps its replies as every server here does, and dies at one of them."
    url, name, asked = "http://planted", "planted", 0

    def __init__(self, dies=0): self.dies = dies

    def replies(self, turns, limit, store=None):
        known, found = store.read() if store else {}, []
        for turn in turns:
            key = digest([turn.messages[:-1], turn.tools])
            if key not in known:
                self.asked += 1
                if self.asked == self.dies: raise KeyboardInterrupt
                text = f"<tool_call>\n{json.dumps(CALL)}\n</tool_call>" if turn.expected else "Noon."
                known[key] = Reply(text, True, 5)
                if store: store.add({key: known[key]})
            found.append(known[key])
        return found


def test_killed_rollouts_go_on(tmp_path, monkeypatch):
    settings = load_settings("demo", workspace=str(tmp_path))
    settings.run_dir.mkdir(parents=True)
    settings.converted_dir.mkdir(parents=True)
    talks = [[{"role": "user", "content": f"What time is it, {name}?"},
              {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": CALL}]},
              {"role": "tool", "content": "12:00"}, {"role": "assistant", "content": "Noon."}] for name in "abc"]
    lines = [json.dumps({"messages_json": json.dumps(talk), "tools_json": json.dumps(TOOLS)}) for talk in talks]
    (settings.converted_dir / "heldout.jsonl").write_text("\n".join(lines) + "\n")
    monkeypatch.setattr("proxy_sft.evaluation.predictions.model_folders", lambda *args: {"tuned": tmp_path})
    first, second = Planted(dies=5), Planted()
    with pytest.raises(KeyboardInterrupt): evaluate_rollouts(settings, servers={"tuned": first})
    found = evaluate_rollouts(settings, servers={"tuned": second})
    assert [(one.end, one.passed) for one in found.found["tuned"]] == [("finished", 2)] * 3
    assert first.asked - 1 + second.asked == 6  # six turns, none of them twice
    assert (settings.run_dir / "rollouts.json").is_file()
    assert not list(settings.run_dir.glob("answers-rollouts/*"))
