"""The main job on real files, for detection and segmentation: draw, train, contract, use.

For each task: train the expanded network on two processes, contract it, evaluate the compact
checkpoint in stock OpenMMLab in a process of its own, export it to ONNX and run that. Leaves the
table, pictures of predictions and loss curves in the output folder.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MARKER = '.mmexpand-demo'
SHOWN = re.compile(
    r'Iter\(train\)|Iter\((val|test)\).*(mAP|mIoU)|(Expand|Contract)Hook: |compact_best\.pth: '
    r'|cannot be imported|largest error against'
)
STARTED = time.monotonic()


@dataclass(frozen=True)
class Task:
    """A task of the demo.

    Attributes:
        name: the name of its folder.
        title: the title of its column.
        config: the config that expands.
        data: the folder of its data set in the demo's folder.
        image: the pattern of its test images.
        metric: the main metric.
        tolerance: allowed difference of the compact and the expanded metric, for rounding.
        without: package that the evaluation with stock OpenMMLab cannot import.
    """

    name: str
    title: str
    config: str
    data: str
    image: str
    metric: str
    tolerance: float
    without: str | None


TASKS = [
    Task(
        name='yolo-lite',
        title='YOLO-LITE, drawn VOC',
        config='yolo-lite_expand-cl-r4_2xb8-400iters_drawn-voc-160x160.py',
        data='data/voc',
        image='VOC2007/JPEGImages/*.jpg',
        metric='pascal_voc/mAP',
        tolerance=0.001,
        without=None,
    ),
    Task(
        name='unet',
        title='U-Net, drawn Cityscapes',
        config='unet-s4-d8_expand-cl-r4_fcn_2xb4-200iters_drawn-cityscapes-96x192.py',
        data='data/cityscapes',
        image='leftImg8bit/val/*/*.png',
        metric='mIoU',
        tolerance=0.1,
        without='mmexpand',
    ),
]


class StepError(RuntimeError):
    """A step that failed; the message holds its command and the end of its log."""


def say(text: str) -> None:
    seconds = int(time.monotonic() - STARTED)
    print(f'[demo {seconds // 60}:{seconds % 60:02d}] {text}', flush=True)


def run(command: Sequence[str | Path], log: Path) -> None:
    """Run a step, write its output into a log, and print the main lines.

    Raises:
        StepError: if it fails.
    """
    command = [str(part) for part in command]
    with (
        log.open('w') as file,
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors='replace',
        ) as process,
    ):
        for line in process.stdout:
            file.write(line)
            if SHOWN.search(line):
                say('  ' + shorten(line))
    if process.returncode != 0:
        tail = ''.join(log.read_text(errors='replace').splitlines(keepends=True)[-25:])
        raise StepError(
            f'this step failed with exit code {process.returncode}:\n{shlex.join(command)}\n'
            f'the end of its log, {log}:\n{tail}'
        )


def environment() -> dict[str, str]:
    """Two processes of one thread each, with this interpreter's programs."""
    import torch
    from torch.distributed.elastic.utils.distributed import get_free_port

    env = dict(
        os.environ,
        PATH=f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}',
        PORT=str(get_free_port()),
        OMP_NUM_THREADS='1',
        PYTHONWARNINGS='ignore',
    )
    # Two processes cannot share one GPU in NCCL; they then use gloo on the CPU.
    if torch.cuda.device_count() < 2:
        env['CUDA_VISIBLE_DEVICES'] = ''
    return env


def shorten(line: str) -> str:
    line = re.sub(r'^.*? - INFO - ', '', line.strip())
    line = re.sub(r'\b(base_lr|lr|time|data_time): \S+', '', line)
    line = re.sub(r'( loss: \S+).*', r'\1', line)
    return re.sub(r' +', ' ', line)[:110]


def prepare(out: Path) -> None:
    """Make an empty folder for the demo, and remove the results of an earlier demo.

    Raises:
        FileExistsError: if something else is there.
    """
    if out.exists() and any(out.iterdir()) and not (out / MARKER).exists():
        raise FileExistsError(f'{out} is not the folder of a demo; name another --out')
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    (out / MARKER).touch()


def draw_data(out: Path) -> None:
    from draw_cityscapes import draw_cityscapes
    from draw_voc import draw_voc

    say('drawing photographs in the layout of PASCAL VOC')
    draw_voc(out / 'data/voc')
    say('drawing street scenes in the layout of Cityscapes')
    draw_cityscapes(out / 'data/cityscapes')


