"""Table 6 of the paper as a command: its parameters to the digit, its MACs within 2 %."""

import pytest

from tests.tools_in_process import load, run


@pytest.fixture(scope='module')
def rows():
    return load('analysis_tools/paper_table6.py').rows()


def test_parameters_to_the_digit(rows):
    assert len(rows) == 10
    assert [row.parameters_in_words for row in rows] == [row.paper_parameters for row in rows]


def test_macs_within_two_percent(rows):
    for row in rows:
        assert row.macs == pytest.approx(row.paper_macs, rel=0.02), row
        assert row.macs < row.paper_macs  # The paper counts batch norm too.


def test_it_is_printed(capsys):
    assert run('analysis_tools/paper_table6.py') == (0, '')
    output = capsys.readouterr().out
    assert '2,171,554 (2.17M)' in output
    assert '98.39M' in output
