"""Export the compact network to ONNX, checked against PyTorch on an image.

An expanded checkpoint is contracted first.
"""

import argparse
from pathlib import Path

from mmexpand.deploy import export_onnx, load_compact_model, preprocess
from mmexpand.deploy.onnx import TOLERANCE
from mmexpand.mm.contraction import check_writable
from mmexpand.mm.launch import add_config_arguments, read_config, tool


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config file path')
    parser.add_argument('checkpoint', help='checkpoint file, expanded or compact')
    parser.add_argument('--out', required=True, help='the ONNX file to write')
    parser.add_argument('--image', required=True, help='an image to compare the outputs on')
    parser.add_argument(
        '--tolerance',
        type=float,
        default=TOLERANCE,
        help='largest error allowed, relative to the largest output (default %(default)s)',
    )
    add_config_arguments(parser)
    return parser.parse_args()


@tool(parse_args)
def main(args: argparse.Namespace) -> None:
    check_writable(Path(args.out).parent, '--out')
    cfg = read_config(args, 'model', 'test_dataloader')
    model = load_compact_model(cfg, args.checkpoint)
    report = export_onnx(model, preprocess(model, cfg, args.image), args.out, args.tolerance)
    print(f'wrote {report.path}: input {report.input_shape}, outputs {report.output_shapes}')
    print(f'largest error against PyTorch: {report.max_error:.2e} of the largest output')


if __name__ == '__main__':
    main()