def do_task(task: Task, out: Path) -> dict[str, str]:
    """Run all steps of a task, and return its column of the table."""
    folder = out / task.name
    work_dir = folder / 'work_dir'
    folder.mkdir()
    config = ROOT / 'configs/demo' / task.config
    data = out / task.data
    image = sorted(data.glob(task.image))[-1]

    say(f'{task.title}: training the expanded network on two processes, then contracting it')
    options = [f'{split}_dataloader.dataset.data_root={data}' for split in ('train', 'val', 'test')]
    train = ['bash', ROOT / 'tools/dist_train.sh', config, '2', '--work-dir', work_dir]
    run([*train, '--cfg-options', *options], folder / 'train.log')
    compact = [work_dir / 'compact_config.py', work_dir / 'compact_best.pth']

    framework = 'mmdet' if task.without is None else f'mmseg, without {task.without}'
    say(f'{task.title}: evaluating the compact checkpoint in stock {framework}')
    evaluate = [sys.executable, ROOT / 'tools/demo/evaluate_stock.py', *compact]
    evaluate += ['--work-dir', folder / 'test', '--out', folder / 'metrics.json']
    evaluate += ['--without', task.without] if task.without else []
    run(evaluate, folder / 'test.log')

    say(f'{task.title}: exporting to ONNX and running it in ONNX Runtime')
    export = [sys.executable, ROOT / 'tools/export_onnx.py', *compact, '--image', image]
    run([*export, '--out', folder / 'compact.onnx'], folder / 'export.log')

    say(f'{task.title}: drawing predictions and curves')
    analysis = ROOT / 'tools/analysis_tools'
    browse = [sys.executable, analysis / 'browse_results.py', *compact]
    run([*browse, '--out-dir', folder / 'predictions'], folder / 'browse.log')
    plot = [sys.executable, analysis / 'plot_curves.py', work_dir]
    run([*plot, '--out', folder / 'curves.png'], folder / 'plot.log')
    return collect(task, folder, image)


def collect(task: Task, folder: Path, image: Path) -> dict[str, str]:
    """Return the column of the table.

    Raises:
        StepError: if the compact network has another metric in stock OpenMMLab.
    """
    from mmexpand.surgery.checkpoint import load_checkpoint

    work_dir = folder / 'work_dir'
    (best,) = work_dir.glob('best_*.pth')
    compact = work_dir / 'compact_best.pth'
    report = load_checkpoint(compact)['meta']['mmexpand']
    expanded = report['metrics_expanded'][task.metric]
    stock = json.loads((folder / 'metrics.json').read_text())[task.metric]
    if abs(stock - expanded) > task.tolerance:
        raise StepError(
            f'{compact}: {task.metric} is {stock} in stock OpenMMLab, was {expanded} expanded'
        )
    onnx_error = re.search(r'against PyTorch: (\S+)', (folder / 'export.log').read_text())[1]
    size, params, macs = count(task, image)
    metric = task.metric.split('/')[-1]
    return {
        'layers expanded': f'{len(report["layers"])}',
        'parameters, expanded': f'{params[0]:,}',
        'parameters, compact': f'{params[1]:,}',
        'input (height x width)': f'{size[0]} x {size[1]}',
        'MACs, expanded layer by layer': f'{macs[0] / 1e6:,.1f} M',
        'MACs, compact': f'{macs[1] / 1e6:,.1f} M',
        'metric': metric,
        'metric, expanded': f'{expanded:.4g}',
        'metric, compact, in stock OpenMMLab': f'{stock:.4g}',
        'largest relative error of contraction': f'{report["max_error"]:.1e}',
        'largest relative error of ONNX': onnx_error,
        'checkpoint, expanded': f'{best.stat().st_size / 1e6:.2f} MB',
        'checkpoint, compact': f'{compact.stat().st_size / 1e6:.2f} MB',
        'training steps a second': f'{steps_a_second(work_dir):.2f}',
    }


def count(task: Task, image: Path) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """Input size; parameters and MACs, expanded (the MACs layer by layer) and compact."""
    from mmengine.config import Config

    from mmexpand.analysis.bounds import counted_step
    from mmexpand.deploy import preprocess
    from mmexpand.mm.models import build_compact_model, build_expanded_model, tensor_outputs

    cfg = Config.fromfile(ROOT / 'configs/demo' / task.config)
    compact, expanded = build_compact_model(cfg).eval(), build_expanded_model(cfg)
    params = [sum(p.numel() for p in model.parameters()) for model in (expanded, compact)]
    shape = preprocess(compact, cfg, image).shape
    counted = counted_step(
        expanded, compact, shape, lambda model, images: tensor_outputs(model, dict(inputs=images))
    )
    return tuple(shape[-2:]), tuple(params), (counted.layerwise, counted.compact)


def steps_a_second(work_dir: Path) -> float:
    from mmexpand.report.curves import read_log

    _, times = read_log(work_dir).training['time']
    return len(times) / sum(times)


def table(columns: dict[str, dict[str, str]]) -> str:
    """Return a Markdown table with one column per task."""
    rows = next(iter(columns.values()))
    lines = [['', *columns], *([row, *(c[row] for c in columns.values())] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    lines.insert(1, ['-' * width for width in widths])
    cells = (
        [line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))]
        for line in lines
    )
    return ''.join(f'| {" | ".join(line)} |\n' for line in cells)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        '--out',
        type=Path,
        default=ROOT / 'demo_output',
        help='folder of all results (default: demo_output)',
    )
    return parser.parse_args()


def main() -> None:
    out = parse_args().out.resolve()
    prepare(out)
    say(f'about 7 minutes on 2 cores; everything goes to {out}')
    try:
        draw_data(out)
        columns = {task.title: do_task(task, out) for task in TASKS}
    except StepError as error:
        sys.exit(f'demo: {error}')
    text = table(columns)
    (out / 'table.md').write_text(text)
    say('done\n')
    print(text)
    print(
        f'The table is in {out}/table.md. For {" and ".join(task.name for task in TASKS)} there are'
    )
    print(f'predictions/ (ground truth left), curves.png and compact.onnx in {out}/*/, and')
    print(
        'compact_config.py, compact_best.pth and report.html, which a browser shows, in work_dir/.'
    )


if __name__ == '__main__':
    main()
