"""Papermill's command line with ten minutes where it has four seconds: for the last output of a cell to arrive after
the cell has ended."""
import sys

from papermill.cli import papermill
from papermill.clientwrap import PapermillNotebookClient

usual = PapermillNotebookClient.__init__


def patient(self, *args, **given):
    usual(self, *args, **{"iopub_timeout": 600, **given})


if __name__ == "__main__":
    PapermillNotebookClient.__init__ = patient
    sys.exit(papermill([*sys.argv[1:], "--start-timeout", "600"]))
