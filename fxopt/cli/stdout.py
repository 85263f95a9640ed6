"""stdout holds the report alone, whatever the user's code prints."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def kept_for_the_report() -> Iterator[None]:
    """Send to stderr what is printed meanwhile: by Python, and by C libraries and child processes."""
    with contextlib.redirect_stdout(sys.stderr):
        if sys.__stdout__ is None or sys.__stderr__ is None:  # closed, and their numbers may be those of other files
            yield
            return
        sys.__stdout__.flush()
        stdout = os.dup(1)
        os.dup2(2, 1)
        try:
            yield
        finally:
            if os.name == "posix":
                ctypes.CDLL(None).fflush(None)  # what C holds back until there is more of it
            os.dup2(stdout, 1)
            os.close(stdout)
