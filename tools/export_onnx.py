"""Export the compact network to ONNX, checked against PyTorch on an image.

An expanded checkpoint is contracted first. The file includes the decoding: boxes, scores and labels
after suppression for a detector, the class of every pixel or its logits for a segmentor.
"""

import argparse
import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from mmengine.config import Config
from torch import Tensor, nn

from mmexpand.deploy import (
    FileModel,
    Int8,
    Int8Report,
    Pixels,
    calibration_images,
    check_not_normalised,
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
    trained_ranges,
)
from mmexpand.deploy.decoding import check_exportable, decoder_of
from mmexpand.deploy.layers import chosen_layers, weighted_layers
from mmexpand.deploy.onnx import TOLERANCE, OnnxReport
from mmexpand.deploy.quantisation import METHODS
from mmexpand.deploy.scoring import main_metric, metric_kept, points_lost
from mmexpand.metrics import best_metric
from mmexpand.mm.command_line import add_config_arguments, count, read_config, tool
from mmexpand.mm.config_file import ConfigError
from mmexpand.mm.contraction import check_writable
from mmexpand.mm.launch import NEEDED
from mmexpand.stack import check_installed
from mmexpand.surgery.fake_quantisation import TARGETS

DROP = 0.5
"""Points of the metric that int8 may lose."""
AUTO = 'auto'
SHOWN = 5
"""Number of layers whose errors are printed."""


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
        help='largest error allowed, relative to the largest output (default: %(default)s)',
    )
    parser.add_argument(
        '--raw', action='store_true', help='leave out the decoding: export the outputs of the heads'
    )
    parser.add_argument(
        '--logits',
        action='store_true',
        help='for a segmentor: return logits at the size of the input instead of classes. Resized '
        "to the original image before the argmax, they give exactly PyTorch's classes",
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
        '--dynamic-size', action='store_true', help='accept images of any height and width'
    )
    parser.add_argument(
        '--int8',
        type=count,
        metavar='N',
        help='also write OUT_int8.onnx, calibrated on N images of the training split',
    )
    parser.add_argument(
        '--int8-keep',
        nargs='+',
        metavar='LAYER',
        help='layers that stay float32: names, modules around them, globs, re:EXPRESSION; '
        "'auto': as many as required to stay within --int8-drop on the validation split",
    )
    parser.add_argument(
        '--int8-drop',
        type=float,
        metavar='POINTS',
        help=f'points of the metric that int8 may lose (default {DROP})',
    )
    parser.add_argument(
        '--int8-target',
        choices=[*TARGETS],
        help='processor of the int8 file: x86 (the default) has weights of 7 bits, '
        'which all processors add up without overflow; x86-vnni and arm have 8 bits',
    )
    parser.add_argument(
        '--int8-method',
        choices=[*METHODS],
        help='method that finds the ranges of activations (default: minmax)',
    )
    parser.add_argument(
        '--pt2',
        action='store_true',
        help='also write OUT.pt2: the raw outputs, for torch.export.load',
    )
    parser.add_argument(
        '--ncnn',
        action='store_true',
        help='also write OUT.param and OUT.bin: the raw outputs, for ncnn',
    )
    parser.add_argument(
        '--evaluate',
        action='store_true',
        help="compare PyTorch and the files by the config's evaluator on the test split",
    )
    add_config_arguments(parser)
    args = parser.parse_args()
    if Path(args.out).suffix != '.onnx':
        parser.error(f'--out is {args.out}; its name must end in .onnx')
    if args.uint8 and not args.preprocess:
        parser.error('--uint8 is an option of --preprocess; add --preprocess bgr or rgb')
    if args.uint8 and args.ncnn:
        parser.error('--ncnn takes float32 pixels; leave out --uint8')
    if args.raw and args.logits:
        parser.error('--raw leaves out the resizing, which --logits includes; use one of them')
    for name in ('keep', 'drop', 'target', 'method'):
        if getattr(args, f'int8_{name}') is not None and not args.int8:
            parser.error(f'--int8-{name} requires calibration images; add --int8 N')
    if args.int8_drop is not None and args.int8_drop < 0:
        parser.error(f'--int8-drop is {args.int8_drop}; it must be at least 0')
    args.int8_auto = AUTO in (args.int8_keep or [])
    args.int8_keep = [name for name in args.int8_keep or [] if name != AUTO]
    if args.raw and args.int8_auto:
        parser.error('--int8-keep auto evaluates predictions; leave out --raw')
    if args.raw and args.evaluate:
        parser.error('--evaluate requires predictions; leave out --raw')
    return args


def print_report(report: OnnxReport) -> None:
    print(f'wrote {report.path}: input {report.input_shape}, outputs {report.output_shapes}')
    print(f'largest error against PyTorch: {report.max_error:.2e} of the largest output')
    if report.agreement is not None and math.isnan(report.agreement):
        print('nothing is detected in --image, so that boxes were not compared: use another image')
    elif report.agreement is not None:
        print(f"predictions that are the framework's own: {report.agreement:.2%}")
    if report.int8 is not None:
        print_int8(report.int8)


def print_int8(report: Int8Report) -> None:
    scales = 'one for each output channel' if report.per_channel else 'one for each kernel'
    print(f'int8: scales of weights are {scales}')
    if report.kept:
        print(f'int8: in float32 are {len(report.kept)} layers: {", ".join(report.kept)}')
    print(
        f'int8: error {report.error:.3f} of the spread of the outputs; of one layer alone, the '
        f'largest of {len(report.layers)}:'
    )
    for layer in report.layers[:SHOWN]:
        print(f'  {layer.error:.3f} {layer.name}: {layer.reason}')


