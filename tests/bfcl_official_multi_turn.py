"""The leaderboard package's own loop and verdict on planted answers: a JSON line (id, a list of texts per turn) in, a
verdict out. Needs bfcl-eval with tree-sitter, tree-sitter-java, tree-sitter-javascript, tenacity and python-dotenv."""
import contextlib
import io
import json
import sys
import types

# the table of models imports the client library of every vendor, and nothing here asks for a model
table = types.ModuleType("bfcl_eval.constants.model_config")
table.MODEL_CONFIG_MAPPING = {}
sys.modules[table.__name__] = table

from bfcl_eval.eval_checker.eval_runner import _evaluate_single_multi_turn_entry  # noqa: E402
from bfcl_eval.model_handler.base_handler import BaseHandler  # noqa: E402

# so does the base of the handler whose reading of answers is wanted
oss = types.ModuleType("bfcl_eval.model_handler.local_inference.base_oss_handler")
oss.OSSHandler = type("OSSHandler", (BaseHandler,), {"_format_prompt": lambda self, messages, function: ""})
sys.modules[oss.__name__] = oss
from bfcl_eval.model_handler.local_inference.qwen_fc import QwenFCHandler  # noqa: E402
from bfcl_eval.utils import load_dataset_entry, load_ground_truth_entry  # noqa: E402


class Planted(BaseHandler):
    "A model whose answers are known; behind the last one of a turn it says that it is done."
    decode_execute = QwenFCHandler.decode_execute
    _extract_tool_calls = staticmethod(QwenFCHandler._extract_tool_calls)

    def plant(self, turns): self.turns, self.turn, self.step = turns, -1, 0
    def _pre_query_processing_FC(self, data, entry): return data
    def _compile_tools(self, data, entry): return data
    def add_first_turn_message_FC(self, data, messages): return self._add_next_turn_user_message_FC(data, messages)
    def _add_assistant_message_FC(self, data, response): return data
    def _add_execution_results_FC(self, data, results, response): return data

    def _add_next_turn_user_message_FC(self, data, messages):
        self.turn, self.step = self.turn + 1, 0
        return data

    def _query_FC(self, data):
        texts, self.step = self.turns[self.turn], self.step + 1
        return (texts[self.step - 1] if self.step <= len(texts) else "Done."), 0

    def _parse_query_response_FC(self, text): return {"model_responses": text, "input_token": 0, "output_token": 0}


if __name__ == "__main__":
    entries, answers = {}, {}
    for number, line in enumerate(sys.stdin):
        name, turns = json.loads(line)
        category = name.rsplit("_", 1)[0]
        if category not in entries:
            entries[category] = {entry["id"]: json.dumps(entry) for entry in load_dataset_entry(category)}
            answers[category] = {entry["id"]: entry["ground_truth"] for entry in load_ground_truth_entry(category)}
        handler = Planted(f"planted{number}", 0, f"planted{number}", True)
        handler.plant(turns)
        entry = json.loads(entries[category][name])
        with contextlib.redirect_stdout(io.StringIO()):
            result, _ = handler.inference_multi_turn_FC(entry, False, True)
            found = _evaluate_single_multi_turn_entry(
                handler, name, result, answers[category][name], entry, handler.model_name, category)
        print(json.dumps("" if found["valid"] else found["error"]["error_type"]), flush=True)
