"""Contract an expanded checkpoint into a verified compact checkpoint and config."""

import argparse
from pathlib import Path

from torch import Tensor

from mmexpand.mm.checkpoints import match_checkpoint, unwrap
from mmexpand.mm.command_line import add_common_arguments, count, load_config, tool
from mmexpand.mm.contraction import (
    Contraction,
    check_writable,
    contract_and_check,
    contract_without_data,
    report_lines,
    warn_of_outliers,
    write_compact_checkpoint,
    write_compact_config,
)
from mmexpand.mm.error_report import suits_shape
from mmexpand.mm.launch import build_runner
from mmexpand.mm.models import build_expanded_model, configured_expansions, expand_as_configured
from mmexpand.surgery.checkpoint import (
    CheckpointError,
    get_state_dict,
    is_expanded_state_dict,
    load_checkpoint,
)
from mmexpand.surgery.fake_quantisation import INT8_KEY

KEPT = ('dataset_meta', 'epoch', 'iter', 'seed', INT8_KEY)
"""Keys of an expanded checkpoint's meta that the compact one has too."""


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config that the checkpoint was trained with')
    parser.add_argument('checkpoint', help='expanded checkpoint file')
    parser.add_argument(
        '--shape',
        type=count,
        nargs=2,
        metavar=('H', 'W'),
        help='verify on random images of this size, without reading a data set or evaluating',
    )
    add_common_arguments(parser)
    return parser.parse_args()


def load_expanded(path: str) -> dict:
    checkpoint = load_checkpoint(path)
    if not is_expanded_state_dict(get_state_dict(checkpoint)):
        raise CheckpointError(f'{path} is compact already; name an expanded checkpoint')
    weights = get_state_dict(checkpoint).values()
    if not all(value.isfinite().all() for value in weights if isinstance(value, Tensor)):
        raise CheckpointError(
            f'{path}: its weights are not finite, since training has diverged; use an older one'
        )
    return checkpoint


def contract(args: argparse.Namespace, cfg, checkpoint: dict) -> Contraction:  # noqa: ANN001
    if args.shape:
        model = build_expanded_model(cfg)
        match_checkpoint(model, checkpoint)
        model.load_state_dict(get_state_dict(checkpoint))
        with suits_shape(args.shape):
            return contract_without_data(model, *args.shape)
    runner = build_runner(cfg, ('val',))
    model = unwrap(runner.model)
    expand_as_configured(model, cfg)
    match_checkpoint(model, checkpoint)
    model.load_state_dict(get_state_dict(checkpoint))
    return contract_and_check(model, runner)


@tool(parse_args)
def main(args: argparse.Namespace) -> None:
    checkpoint = load_expanded(args.checkpoint)
    cfg = load_config(args)
    cfg.load_from, cfg.resume = None, False  # The weights are those of the checkpoint.
    if not configured_expansions(cfg):
        raise CheckpointError(
            f'{args.checkpoint} is of an expanded model, and {args.config} expands nothing: use '
            'the config that it was trained with'
        )
    check_writable(cfg.work_dir)
    result = contract(args, cfg, checkpoint)
    path = Path(cfg.work_dir) / f'compact_{Path(args.checkpoint).name}'
    meta = checkpoint.get('meta', {})
    kept = {key: meta[key] for key in KEPT if key in meta}
    written = write_compact_checkpoint(result, path, cfg, kept)
    written.append(write_compact_config(cfg, path.parent))
    print('\n'.join(report_lines(path.name, result)))
    warn_of_outliers(path.name, result)
    print(f'wrote {", ".join(map(str, written))}')


if __name__ == '__main__':
    main()
