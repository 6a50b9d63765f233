"""Print Table 6 of the paper, counted on the expanded networks, beside the paper's figures.

SmallNet with four 7x7 convolutions, on one CIFAR image. MACs are those of convolutions and linear
layers, the paper's chain layer by layer; the paper also counts others, such as batch norm.
"""

import argparse
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import mmexpand
from mmexpand import ExpandConfig
from mmexpand.mm.command_line import add_debug_argument, tool
from mmexpand.models import SmallNet

METHODS = {
    'SmallNet': None,
    'FC (Arora18)': dict(method='fc', include='classifier.0'),
    'ExpandNet-CL': dict(method='cl'),
    'ExpandNet-CK': dict(method='ck'),
}

PAPER = {
    ('SmallNet', None): ('150.35K', 6.12),
    ('FC (Arora18)', 2): ('339.40K', 6.30),
    ('FC (Arora18)', 4): ('675.91K', 6.64),
    ('FC (Arora18)', 8): ('1.74M', 7.70),
    ('ExpandNet-CL', 2): ('562.95K', 25.16),
    ('ExpandNet-CL', 4): ('2.17M', 98.39),
    ('ExpandNet-CL', 8): ('8.58M', 389.35),
    ('ExpandNet-CK', 2): ('237.72K', 14.38),
    ('ExpandNet-CK', 4): ('653.25K', 42.64),
    ('ExpandNet-CK', 8): ('2.07M', 141.10),
}
"""Parameters, and MACs in millions, by method and rate."""


@dataclass(frozen=True)
class Row:
    """One cell of the table, here and in the paper; MACs in millions."""

    method: str
    rate: int | None
    parameters: int
    macs: float
    paper_parameters: str
    paper_macs: float

    @property
    def parameters_in_words(self) -> str:
        """Return parameters in the paper's units."""
        if self.parameters >= 1e6:
            return f'{self.parameters / 1e6:.2f}M'
        return f'{self.parameters / 1e3:.2f}K'


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_debug_argument(parser)
    return parser.parse_args()


def network(method: str, rate: int | None) -> nn.Module:
    model = SmallNet(kernel_size=7, channels=(8, 16, 32, 64))
    if METHODS[method]:
        config = ExpandConfig(rate=rate, init='default', forward='layerwise', **METHODS[method])
        mmexpand.expand_(model, config)
    return model.train()  # In eval mode a unit is one convolution.


def rows() -> list[Row]:
    """Return the rows of the table: each network is built and run."""
    found = []
    for (method, rate), figures in PAPER.items():
        model = network(method, rate)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(torch.zeros(1, 3, 32, 32))
        parameters = sum(parameter.numel() for parameter in model.parameters())
        # The paper counts multiplications and additions as operations.
        found.append(Row(method, rate, parameters, counter.get_total_flops() / 2e6, *figures))
    return found


@tool(parse_args)
def main(args: argparse.Namespace) -> None:
    table = Table('network', title=__doc__.splitlines()[0])
    for column in ('r', 'parameters', "paper's", 'MACs', "paper's", 'difference'):
        table.add_column(column, justify='right')
    for row in rows():
        table.add_row(
            row.method,
            str(row.rate or ''),
            f'{row.parameters:,} ({row.parameters_in_words})',
            row.paper_parameters,
            f'{row.macs:.2f}M',
            f'{row.paper_macs:.2f}M',
            f'{row.macs / row.paper_macs - 1:+.2%}',
        )
    Console(width=None if Console().is_terminal else 120).print(table)


if __name__ == '__main__':
    main()
