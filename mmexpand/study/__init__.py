"""Studies: arms trained at their own best learning rate, over seeds, and compared."""

from .report import write_report
from .schedule import run_study
from .spec import Arm, Run, Study, StudyError, load_study

__all__ = ['Arm', 'Run', 'Study', 'StudyError', 'load_study', 'run_study', 'write_report']
