"""Every mutant still fits the code: its text occurs exactly once. Whether it is caught, `make mutants` says."""

import shutil

import pytest
from mutants import MUTANTS, mutate

from scripts import ROOT


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_fits(mutant, tmp_path):
    shutil.copy(ROOT / mutant.file, tmp_path)
    mutate(mutant, tmp_path)
    assert (tmp_path / mutant.file).read_text() != (ROOT / mutant.file).read_text()
