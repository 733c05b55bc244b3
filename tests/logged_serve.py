"""`transformers serve` as its own command starts it, and beside it a line for every generation: the token ids that the
model gets. python logged_serve.py FILE serve FOLDER ..."""
import json
import sys

from transformers.cli.transformers import main
from transformers.generation.utils import GenerationMixin

FILE, generate = sys.argv.pop(1), GenerationMixin.generate


def logged(self, inputs=None, *args, **options):
    "`generate`, and its prompts in the file."
    ids = options["input_ids"] if inputs is None else inputs
    with open(FILE, "a") as log: log.write(json.dumps(ids.tolist()) + "\n")
    return generate(self, inputs, *args, **options)


GenerationMixin.generate = logged
if __name__ == "__main__": sys.exit(main())
