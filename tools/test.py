"""Test the compact network of an expanded or compact checkpoint, with either config."""

import argparse
import os
from pathlib import Path

from mmengine.evaluator import DumpResults

from mmexpand.mm.command_line import add_common_arguments, load_config, tool
from mmexpand.mm.compact_config import type_name
from mmexpand.mm.config_file import ConfigError, check_keys
from mmexpand.mm.contraction import check_writable
from mmexpand.mm.datasets import innermost
from mmexpand.mm.launch import build_runner


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config file path, expanded or compact')
    parser.add_argument('checkpoint', help='checkpoint file, expanded or compact')
    add_common_arguments(parser)
    parser.add_argument('--out', help='dump predictions to this pickle file')
    parser.add_argument('--show', action='store_true', help='show prediction results')
    parser.add_argument('--show-dir', help='folder for images with predictions')
    parser.add_argument(
        '--wait-time', type=float, default=2, help='seconds between shown images (default: 2)'
    )
    parser.add_argument('--tta', action='store_true', help="test with the config's tta_model")
    args = parser.parse_args()
    if args.out and not args.out.endswith(('.pkl', '.pickle')):
        parser.error(f'--out must be a .pkl file, got {args.out}')
    return args


def draw_predictions(cfg, args: argparse.Namespace) -> None:  # noqa: ANN001
    hook = cfg.get('default_hooks', {}).get('visualization')
    if hook is None:
        raise ConfigError(f'{args.config} has no default_hooks.visualization, which draws; add it')
    check_keys(cfg, 'visualizer')
    if args.show_dir:
        # mmdet's hook takes a relative path for a folder in the work dir.
        args.show_dir = os.path.abspath(args.show_dir)
        check_writable(args.show_dir, '--show-dir')
    if type_name(hook) == 'VisualizationHook':  # mmpretrain's
        hook.update(enable=True, interval=1, show=args.show, wait_time=args.wait_time)
        hook.out_dir = args.show_dir
        return
    hook.update(draw=True, show=args.show, wait_time=args.wait_time)
    if args.show_dir:
        cfg.visualizer.save_dir = args.show_dir
        if type_name(hook) == 'DetVisualizationHook':
            hook.test_out_dir = args.show_dir


def use_tta(cfg) -> None:  # noqa: ANN001
    check_keys(cfg, 'tta_model', 'tta_pipeline')
    for dataset in innermost(cfg.test_dataloader.dataset):
        dataset.pipeline = cfg.tta_pipeline
    cfg.tta_model.module = cfg.model
    cfg.model = cfg.tta_model


@tool(parse_args)
def main(args: argparse.Namespace) -> None:
    cfg = load_config(args)
    cfg.load_from, cfg.resume = args.checkpoint, False
    if args.show or args.show_dir:
        draw_predictions(cfg, args)
    if args.out:
        check_writable(Path(args.out).parent, '--out')
    if args.tta:
        use_tta(cfg)
    runner = build_runner(cfg, ('test',))
    dump = DumpResults(out_file_path=args.out) if args.out else None
    if dump:
        runner.test_evaluator.metrics.append(dump)
    runner.test()
    if dump and hasattr(runner.test_evaluator, 'dataset_prefixes'):
        # With one metric per data set, the loop does not call DumpResults, which has all results.
        dump.evaluate(len(runner.test_dataloader.dataset))


if __name__ == '__main__':
    main()
