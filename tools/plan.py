"""Show which layers of a config's model are expanded, into what, and at what cost."""

import argparse
from dataclasses import replace

import torch
from mmengine.config import Config
from rich.console import Console
from rich.table import Table

import mmexpand
from mmexpand.analysis.complexity import layer_costs
from mmexpand.mm.command_line import add_config_arguments, count, read_config, tool
from mmexpand.mm.config_file import ConfigError
from mmexpand.mm.error_report import suits_shape
from mmexpand.mm.lost_hooks import warn_of_lost_hooks
from mmexpand.mm.models import (
    build_compact_model,
    expand_wishes,
    input_channels,
    tensor_outputs,
)
from mmexpand.mm.trial import try_training


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config file path')
    parser.add_argument('--method', help='plan for this method, whatever the config says')
    parser.add_argument('--rate', type=float, help='likewise the expansion rate')
    parser.add_argument('--include', nargs='+', help='likewise the layers')
    parser.add_argument('--exclude', nargs='+', help='likewise the layers to leave out')
    parser.add_argument(
        '--shape',
        type=count,
        nargs=2,
        default=[512, 512],
        help='input height and width for the MACs',
    )
    parser.add_argument('--batch-size', type=count, default=1, help='images for the MACs')
    parser.add_argument(
        '--dry-run',
        action='store_true',
        help="train one iteration on the config's data, and rehearse the contraction",
    )
    add_config_arguments(parser)
    return parser.parse_args()


def given_options(args: argparse.Namespace) -> dict:
    keys = ('method', 'rate', 'include', 'exclude')
    return {key: getattr(args, key) for key in keys if getattr(args, key) is not None}


def wishes(args: argparse.Namespace, cfg: Config) -> list:
    given, found = given_options(args), expand_wishes(cfg)
    if found:
        return [(name, replace(wish, **given)) for name, wish in found]
    if not given:
        raise ConfigError(f'{args.config} expands nothing; say what to plan for, e.g. --method cl')
    return [('', mmexpand.ExpandConfig(**given))]


def show_layers(plans: list, costs: dict) -> Table:
    table = Table(title='Expanded layers; MACs of one forward pass in millions')
    for column in ('layer', 'method', 'rate', 'factors (out, in, kh, kw)', 'auto'):
        table.add_column(column, overflow='fold')
    for column in ('params', 'expanded', 'MACs', 'layerwise', 'auto'):
        table.add_column(column, justify='right')
    for prefix, plan in plans:
        for layer in plan:
            name = f'{prefix}.{layer.name}'.lstrip('.')
            cost = costs.get(name)
            macs = (
                [
                    f'{m / 1e6:,.2f}'
                    for m in (cost.macs_compact, cost.macs_layerwise, cost.macs_auto)
                ]
                if cost
                else ['not reached'] * 3
            )
            table.add_row(
                name,
                layer.method.upper(),
                f'{layer.rate:g}',
                ' '.join('x'.join(map(str, shape)) for shape in layer.factor_shapes),
                cost.runs if cost else '',
                f'{layer.params_before:,}',
                f'{layer.params_after:,}',
                *macs,
            )
    return table


def show_skipped(plans: list) -> Table:
    table = Table('layer', 'reason', title='Left as they are')
    for prefix, plan in plans:
        for layer in plan.skipped:
            table.add_row(f'{prefix}.{layer.name}'.lstrip('.'), layer.reason)
    return table


@tool(parse_args)
def main(args: argparse.Namespace) -> None:
    cfg = read_config(args, 'model')
    model = build_compact_model(cfg)
    before = sum(parameter.numel() for parameter in model.parameters())
    warn_of_lost_hooks(cfg)
    plans = [
        (name, mmexpand.expand_(model.get_submodule(name), wish))
        for name, wish in wishes(args, cfg)
    ]
    images = torch.randn(args.batch_size, input_channels(model), *args.shape)
    with suits_shape(args.shape):
        costs = layer_costs(model, lambda m: tensor_outputs(m, dict(inputs=images)))
    console = Console(width=None if Console().is_terminal else 200)
    console.print(show_layers(plans, costs))
    console.print(show_skipped(plans))
    after = sum(parameter.numel() for parameter in model.parameters())
    console.print(f'Parameters of the model: {before:,} compact, {after:,} while it is trained')
    console.print(
        f'MACs of the expanded layers at {"x".join(map(str, images.shape))}: '
        + ', '.join(
            f'{sum(getattr(c, f"macs_{kind}") for c in costs.values()) / 1e6:,.2f}M {kind}'
            for kind in ('compact', 'layerwise', 'auto')
        )
    )
    if args.dry_run:
        trial = try_training(cfg, given_options(args))
        held = '' if trial.memory is None else f', at most {trial.memory / 2**20:,.0f} MiB held'
        console.print(
            f'Dry run: one iteration trained (loss {trial.loss:.4g}{held}), contracted, verified '
            'and evaluated'
        )


if __name__ == '__main__':
    main()
