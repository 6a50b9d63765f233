"""Draw predictions beside the ground truth: boxes of a detector, masks of a segmentor.

An expanded checkpoint is contracted first.
"""

import argparse
from pathlib import Path

import mmcv
import torch
from mmengine.dataset import pseudo_collate
from mmengine.registry import DATASETS, VISUALIZERS
from mmengine.utils import track_iter_progress

from mmexpand.deploy import load_compact_model
from mmexpand.mm.command_line import add_config_arguments, count, device, read_config, tool
from mmexpand.mm.contraction import check_writable
from mmexpand.mm.datasets import check_datasets, guard_pipelines


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config file path')
    parser.add_argument('checkpoint', help='checkpoint file, expanded or compact')
    parser.add_argument('--out-dir', required=True, help='directory for the pictures')
    parser.add_argument('--num', type=count, default=10, help='number of images of the test set')
    parser.add_argument('--device', type=device, default='cpu', help='default: %(default)s')
    add_config_arguments(parser)
    return parser.parse_args()


@tool(parse_args)
def main(args: argparse.Namespace) -> None:
    cfg = read_config(args, 'model', 'test_dataloader', 'visualizer')
    check_writable(args.out_dir, '--out-dir')
    check_datasets(cfg, ('test',))
    model = load_compact_model(cfg, args.checkpoint).to(args.device)
    dataset = DATASETS.build(cfg.test_dataloader.dataset)
    guard_pipelines(dataset)
    # No backends, which would require a work dir: add_datasample writes out_file alone.
    visualizer = VISUALIZERS.build({'name': 'browse', **cfg.visualizer, 'vis_backends': None})
    visualizer.dataset_meta = dataset.metainfo
    for index in track_iter_progress(range(min(args.num, len(dataset)))):
        with torch.no_grad():
            (sample,) = model.test_step(pseudo_collate([dataset[index]]))
        path = Path(sample.img_path)
        image = mmcv.imread(str(path), channel_order='rgb')
        # Numbered, since images in several folders may have equal names.
        out_file = Path(args.out_dir) / f'{index:05}_{path.stem}.png'
        visualizer.add_datasample(path.stem, image, sample, out_file=str(out_file))
    print(f'\nground truth (left) and prediction (right) are in {args.out_dir}')


if __name__ == '__main__':
    main()