def check_openvino(out: Path, model: nn.Module, inputs: Tensor, raw: bool, pixels: Pixels) -> None:
    """Run the file in OpenVINO as well, and print the result or the failure."""
    try:
        found = compare_file(openvino_run(out), model, inputs, raw=raw, pixels=pixels)
    except RuntimeError as error:
        print(f'OpenVINO cannot run it: {str(error).splitlines()[-1]}')
    else:
        share = f"{found:.2%} of the predictions are the framework's own"
        print(f'in OpenVINO: {f"largest error {found:.2e}" if raw else share}')


def file_model(
    args: argparse.Namespace,
    model: nn.Module,
    pixels: Pixels | None,
    report: OnnxReport,
    path: Path,
) -> FileModel:
    size = None if args.dynamic_size else report.input_shape[-2:]
    return FileModel(model, onnxruntime_run(path), tuple(report.output_shapes), size, pixels)


def print_scores(
    args: argparse.Namespace,
    cfg: Config,
    model: nn.Module,
    pixels: Pixels | None,
    reports: dict[str, OnnxReport],
) -> None:
    """Evaluate PyTorch and every file in ONNX Runtime, and warn of a large loss by int8."""
    weights = model.state_dict().values()
    models, sizes = {'PyTorch': model}, {'PyTorch': sum(t.nbytes for t in weights)}
    for kind, report in reports.items():
        name = f'ONNX Runtime, {kind}'
        models[name] = file_model(args, model, pixels, report, report.path)
        sizes[name] = report.path.stat().st_size
    found = score(cfg, models)
    print(table(found, sizes))
    if 'classes' in reports['float32'].output_shapes:
        print(
            'The files take the class of a pixel at the size of the input and PyTorch at that of '
            'the original image, by which their rows differ. With --logits they do not.'
        )
    if 'int8' in reports:
        before = found['ONNX Runtime, float32']
        metric = main_metric(cfg, before)
        lost = points_lost(metric, before, found['ONNX Runtime, int8'])
        if not lost <= args.int8_drop:  # A metric may be NaN.
            print(
                f'warning: int8 loses {lost:.2f} points of {metric}, more than {args.int8_drop:g}; '
                'use --int8-keep auto, or name the worst layers above'
            )


@contextmanager
def int8_options(
    args: argparse.Namespace,
    cfg: Config,
    model: nn.Module,
    images: list[Tensor],
    pixels: Pixels | None,
    report: OnnxReport,
    trained: dict,
) -> Iterator[Int8]:
    """Yield the options of the int8 file, given the float32 file and trained ranges."""
    options = dict(images=images, keep=args.int8_keep, **trained)
    for name in ('target', 'method'):
        if getattr(args, f'int8_{name}'):
            options[name] = getattr(args, f'int8_{name}')
    if trained:
        print(f'int8: layers and ranges as trained by QuantHook: {args.checkpoint}')
    if not args.int8_auto:
        yield Int8(**options)
        return
    load = partial(file_model, args, model, pixels, report)
    with metric_kept(cfg, args.int8_drop, report.path, load) as accepts:
        yield Int8(**options, accepts=accepts)


@tool(parse_args)
def main(args: argparse.Namespace) -> None:
    out = Path(args.out)
    check_writable(out.parent, '--out')
    needed = ['train_dataloader'] if args.int8 else []
    needed += NEEDED['val'] if args.int8_auto else []
    needed += NEEDED['test'] if args.evaluate else ['test_dataloader']
    cfg = read_config(args, 'model', *needed)
    if args.int8_auto or (args.evaluate and args.int8):
        best_metric(cfg)  # An error before the export.
    if args.preprocess:
        check_not_normalised(cfg)
    model = load_compact_model(cfg, args.checkpoint)
    inputs = preprocess(model, cfg, args.image)
    check_exportable(model)
    if args.ncnn:
        check_installed('ncnn', 'pnnx', 'ncnn')
    if args.int8:
        args.int8_drop = DROP if args.int8_drop is None else args.int8_drop
        trained = trained_ranges(args.checkpoint) or {}
        target = trained.get('target')
        if trained and args.int8_method:
            raise ConfigError(
                f'--int8-method {args.int8_method}: QuantHook has trained the ranges of '
                f'{args.checkpoint}; leave the option out'
            )
        if trained and args.int8_target not in (None, target):
            raise ConfigError(
                f'--int8-target {args.int8_target}: QuantHook has trained {args.checkpoint} for '
                f'{target}; leave the option out, or train with target={args.int8_target!r}'
            )
        chosen_layers(weighted_layers(model), args.int8_keep)
        calibration = calibration_images(model, cfg, args.int8, inputs.shape[-2:])
    if (args.evaluate or args.int8_auto) and decoder_of(model, inputs) is None:
        option = '--evaluate' if args.evaluate else '--int8-keep auto'
        raise ConfigError(
            f'{option} is for detectors and segmentors: the file of a {type(model).__name__} '
            'gives its raw outputs'
        )
    pixels = None
    if args.preprocess:
        pixels = Pixels(model.data_preprocessor, args.preprocess, args.uint8)
    options = dict(raw=args.raw, logits=args.logits, pixels=pixels, dynamic_size=args.dynamic_size)
    reports = {'float32': export_onnx(model, inputs, out, args.tolerance, **options)}
    print_report(reports['float32'])
    if find_spec('openvino'):
        check_openvino(out, model, inputs, reports['float32'].agreement is None, pixels)
    if args.int8:
        path = out.with_name(f'{out.stem}_int8{out.suffix}')
        found = args, cfg, model, calibration, pixels, reports['float32'], trained
        with int8_options(*found) as int8:
            reports['int8'] = export_onnx(model, inputs, path, args.tolerance, **options, int8=int8)
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
