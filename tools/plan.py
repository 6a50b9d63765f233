"""Show the expanded layers of a config's model, their blocks and their cost."""

import argparse

import torch

import mmexpand
from mmexpand.analysis.complexity import layer_costs
from mmexpand.mm.command_line import (
    add_config_arguments,
    add_expansion_arguments,
    count,
    expansion_of,
    read_config,
    tool,
)
from mmexpand.mm.config_file import ConfigError
from mmexpand.mm.dry_run_training import dry_run_training
from mmexpand.mm.error_report import suits_shape
from mmexpand.mm.lost_hooks import warn_of_lost_hooks
from mmexpand.mm.models import (
    build_compact_model,
    configured_expansions,
    input_channels,
    set_expansion,
    tensor_outputs,
)
from mmexpand.surgery.plan_table import describe_plan


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config file path')
    parser.add_argument(
        '--shape',
        type=count,
        nargs=2,
        default=[512, 512],
        help='input height and width for the MACs (default: 512 512)',
    )
    parser.add_argument(
        '--batch-size', type=count, default=1, help='images for the MACs (default: 1)'
    )
    parser.add_argument(
        '--dry-run',
        action='store_true',
        help="train one iteration on the config's data, then contract, verify and evaluate",
    )
    add_expansion_arguments(parser)
    add_config_arguments(parser)
    return parser.parse_args()


def describe(plans: list, costs: dict) -> str:
    kinds = ('compact', 'layerwise', 'auto')
    cells = {
        name: [f'{getattr(cost, f"macs_{kind}") / 1e6:,.2f}' for kind in kinds]
        for name, cost in costs.items()
    }
    notes = {name: cost.runs for name, cost in costs.items()}
    title = 'Expanded layers, factors (out, in, kh, kw) below; MACs in millions, -: not reached'
    parts = [(name, plan.layers, plan.skipped) for name, plan in plans]
    return f'{title}\n{describe_plan(parts, ("MACs", "layerwise", "auto"), cells, notes)}'


@tool(parse_args)
def main(args: argparse.Namespace) -> None:
    cfg = read_config(args, 'model')
    warn_of_lost_hooks(cfg)
    set_expansion(cfg, expansion_of(args))
    expansions = configured_expansions(cfg)
    if not expansions:
        raise ConfigError(
            f'{args.config} expands nothing; add --method repvgg (for networks with batch norms) '
            'or --method bn (without)'
        )
    model = build_compact_model(cfg)
    before = sum(parameter.numel() for parameter in model.parameters())
    plans = [
        (name, mmexpand.expand_(model.get_submodule(name), expansion))
        for name, expansion in expansions
    ]
    images = torch.randn(args.batch_size, input_channels(model), *args.shape)
    with suits_shape(args.shape):
        costs = layer_costs(model, lambda m: tensor_outputs(m, dict(inputs=images)))
    print(describe(plans, costs))
    after = sum(parameter.numel() for parameter in model.parameters())
    print(f'Parameters of the model: {before:,} compact, {after:,} expanded')
    print(
        f'MACs of the expanded layers at {"x".join(map(str, images.shape))}: '
        + ', '.join(
            f'{sum(getattr(c, f"macs_{kind}") for c in costs.values()) / 1e6:,.2f}M {kind}'
            for kind in ('compact', 'layerwise', 'auto')
        )
    )
    if args.dry_run:
        done = dry_run_training(cfg)
        print(f'Start: {done.start}')
        held = '' if done.memory is None else f', at most {done.memory / 2**20:,.0f} MiB held'
        print(
            f'Dry run: one iteration trained (loss {done.loss:.4g}{held}), contracted, verified '
            'and evaluated'
        )


if __name__ == '__main__':
    main()
