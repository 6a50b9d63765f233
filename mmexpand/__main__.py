"""``python -m mmexpand TOOL ...``: the tools, without a checkout."""

import runpy
import sys
from pathlib import Path

TOOLS = {
    'train': 'train.py',
    'test': 'test.py',
    'plan': 'plan.py',
    'contract': 'contract.py',
    'export': 'export_onnx.py',
    'study': 'study.py',
    'report': 'report.py',
    'draw': 'analysis_tools/draw_blocks.py',
}
"""Files in tools/ by command."""


def main() -> None:
    """Run the tool that the first argument names, with the other arguments."""
    usage = f'usage: python -m mmexpand {{{",".join(TOOLS)}}} ...'
    if len(sys.argv) < 2 or sys.argv[1] in ('-h', '--help'):
        raise SystemExit(usage if len(sys.argv) < 2 else print(usage))
    name = sys.argv.pop(1)
    if name not in TOOLS:
        raise SystemExit(f'mmexpand: unknown tool {name!r}; {usage}')
    path = Path(__file__).parent / '.mim' / 'tools' / TOOLS[name]
    runpy.run_path(str(path), run_name='__main__')


if __name__ == '__main__':
    main()
