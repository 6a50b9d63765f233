"""Draw blocks as SVG: inputs left, sum right."""

import argparse
import sys
from importlib import import_module
from pathlib import Path

from mmexpand.analysis.drawing import draw_block, drawings
from mmexpand.errors import UserImportError
from mmexpand.files import write_text
from mmexpand.mm.command_line import add_debug_argument, count, tool
from mmexpand.mm.contraction import check_writable


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('blocks', nargs='*', help='blocks to draw (default: all)')
    parser.add_argument(
        '--imports', nargs='+', default=[], help='modules that register blocks of your own'
    )
    parser.add_argument('--kernel-size', type=count, help='kernel size of the drawn layer')
    parser.add_argument('--out-dir', default='blocks', help='folder for BLOCK.svg')
    add_debug_argument(parser)
    return parser.parse_args()


@tool(parse_args)
def main(args: argparse.Namespace) -> None:
    sys.path.append('')  # A script is started without the folder that it is called from.
    for name in args.imports:
        try:
            import_module(name)
        except ImportError as error:
            raise UserImportError(f'--imports {name}: {error}; set PYTHONPATH') from error
    check_writable(args.out_dir, '--out-dir')
    for name in args.blocks or drawings():
        path = Path(args.out_dir) / f'{name}.svg'
        write_text(draw_block(name, args.kernel_size), path)
        print(f'wrote {path}')


if __name__ == '__main__':
    main()
