"""Papermill's command line with ten minutes where it has four seconds: for the last output of a cell to arrive after
the cell has ended. It ends with the program that started it, however that ends, and its kernel with it."""
import sys

from papermill.cli import papermill
from papermill.clientwrap import PapermillNotebookClient

from proxy_sft.launch.processes import die_with_parent

usual = PapermillNotebookClient.__init__


def patient(self, *args, **given):
    usual(self, *args, **{"iopub_timeout": 600, **given})


if __name__ == "__main__":
    die_with_parent()
    PapermillNotebookClient.__init__ = patient
    sys.exit(papermill([*sys.argv[1:], "--start-timeout", "600"]))
