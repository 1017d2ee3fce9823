"""Studies: the open questions about what adapters leak, each measured by one command, `r2f study NAME`."""

from r2f_ext.studies.result import StudyResult
from r2f_ext.studies.runner import run_study
from r2f_ext.studies.study import CLOTHES, FACES, PHOTOS, Data, Measured, Panel, Setting, Study, World
from r2f_ext.studies.table import Row, Table

__all__ = [
    "CLOTHES",
    "FACES",
    "PHOTOS",
    "Data",
    "Measured",
    "Panel",
    "Row",
    "Setting",
    "Study",
    "StudyResult",
    "Table",
    "World",
    "run_study",
]
