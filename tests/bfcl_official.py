"""The official checker's verdicts: cases as JSON lines on standard input, 1 or 0 or the name of its error per line out.
Runs in an environment that has bfcl-eval, not in the project's own."""
import json
import sys
import types

# the table of models imports the client library of every vendor; the checker asks it one thing only, whether dots in
# names become underscores
table = types.ModuleType("bfcl_eval.constants.model_config")
table.MODEL_CONFIG_MAPPING = {"model": types.SimpleNamespace(underscore_to_dot=False)}
sys.modules[table.__name__] = table

from bfcl_eval.constants.enums import Language  # noqa: E402
from bfcl_eval.eval_checker.ast_eval.ast_checker import ast_checker  # noqa: E402

LANGUAGES = {"simple_java": Language.JAVA, "simple_javascript": Language.JAVASCRIPT}

if __name__ == "__main__":
    for line in sys.stdin:
        category, functions, answers, calls = json.loads(line)
        made = [{call["name"]: call["arguments"]} for call in calls]
        try:
            verdict = int(
                ast_checker(functions, made, answers, LANGUAGES.get(category, Language.PYTHON), category, "model")[
                    "valid"
                ]
            )
        # it fails on some answers; which ones is what the comparison wants to know
        except Exception as error: verdict = type(error).__name__
        print(json.dumps(verdict), flush=True)
