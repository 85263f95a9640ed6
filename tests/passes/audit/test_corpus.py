"""Every fault of the corpus is found by its rule at its line; nothing is found in a corrected twin."""

from __future__ import annotations

import pytest

from passes.audit import Audit
from tests.audit_corpus.reading import Case, cases

CASES = list(cases())
FAULTS = [case for case in CASES if case.line is not None]
TWINS = [case for case in CASES if case.line is None]


def test_the_corpus_is_large_enough():
    assert len(FAULTS) >= 60
    assert len(TWINS) == len(FAULTS)


@pytest.mark.parametrize("case", FAULTS, ids=str)
def test_each_fault_is_found_at_its_line(case: Case):
    found = Audit().inspect(case.subject())
    places = {(f.rule, f.place.path, f.place.line) for f in found.findings if f.place is not None}
    assert (case.rule, str(case.path), case.line) in places, (found.findings, found.notes)


@pytest.mark.parametrize("case", TWINS, ids=str)
def test_nothing_is_found_in_a_corrected_twin(case: Case):
    found = Audit().inspect(case.subject())
    assert [(f.rule, str(f.place), f.message) for f in found.findings] == []
    assert found.notes == ()
