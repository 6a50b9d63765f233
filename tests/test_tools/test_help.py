"""``--help`` of all tools reads as one family."""

import argparse
import runpy
import sys
from unittest import mock

import pytest

from tests.tools_in_process import TOOLS

WITH_PARSER = [path for path in sorted(TOOLS.rglob('*.py')) if 'ArgumentParser' in path.read_text()]


class _Parsed(Exception):
    """The parser of a tool is complete."""


def parser_of(path, monkeypatch) -> argparse.ArgumentParser:
    """Return the parser of a tool, which is run up to its parsing."""
    found = []

    def stop(parser, *_, **__):
        found.append(parser)
        raise _Parsed

    monkeypatch.setattr(sys, 'argv', [path.name])
    monkeypatch.syspath_prepend(path.parent)
    with mock.patch.object(argparse.ArgumentParser, 'parse_args', stop), pytest.raises(_Parsed):
        runpy.run_path(str(path), run_name='__main__')
    return found[0]


@pytest.mark.parametrize('path', WITH_PARSER, ids=lambda path: path.stem)
def test_a_sentence_describes_the_tool_and_a_phrase_each_option(path, monkeypatch):
    parser = parser_of(path, monkeypatch)
    first, *_ = parser.description.strip().splitlines()
    assert first[0].isupper() and first.endswith('.'), first
    for action in parser._actions:
        if '--local_rank' in action.option_strings:  # torchrun's.
            continue
        assert action.help, action.option_strings or action.dest
        assert not action.help[0].isupper() or action.help.split()[0].isupper(), action.help
        assert not action.help.endswith('.'), action.help
