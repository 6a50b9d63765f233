"""Convert a darknet weight file to a checkpoint for an mmdet config."""

import argparse
from pathlib import Path

from mmdet.registry import DATASETS, MODELS
from mmengine.config import Config
from mmengine.registry import init_default_scope

from mmexpand.errors import UserValueError
from mmexpand.mm.command_line import add_config_arguments, read_config, tool
from mmexpand.mm.contraction import check_writable
from mmexpand.models.darknet import load_darknet_weights
from mmexpand.surgery.checkpoint import save_checkpoint

ROOT = Path(__file__).parents[2]
DEFAULT_CONFIG = ROOT / 'configs/yolo_lite/yolo-lite_1xb64-600k_voc0712-224x224.py'


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('src', help='darknet weight file')
    parser.add_argument('dst', help='checkpoint to write')
    parser.add_argument('--config', default=DEFAULT_CONFIG, help='config of the network')
    add_config_arguments(parser)
    return parser.parse_args()


def convert(cfg: Config, src: str, dst: str) -> int:
    """Write the checkpoint, and return its number of parameters."""
    init_default_scope(cfg.get('default_scope') or 'mmdet')
    model = MODELS.build(cfg.model)
    state_dict = load_darknet_weights(src, model)
    model.load_state_dict(state_dict, strict=True)

    # Only the names of the classes: nothing is read from the data root.
    metainfo = DATASETS.build({**cfg.test_dataloader.dataset, 'lazy_init': True}).metainfo
    if len(metainfo['classes']) != model.bbox_head.num_classes:
        raise UserValueError(
            f'The network has {model.bbox_head.num_classes} classes, the test data set of the '
            f'config {len(metainfo["classes"])}: set model.bbox_head.num_classes or '
            'test_dataloader.dataset.metainfo.classes.'
        )
    dataset_meta = dict(classes=metainfo['classes'], palette=metainfo['palette'])

    check_writable(Path(dst).parent, 'DST')
    save_checkpoint(dict(meta=dict(dataset_meta=dataset_meta), state_dict=model.state_dict()), dst)
    return sum(value.numel() for value in state_dict.values())


@tool(parse_args)
def main(args: argparse.Namespace) -> None:
    cfg = read_config(args, 'model', 'test_dataloader')
    num_parameters = convert(cfg, args.src, args.dst)
    print(f'{args.dst}: {num_parameters} parameters from {args.src}')


if __name__ == '__main__':
    main()
