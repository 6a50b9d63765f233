"""Evaluate the runs of a study in float32 and int8 ONNX files, on the test split.

One JSON a run goes to RESULTS/int8 and is not made again; the table has a row for each arm. Runs
need their checkpoints: work_dirs/STUDY is where tools/study.py leaves them.
"""

import argparse
import json
import statistics
from collections.abc import Mapping
from pathlib import Path

from mmengine.runner import find_latest_checkpoint

from mmexpand.deploy import (
    FileModel,
    Int8,
    calibration_images,
    export_onnx,
    load_compact_model,
    trained_ranges,
)
from mmexpand.deploy.quantisation import METHODS
from mmexpand.deploy.runtimes import onnxruntime_run
from mmexpand.deploy.scoring import metric_kept, score
from mmexpand.errors import UserValueError
from mmexpand.markdown import markdown_table
from mmexpand.mm.command_line import add_debug_argument, count, tool
from mmexpand.mm.launch import build_runner, temporary_work_dir
from mmexpand.study import load_study
from mmexpand.study.results import read_result
from mmexpand.study.run import numbers, run_config, write_json
from mmexpand.study.spec import Run, Study
from mmexpand.surgery.fake_quantisation import TARGETS


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('study', help='study file path')
    parser.add_argument('--arms', nargs='+', help='arms to evaluate (default: all)')
    parser.add_argument('--images', type=count, default=64, help='calibration images (default 64)')
    parser.add_argument(
        '--methods',
        nargs='+',
        choices=[*METHODS],
        default=['minmax'],
        help='methods that find the ranges of activations (default: minmax)',
    )
    parser.add_argument(
        '--targets',
        nargs='+',
        choices=[*TARGETS],
        default=['x86'],
        help='processors of the files (default: x86); the first goes with all methods, the others '
        'with the first',
    )
    parser.add_argument(
        '--drop',
        type=float,
        metavar='POINTS',
        help='also keep as many layers in float32 as a loss of this many points on the validation '
        'split allows: the column int8_auto',
    )
    parser.add_argument('--report-only', action='store_true', help='report the results so far')
    add_debug_argument(parser)
    return parser.parse_args()


def evaluate(study: Study, run: Run, checkpoint: str, args: argparse.Namespace) -> dict:
    """Return the content of a result: metrics of a run's PyTorch network and its files."""
    if trained_ranges(checkpoint):
        raise UserValueError(
            f'{checkpoint} was trained with QuantHook, whose ranges this tool does not use; '
            'evaluate it with tools/export_onnx.py --int8 N --evaluate'
        )
    cfg = run_config(study, run)
    model = load_compact_model(cfg, checkpoint)
    with temporary_work_dir(cfg):
        folder = Path(cfg.work_dir)
        batch = next(iter(build_runner(cfg, ('test',)).test_dataloader))
        inputs = model.data_preprocessor(batch, False)['inputs'][:1]
        calibration = calibration_images(model, cfg, args.images, inputs.shape[-2:])
        # A segmentor's logits are resized before the arg-max, as in PyTorch.
        options = dict(logits=hasattr(model, 'postprocess_result'))
        reports = {'float32': export_onnx(model, inputs, folder / 'float32.onnx', **options)}
        for name, method, target in variants(args.methods, args.targets):
            int8 = Int8(calibration, target=target, method=method)
            path = folder / f'{name}.onnx'
            reports[name] = export_onnx(model, inputs, path, **options, int8=int8)
        names = tuple(reports['float32'].output_shapes)

        def load(path: Path) -> FileModel:
            return FileModel(model, onnxruntime_run(path), names)

        if args.drop is not None:
            with metric_kept(cfg, args.drop, reports['float32'].path, load) as accepts:
                auto = Int8(
                    calibration, target=args.targets[0], method=args.methods[0], accepts=accepts
                )
                path = folder / 'int8_auto.onnx'
                reports['int8_auto'] = export_onnx(model, inputs, path, **options, int8=auto)
        files = {name: load(report.path) for name, report in reports.items()}
        found = score(cfg, {'PyTorch': model, **files})
    return dict(
        arm=run.arm.name,
        lr=run.lr,
        seed=run.seed,
        images=args.images,
        methods=args.methods,
        targets=args.targets,
        drop=args.drop,
        kept={name: report.int8.kept for name, report in reports.items() if report.int8},
        metrics={name: numbers(metrics) for name, metrics in found.items()},
    )


