"""A gate for CI: the working tree against a revision, on this machine, with verdicts and causes."""

from fxopt.gate.gate import EXIT_CODES, Plan, exit_code, lock_counts, run_gate
from fxopt.gate.processes import Launcher, stopping_cleanly
from fxopt.gate.settings import Job, Limits, limit, read_jobs

__all__ = [
    "EXIT_CODES",
    "Job",
    "Launcher",
    "Limits",
    "Plan",
    "exit_code",
    "limit",
    "lock_counts",
    "read_jobs",
    "run_gate",
    "stopping_cleanly",
]
