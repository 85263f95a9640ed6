"""The record of one run: plain JSON, complete enough that every report is rendered from it alone.

Where a number can be not finite it is written as "nan", "inf" or "-inf", since JSON has none of them; null
always means "not measured".
"""

from fxopt.record.build import build, of_capture, of_comparison, of_entry, of_size
from fxopt.record.plain import number, plain
from fxopt.record.shape import Record
from fxopt.record.survey import of_survey
from fxopt.record.version import SCHEMA, check_version, schema

__all__ = [
    "SCHEMA",
    "Record",
    "build",
    "check_version",
    "number",
    "of_capture",
    "of_comparison",
    "of_entry",
    "of_size",
    "of_survey",
    "plain",
    "schema",
]