def variants(methods: list[str], targets: list[str]) -> list[tuple[str, str, str]]:
    """Return names, methods and targets of the int8 files."""
    return [
        ('int8', methods[0], targets[0]),
        *((f'int8_{method}', method, targets[0]) for method in methods[1:]),
        *((f'int8_{target}', methods[0], target) for target in targets[1:]),
    ]


def runs(study: Study, arms: list[str] | None) -> list[Run]:
    """Return the runs that have results."""
    found = []
    for name in arms or study.arms:
        arm = study.arm(name)
        for path in sorted((study.results_dir / name).glob('*.json')):
            result = read_result(path)
            if result and result['status'] == 'ok':
                found.append(Run(arm, result['lr'], result['seed']))
    return found


def _settings(found: Mapping | None) -> dict:
    """Return the options that results depend on."""
    return {key: (found or {}).get(key) for key in ('images', 'methods', 'targets', 'drop')}


def _values(results: list[dict], kind: str, metric: str) -> list[float]:
    """Return a metric of each run, or [] if one lacks it; without detections int8 has 0."""
    if not all(kind in r['metrics'] for r in results):
        return []
    values = [r['metrics'][kind].get(metric) for r in results]
    if kind in ('PyTorch', 'float32') and None in values:
        return []
    return [value or 0.0 for value in values]


def table(study: Study) -> str:
    """Return a Markdown table of all results: means over seeds, of what all seeds have."""
    rows: dict[tuple, list[dict]] = {}
    for path in sorted((study.results_dir / 'int8').glob('*.json')):
        result = read_result(path)
        # Runs with other options are not averaged.
        settings = json.dumps(_settings(result))
        rows.setdefault((result['arm'], result['lr'], settings), []).append(result)
    # In the order PyTorch, float32, int8, and int8 of further methods.
    found = {kind: None for results in rows.values() for r in results for kind in r['metrics']}
    head = ['arm', 'learning rate', 'seeds', *found, 'int8 minus float32, by seed']
    lines = []
    for (arm, lr, _), results in sorted(rows.items()):
        scores = {kind: _values(results, kind, study.metric) for kind in found}
        places = 4 if max(scores['PyTorch'], default=0) <= 1 else 2
        # Either is empty if a run lacks it.
        lost = [b - a for a, b in zip(scores['float32'], scores['int8'], strict=False)]
        means = [f'{statistics.mean(v):.{places}f}' if v else '-' for v in scores.values()]
        by_seed = ', '.join(f'{value:+.{places}f}' for value in lost)
        lines.append([arm, f'{lr:g}', len(results), *means, by_seed])
    return markdown_table(head, lines)


@tool(parse_args)
def main(args: argparse.Namespace) -> None:
    study = load_study(args.study)
    for run in [] if args.report_only else runs(study, args.arms):
        path = study.results_dir / 'int8' / f'{run.arm.name}_{run.name}.json'
        checkpoint = find_latest_checkpoint(str(study.work_dir / run.arm.name / run.name))
        if checkpoint is None or _settings(read_result(path)) == _settings(vars(args)):
            continue
        result = evaluate(study, run, checkpoint, args)
        write_json(result, path)
        scores = {name: m.get(study.metric, 0) for name, m in result['metrics'].items()}
        print(f'{run}: ' + ', '.join(f'{name} {score:g}' for name, score in scores.items()))
    print(table(study))


if __name__ == '__main__':
    main()
