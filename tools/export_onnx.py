"""Export the compact network to ONNX, checked against PyTorch on an image.

An expanded checkpoint is contracted first. The file holds the decoding too: of a detector boxes,
scores and labels after suppression, of a segmentor the class of every pixel.
"""

import argparse
from importlib.util import find_spec
from pathlib import Path

from mmengine.config import Config
from torch import Tensor, nn

from mmexpand.deploy import (
    FileModel,
    Pixels,
    calibration_images,
    compare_file,
    export_ncnn,
    export_onnx,
    export_program,
    load_compact_model,
    onnxruntime_run,
    openvino_run,
    preprocess,
    score,
    table,
)
from mmexpand.deploy.decoding import check_exportable, decoder_of
from mmexpand.deploy.onnx import TOLERANCE, OnnxReport
from mmexpand.mm.command_line import add_config_arguments, count, read_config, tool
from mmexpand.mm.config_file import ConfigError
from mmexpand.mm.contraction import check_writable
from mmexpand.mm.launch import NEEDED


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
    parser.add_argument(
        '--raw', action='store_true', help='leave the decoding out: what the heads compute'
    )
    parser.add_argument(
        '--preprocess',
        choices=['bgr', 'rgb'],
        help='put the normalisation into the file, which takes pixels from 0 to 255 in this order; '
        'resizing and padding stay outside',
    )
    parser.add_argument(
        '--uint8', action='store_true', help='with --preprocess: pixels are bytes, not float32'
    )
    parser.add_argument(
        '--dynamic-size', action='store_true', help='leave height and width open, too'
    )
    parser.add_argument(
        '--int8',
        type=count,
        metavar='N',
        help='write OUT_int8.onnx as well, calibrated on N images of the training split',
    )
    parser.add_argument(
        '--pt2',
        action='store_true',
        help='write OUT.pt2 as well: the raw outputs, for torch.export.load',
    )
    parser.add_argument(
        '--ncnn',
        action='store_true',
        help='write OUT.param and OUT.bin as well: the raw outputs, for ncnn',
    )
    parser.add_argument(
        '--evaluate',
        action='store_true',
        help="compare PyTorch and the files by the config's evaluator on the test split",
    )
    add_config_arguments(parser)
    args = parser.parse_args()
    if args.uint8 and not args.preprocess:
        parser.error('--uint8 says what --preprocess takes: add --preprocess bgr or rgb')
    if args.uint8 and args.ncnn:
        parser.error('--ncnn takes float32 pixels: leave --uint8 out')
    if args.raw and args.evaluate:
        parser.error('--evaluate needs predictions, which --raw leaves out of the file')
    return args


def print_report(report: OnnxReport) -> None:
    print(f'wrote {report.path}: input {report.input_shape}, outputs {report.output_shapes}')
    print(f'largest error against PyTorch: {report.max_error:.2e} of the largest output')
    if report.agreement is not None:
        print(f"predictions that are the framework's own: {report.agreement:.2%}")


def check_openvino(out: Path, model: nn.Module, inputs: Tensor, raw: bool, pixels: Pixels) -> None:
    """Run the file in OpenVINO as well; it is as it should be whatever comes out of that."""
    try:
        found = compare_file(openvino_run(out), model, inputs, raw=raw, pixels=pixels)
    except RuntimeError as error:
        print(f'OpenVINO cannot run it: {str(error).splitlines()[-1]}')
    else:
        share = f"{found:.2%} of the predictions are the framework's own"
        print(f'in OpenVINO: {f"largest error {found:.2e}" if raw else share}')


def print_scores(
    args: argparse.Namespace,
    cfg: Config,
    model: nn.Module,
    pixels: Pixels | None,
    reports: dict[str, OnnxReport],
) -> None:
    """Evaluate PyTorch and every file in ONNX Runtime."""
    models, sizes = {'PyTorch': model}, {'PyTorch': Path(args.checkpoint).stat().st_size}
    for kind, report in reports.items():
        size = None if args.dynamic_size else report.input_shape[-2:]
        name, run = f'ONNX Runtime, {kind}', onnxruntime_run(report.path)
        models[name] = FileModel(model, run, tuple(report.output_shapes), size, pixels)
        sizes[name] = report.path.stat().st_size
    print(table(score(cfg, models), sizes))


@tool(parse_args)
def main(args: argparse.Namespace) -> None:
    out = Path(args.out)
    check_writable(out.parent, '--out')
    needed = ['train_dataloader'] if args.int8 else []
    needed += NEEDED['test'] if args.evaluate else ['test_dataloader']
    cfg = read_config(args, 'model', *needed)
    model = load_compact_model(cfg, args.checkpoint)
    inputs = preprocess(model, cfg, args.image)
    check_exportable(model)
    if args.evaluate and decoder_of(model, inputs) is None:
        raise ConfigError(
            f'--evaluate is for detectors and segmentors: the file of a {type(model).__name__} '
            'gives its raw outputs'
        )
    pixels = None
    if args.preprocess:
        pixels = Pixels(model.data_preprocessor, args.preprocess, args.uint8)
    options = dict(raw=args.raw, pixels=pixels, dynamic_size=args.dynamic_size)
    reports = {'float32': export_onnx(model, inputs, out, args.tolerance, **options)}
    print_report(reports['float32'])
    if find_spec('openvino'):
        check_openvino(out, model, inputs, reports['float32'].agreement is None, pixels)
    if args.int8:
        options['calibration'] = calibration_images(model, cfg, args.int8, inputs.shape[-2:])
        path = out.with_name(f'{out.stem}_int8{out.suffix}')
        reports['int8'] = export_onnx(model, inputs, path, args.tolerance, **options)
        print_report(reports['int8'])
    if args.pt2:
        path = out.with_suffix('.pt2')
        error = export_program(model, inputs, path, args.tolerance, pixels=pixels)
        print(f'wrote {path}: raw outputs, largest error {error:.2e} of the largest output')
    if args.ncnn:
        path = out.with_suffix('.param')
        error = export_ncnn(model, inputs, path, args.tolerance, pixels=pixels)
        print(
            f'wrote {path} and {path.with_suffix(".bin").name}: raw outputs, largest error '
            f'{error:.2e} of the largest output'
        )
    if args.evaluate:
        print_scores(args, cfg, model, pixels, reports)


if __name__ == '__main__':
    main()
