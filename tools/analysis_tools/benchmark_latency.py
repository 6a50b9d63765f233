"""Latency of a compact network: contracted against plain, PyTorch against ONNX Runtime.

One image at a time, raw outputs, on the CPU. All variants take turns in one process, so that other
load affects all of them; weights are random, which changes no latency.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch
from mmengine.config import Config
from torch import Tensor, nn

from mmexpand import contract
from mmexpand.deploy import export_onnx, onnxruntime_run
from mmexpand.deploy.network import RawOutputs
from mmexpand.markdown import markdown_table
from mmexpand.mm.command_line import add_config_arguments, count, read_config, tool
from mmexpand.mm.error_report import suits_shape
from mmexpand.mm.models import build_compact_model, build_expanded_model, input_channels

PLAIN, CONTRACTED = 'plain', 'contracted'
PYTORCH, ONNX_RUNTIME = 'PyTorch', 'ONNX Runtime'


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('config', help='config file path, of an expanded network')
    parser.add_argument(
        '--shape',
        type=count,
        nargs=2,
        metavar=('H', 'W'),
        required=True,
        help='height and width of the image',
    )
    parser.add_argument(
        '--threads',
        type=count,
        nargs='+',
        default=[1, 2],
        help='numbers of threads (default: %(default)s)',
    )
    parser.add_argument(
        '--runs', type=count, default=50, help='runs of each variant (default: %(default)s)'
    )
    add_config_arguments(parser)
    return parser.parse_args()


def build_networks(cfg: Config) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    contracted = contract(build_expanded_model(cfg))
    return {PLAIN: build_compact_model(cfg).eval(), CONTRACTED: contracted.eval()}


def variants(
    networks: dict[str, nn.Module], images: Tensor, folder: Path, threads: int
) -> dict[tuple[str, str], Callable[[], object]]:
    """Return functions that run a network once, by network and runtime."""
    found = {}
    for name, network in networks.items():
        path = folder / f'{name}.onnx'
        if not path.exists():
            export_onnx(network, images, path, raw=True)
        raw, run, batch = RawOutputs(network), onnxruntime_run(path, threads), images.numpy()
        found[PYTORCH, name] = lambda raw=raw: raw(images)
        found[ONNX_RUNTIME, name] = lambda run=run, batch=batch: run(batch)
    return found


@torch.no_grad()
def measure(
    functions: dict[tuple[str, str], Callable[[], object]], runs: int
) -> dict[tuple[str, str], float]:
    """Return median milliseconds of each, after a tenth as many warm-up runs."""
    times = {name: [] for name in functions}
    for index in range(-max(1, runs // 10), runs):
        for name, function in functions.items():
            started = time.perf_counter()
            function()
            if index >= 0:
                times[name].append(1000 * (time.perf_counter() - started))
    return {name: median(values) for name, values in times.items()}


def table(medians: dict[int, dict[tuple[str, str], float]]) -> str:
    """Return a Markdown table of milliseconds."""
    head = ('threads', 'runtime', f'{PLAIN}, ms', f'{CONTRACTED}, ms', 'ratio')
    rows = []
    for threads, found in medians.items():
        for runtime in (PYTORCH, ONNX_RUNTIME):
            plain, contracted = found[runtime, PLAIN], found[runtime, CONTRACTED]
            values = (f'{plain:.2f}', f'{contracted:.2f}', f'{contracted / plain:.3f}')
            rows.append((threads, runtime, *values))
    return markdown_table(head, rows)


@tool(parse_args)
def main(args: argparse.Namespace) -> None:
    cfg = read_config(args, 'model')
    networks = build_networks(cfg)
    images = torch.randn(1, input_channels(networks[PLAIN]), *args.shape)
    with suits_shape(args.shape), torch.no_grad():
        RawOutputs(networks[PLAIN])(images)
    medians = {}
    kept = torch.get_num_threads()
    with TemporaryDirectory() as folder:
        for threads in args.threads:
            torch.set_num_threads(threads)
            try:
                functions = variants(networks, images, Path(folder), threads)
                medians[threads] = measure(functions, args.runs)
            finally:
                torch.set_num_threads(kept)
    print(table(medians))


if __name__ == '__main__':
    main()
