"""Errors of users, over all tools: one message with problem, value and fix."""

import json
import logging
import os
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from PIL import Image

import mmexpand
from mmexpand.mm import command_line
from mmexpand.mm.models import build_expanded_model
from tests.conftest import small_config
from tests.tools_in_process import TOOLS, load, run

ROOT = Path(__file__).parents[2]
VOC = ROOT / 'configs/demo/yolo-lite_2xb8-400iters_drawn-voc-160x160.py'
TRAIN = 'train.py {CONFIG} --work-dir {OUT}'
PLAIN = 'train.py {PLAIN} --work-dir {OUT}'
DETECT = 'train.py {VOC} --work-dir {OUT}'
TEST = 'test.py {CONFIG} {EXPANDED} --work-dir {OUT}'
CONTRACT = 'contract.py {CONFIG} {EXPANDED} --work-dir {OUT}'
SHAPE = '--shape 32 48'
EXPORT = 'export_onnx.py {CONFIG} {EXPANDED} --out {KEPT}/net.onnx --image {IMAGE}'
BROWSE = 'analysis_tools/browse_results.py {PLAIN} {EXPANDED} --out-dir {OUT}'
PLOT = 'analysis_tools/plot_curves.py'
BENCHMARK = 'analysis_tools/benchmark_training.py'
DARKNET = 'model_converters/darknet2mmdet.py'
PRETRAINED = '--cfg-options model.backbone.init_cfg.type=Pretrained'
DATA = '--cfg-options train_dataloader.dataset.data_root'
NOT_EMPTY = 'train_dataloader.dataset.filter_cfg.filter_empty_gt=True'
CLASSES = '--cfg-options train_dataloader.dataset.metainfo.classes'
WRONG_XML = 'train_dataloader.dataset.data_root={DATA}/wrong_xml/'

CASES = [
    # config: the file
    ('train.py {NONE}.py', r'none\.py: no such config file'),
    ('train.py {BAD}/syntax.py', r'syntax\.py cannot be read.*SyntaxError'),
    ('train.py {BAD}/names.py', r'names\.py cannot be read.*undefined_name'),
    ('train.py {BAD}/baseless.py', r'baseless\.py cannot be read.*nowhere\.py'),
    ('train.py {BAD}/config.txt', r'config\.txt cannot be read.*supported'),
    ('train.py {BAD}', 'no such config'),
    ('train.py {BAD}/empty.py', r'empty\.py lacks model'),
    ('train.py {BAD}/part.py --work-dir {OUT}', 'lacks train_dataloader, train_cfg, optim_wrapper'),
    ('test.py {BAD}/part.py {EXPANDED} --work-dir {OUT}', 'lacks test_dataloader'),
    ('plan.py {NONE}.py', r'none\.py: no such config'),
    ('plan.py {BAD}/empty.py', r'empty\.py lacks model'),
    ('contract.py {NONE}.py {EXPANDED}', r'none\.py: no such config'),
    (
        'export_onnx.py {NONE}.py {EXPANDED} --out {OUT}/x.onnx --image {IMAGE}',
        r'none\.py: no such config',
    ),
    (f'{BENCHMARK} --config {{NONE}}.py', r'none\.py: no such config'),
    (f'{DARKNET} {{DARKNET}} {{KEPT}}/net.pth --config {{NONE}}.py', r'none\.py: no such config'),
    # config: keys and types
    (f'{TRAIN} --cfg-options train_cfg.max_iter=4', 'IterBasedTrainLoop cannot be.*max_iter'),
    (
        f'{TRAIN} --cfg-options optim_wrapper.optimizer.type=SGDD',
        "'SGDD' is not a registered optimizer.*SGD",
    ),
    (f'{TRAIN} --cfg-options model.backbone.type=UNett', 'have no UNett; near matches: UNet'),
    (f'{TRAIN} --cfg-options model.backbone.type=Quartz', 'have no Quartz; no near matches'),
    (f'{TRAIN} --cfg-options custom_hooks.0.type=ExpandHok', 'near matches: ExpandHook'),
    (
        f"{TRAIN} --cfg-options custom_hooks=[dict(type='ExpandHook')]",
        'custom_hooks, which is a list of dicts.*default_hooks.expand.type=ExpandHook',
    ),
    (f'{TRAIN} --cfg-options model.backbone.depth=3', 'UNet cannot be built.*depth'),
    (f'{TRAIN} --cfg-options train_dataloader.dataset.type=Nowhere', 'no Nowhere.*custom_im'),
    (
        f'{TRAIN} --cfg-options custom_hooks.0.rates=4',
        "unknown option 'rates' of ExpandHook.*near matches: rate",
    ),
    (f'{TRAIN} --cfg-options custom_hooks.0.rate=0', 'rate must be'),
    (f'{TRAIN} --cfg-options custom_hooks.0.rate=four', 'rate must be'),
    (f'{TRAIN} --cfg-options custom_hooks.0.method=cx', 'method must be one of'),
    (f'{TRAIN} --cfg-options custom_hooks.0.init=zero', 'init must be one of'),
    (f'{TRAIN} --cfg-options custom_hooks.0.forward=fast', 'forward must be one of'),
    (f'{TRAIN} --cfg-options custom_hooks.0.include=5', 'include must be a pattern'),
    (f'{TRAIN} --cfg-options custom_hooks.9.rate=3', '--cfg-options does not fit'),
    (f'{TRAIN} --auto-scale-lr', r'auto_scale_lr\.base_batch_size'),
    # pattern and rate
    (f'{TRAIN} --cfg-options custom_hooks.0.include=backbone.encodr', 'near matches: backbone.enc'),
    (f'{TRAIN} --cfg-options custom_hooks.0.method=ck', '3x3'),
    (
        f'{TRAIN} --cfg-options custom_hooks.0.init=preserve custom_hooks.0.rate=0.5',
        'cannot preserve the weight of',
    ),
    ('plan.py {CONFIG} --include head.none', 'matches no convolution'),
    ('plan.py {CONFIG} --include re:[', "include='re:\\[' is not a regular expression"),
    ('plan.py {CONFIG} --rate -1', 'rate must be'),
    ('plan.py {CONFIG} --method cx', 'method must be one of'),
    ('plan.py {CONFIG} --method fc', 'nothing to expand'),
    ('plan.py {PLAIN}', 'expands nothing; add --method repvgg'),
    ('contract.py {PLAIN} {EXPANDED} --work-dir {OUT}', 'expands nothing'),
    ('contract.py {PLAIN} {EXPANDED} --work-dir {OUT} ' + SHAPE, 'expands nothing'),
    (f'{BENCHMARK} --config {{PLAIN}}', 'expands nothing'),
    (f'{BENCHMARK} --rates 0', 'rate must be'),
    # data set
    (f'{TRAIN} {DATA}={{NONE}}', 'train_dataloader.dataset: data_root not found.*none.*=DIR'),
    (f'{TRAIN} --cfg-options train_dataloader.dataset.ann_file=none.txt', 'ann_file not found'),
    (f'{PLAIN} {DATA}={{DATA}}/no_samples', 'CityscapesDataset finds no samples.*leftImg8bit'),
    (f'{DETECT} --cfg-options train_dataloader.dataset.ann_file=none.txt', 'ann_file not found'),
    (f'{DETECT} --cfg-options train_dataloader.dataset.ann_file={{BAD}}/empty.py', 'is empty'),
    ('test.py {PLAIN} {COMPACT} --cfg-options test_dataloader.dataset.data_root={NONE}', 'not fo'),
    (f'{BROWSE} --cfg-options test_dataloader.dataset.data_root={{NONE}}', 'data_root not found'),
    # annotations and images
    (f'{DETECT} {DATA}={{DATA}}/broken_xml/', r'1\.xml: .*ParseError.*fix the file'),
    (f'{DETECT} {DATA}={{DATA}}/missing_xml/', r'1\.xml'),
    (f'{DETECT} {DATA}={{DATA}}/wrong_xml/', r'1\.xml: .*forty.*fix the file'),
    (f'{PLAIN} {DATA}={{DATA}}/missing_mask', r'labelTrainIds\.png cannot be .*no such file'),
    (f'{PLAIN} {DATA}={{DATA}}/small_mask', '16x24 pixels, but its image .*32x48'),
    (f'{PLAIN} {DATA}={{DATA}}/truncated_mask', r'labelTrainIds\.png cannot be read by LoadAnn'),
    (f'{PLAIN} {DATA}={{DATA}}/text_image', r'leftImg8bit\.png cannot be read by LoadImage'),
    (
        f'{PLAIN} {DATA}={{DATA}}/text_image train_dataloader.num_workers=1',
        r'leftImg8bit\.png cannot be read by LoadImage',
    ),
    (f'{PLAIN} {DATA}={{DATA}}/other_label', 'have a label 77.*num_classes'),
    (f'{PLAIN} {CLASSES}=road', r"classes='road' is a text.*classes=\('road',\)"),
    (f'{DETECT} {CLASSES}=car {WRONG_XML}', r"classes='car' is a text.*classes=\('car',\)"),
    (
        f'{DETECT} {CLASSES}=bus {WRONG_XML} {NOT_EMPTY}',
        r"classes='bus' is a text.*classes=\('bus',\)",
    ),
    (
        f'{CONTRACT} --cfg-options val_dataloader.dataset.data_root={{DATA}}/text_mask',
        r'labelTrainIds\.png cannot be read by LoadAnn',
    ),
    (
        f'{BROWSE} --cfg-options test_dataloader.dataset.data_root={{DATA}}/text_image',
        r'leftImg8bit\.png cannot be read by LoadImage',
    ),
    (EXPORT.replace('{IMAGE}', '{NONE}.png'), r'none\.png: no such image'),
    (
        f'{EXPORT} --preprocess rgb --cfg-options '
        'test_dataloader.dataset.pipeline.0.type=Normalize',
        'the test pipeline has Normalize.*leave out --preprocess',
    ),
    (EXPORT.replace('{IMAGE}', '{BAD}/config.txt'), r'config\.txt cannot be decoded as an image'),
    # checkpoint
    (f'{TRAIN} --resume {{NONE}}.pth', r'none\.pth: no such checkpoint'),
    (f'{TRAIN} --resume {{CHECKPOINTS}}/truncated.pth', r'truncated\.pth .*truncated'),
    (f'{TRAIN} --resume {{CHECKPOINTS}}/page.pth', r'page\.pth is a web page.*download'),
    (f'{TRAIN} --resume {{COMPACT}}', 'cannot be resumed; start from its weights with load_from'),
    (f'{TRAIN} --cfg-options load_from={{NONE}}.pth', r'none\.pth: no such checkpoint'),
    (f'{TRAIN} {PRETRAINED} model.backbone.init_cfg.checkpoint={{NONE}}.pth', 'no such checkpoint'),
    (TEST.replace('{EXPANDED}', '{NONE}.pth'), r'none\.pth: no such checkpoint'),
    (TEST.replace('{EXPANDED}', '{CHECKPOINTS}/truncated.pth'), r'truncated\.pth .*truncated'),
    (TEST.replace('{EXPANDED}', '{CHECKPOINTS}/other.pth'), 'is of another network'),
    (TEST.replace('{EXPANDED}', '{CHECKPOINTS}/keys.pth'), 'holds no weights.*model, epoch'),
    (TEST.replace('{EXPANDED}', '{CHECKPOINTS}/list.pth'), 'holds a list'),
    (TEST.replace('{EXPANDED}', '{CHECKPOINTS}/code.pth'), 'could run code'),
    (f'{TEST} --cfg-options model.decode_head.num_classes=5', 'trained on 19 classes'),
    (CONTRACT.replace('{EXPANDED}', '{NONE}.pth'), r'none\.pth: no such checkpoint'),
    (CONTRACT.replace('{EXPANDED}', '{COMPACT}'), 'compact already'),
    (CONTRACT.replace('{EXPANDED}', '{CHECKPOINTS}/page.pth'), 'is a web page'),
    (f'{CONTRACT} {SHAPE} --cfg-options custom_hooks.0.rate=3', 'method, rate and include'),
    (CONTRACT.replace('{EXPANDED}', '{CHECKPOINTS}/nan.pth'), 'not finite.*use an older one'),
    (EXPORT.replace('{EXPANDED}', '{NONE}.pth'), r'none\.pth: no such checkpoint'),
    (EXPORT.replace('{EXPANDED}', '{CHECKPOINTS}/other.pth'), 'does not fit the config'),
    (BROWSE.replace('{EXPANDED}', '{CHECKPOINTS}/truncated.pth'), r'truncated\.pth .*truncated'),
    (f'{DARKNET} {{NONE}}.weights {{KEPT}}/net.pth', r'none\.weights'),
    (f'{DARKNET} {{DARKNET}} {{KEPT}}/net.pth', r'net\.weights: expected .* truncated'),
    (f'{DARKNET} {{EXPANDED}} {{KEPT}}/net.pth', 'not a darknet weight file'),
    # logs
    (f'{PLOT} {{NONE}} --out {{KEPT}}/curves.png', 'none'),
    (f'{PLOT} {{BAD}} --out {{KEPT}}/curves.png', 'name the work dir of a training'),
    (f'{PLOT} {{BAD}}/scalars.json --out {{KEPT}}/curves.png', r'scalars\.json, line 2'),
    (f'{PLOT} {{IMAGE}} --out {{KEPT}}/curves.png', r'\.png, line 1, holds no scalars'),
    (f'{PLOT} {{LOG}} --out {{KEPT}}/curves.png --keys mAP', "no 'mAP'; it logged"),
    # command line, and places to write
    ('train.py', 'arguments are required: config'),
    (f'{TRAIN} --ampp', 'unrecognized arguments: --ampp'),
    (f'{TRAIN} --launcher ssh', 'invalid choice'),
    (f'{TRAIN} --launcher slurm', 'unsupported; use --launcher pytorch'),
    (f'{TRAIN} --cfg-options nonsense', 'takes KEY=VALUE pairs.*nonsense'),
    (f'{TRAIN} --cfg-options a=[1,(2', 'takes KEY=VALUE pairs'),
    (f'{TRAIN} --cfg-options a=[dict(b=1,c=2)]', 'takes KEY=VALUE pairs'),
    ('train.py {CONFIG} --work-dir {BAD}/config.txt/x', 'cannot write to .*--work-dir'),
    (f'{TEST} --out predictions.txt', '--out must be a .pkl file'),
    (f'{TEST} --out {{BAD}}/config.txt/x.pkl', 'cannot write to .*--out'),
    (f'{TEST} --tta', 'lacks tta_model, tta_pipeline'),
    (f'{TEST} --show-dir {{OUT}}', r'default_hooks\.visualization'),
    (f'{CONTRACT} --shape 32', 'expected 2 arguments'),
    (f'{CONTRACT} --shape 0 48', "expected a whole number of at least 1, got '0'"),
    (f'{CONTRACT} --shape 1 1', 'cannot be run on images of 1x1.*--shape'),
    ('plan.py {CONFIG} --shape wide high', "got 'wide'"),
    ('plan.py {CONFIG} --shape 1 1', 'cannot be run on images of 1x1.*--shape'),
    (EXPORT.replace('{KEPT}/net.onnx', '{BAD}/config.txt/x/net.onnx'), 'cannot write to .*--out'),
    (f'{BROWSE} --num 0', 'whole number of at least 1'),
    (f'{BROWSE} --device cuda', 'no GPU'),
    (f'{PLOT} {{LOG}} --out {{KEPT}}/curves.doc', r'must be a picture.*png.*curves\.doc'),
    (f'{PLOT} {{LOG}} --out {{KEPT}}/curves.png --legend a b', '2 names for 1 runs'),
    (f'{BENCHMARK} --case resnet', 'invalid choice'),
    (f'{BENCHMARK} --steps 0', 'whole number of at least 1'),
    (f'{BENCHMARK} --config {{CONFIG}} --out-dir {{BAD}}/config.txt/x', 'cannot write to'),
    (f'{DARKNET} {{DARKNET}} {{BAD}}/config.txt/x/net.pth --cfg-options x', 'KEY=VALUE'),
]

XML = """<annotation><filename>{0}.jpg</filename>
<size><width>64</width><height>48</height><depth>3</depth></size>
<object><name>car</name><difficult>0</difficult>
<bndbox><xmin>5</xmin><ymin>5</ymin><xmax>40</xmax><ymax>30</ymax></bndbox></object></annotation>"""


def draw_voc(root: Path) -> None:
    year = root / 'VOC2007'
    for folder in ('JPEGImages', 'Annotations', 'ImageSets/Main'):
        (year / folder).mkdir(parents=True)
    for index in range(2):
        Image.new('RGB', (64, 48), 'grey').save(year / f'JPEGImages/{index}.jpg')
        (year / f'Annotations/{index}.xml').write_text(XML.format(index))
    for split in ('trainval', 'test'):
        (year / f'ImageSets/Main/{split}.txt').write_text('0\n1\n')


def damaged_data(root: Path, street: Path) -> None:
    """A data set for every kind of damage, each named by its folder."""
    mask = 'gtFine/train/town/town_0_gtFine_labelTrainIds.png'
    image = 'leftImg8bit/train/town/town_0_leftImg8bit.png'
    masks = ('missing_mask', 'small_mask', 'truncated_mask', 'text_mask', 'other_label')
    for name in (*masks, 'text_image', 'no_samples'):
        shutil.copytree(street, root / name)
    (root / 'missing_mask' / mask).unlink()
    Image.new('L', (24, 16)).save(root / 'small_mask' / mask)
    noise = np.random.default_rng(0).integers(0, 19, (32, 48), np.uint8)
    Image.fromarray(noise).save(root / 'truncated_mask' / mask)
    path = root / 'truncated_mask' / mask
    path.write_bytes(path.read_bytes()[:-300])
    Image.new('L', (48, 32), 77).save(root / 'other_label' / mask)
    for name, file in (('text_image', image), ('text_mask', mask)):
        (root / name / file).write_text('no image')
    for path in (root / 'no_samples').rglob('*.png'):
        path.rename(path.with_suffix('.tif'))
    for name in ('broken_xml', 'missing_xml', 'wrong_xml'):
        draw_voc(root / name)
    path = root / 'wrong_xml/VOC2007/Annotations/1.xml'
    path.write_text(path.read_text().replace('<xmin>5<', '<xmin>forty<'))
    (root / 'broken_xml/VOC2007/Annotations/1.xml').write_text('<annotation><size>')
    (root / 'missing_xml/VOC2007/Annotations/1.xml').unlink()


def write_checkpoints(root: Path, cfg: Config) -> None:
    model = build_expanded_model(cfg)
    meta = dict(dataset_meta=dict(classes=[f'class {index}' for index in range(19)]))
    torch.save(dict(meta=meta, state_dict=model.state_dict()), root / 'expanded.pth')
    weights = mmexpand.contract(model).state_dict()
    torch.save(dict(meta=meta, state_dict=weights), root / 'compact.pth')
    torch.save(dict(model=weights, epoch=1), root / 'keys.pth')
    diverged = {key: value * float('nan') for key, value in model.state_dict().items()}
    torch.save(dict(meta=meta, state_dict=diverged), root / 'nan.pth')
    torch.save(dict(state_dict=torch.nn.Linear(2, 2).state_dict()), root / 'other.pth')
    torch.save([1, 2], root / 'list.pth')
    torch.save(dict(state_dict=weights, network=torch.nn.Linear(2, 2)), root / 'code.pth')
    (root / 'page.pth').write_text('<!DOCTYPE html><html><body>404</body></html>')
    whole = (root / 'expanded.pth').read_bytes()
    (root / 'truncated.pth').write_bytes(whole[:-1000])


def write_bad_files(root: Path) -> None:
    (root / 'syntax.py').write_text('model = dict(\n')
    (root / 'names.py').write_text('model = undefined_name\n')
    (root / 'baseless.py').write_text("_base_ = './nowhere.py'\n")
    (root / 'config.txt').write_text('model = dict()\n')
    (root / 'empty.py').write_text('')
    (root / 'part.py').write_text("model = dict(type='EncoderDecoder')\n")
    (root / 'scalars.json').write_text('{"loss": 1.0, "step": 1}\n{"loss": 0.5, "st\n')


@pytest.fixture(scope='module')
def places(tmp_path_factory, street):
    """Where everything is that the cases name; KEPT holds files that none may touch."""
    root = tmp_path_factory.mktemp('bad_input')
    names = dict(CONFIG='config.py', PLAIN='plain.py', VOC='voc.py', BAD='bad', DATA='data')
    names.update(CHECKPOINTS='checkpoints', KEPT='kept', NONE='none', OUT='out')
    names.update(EXPANDED='checkpoints/expanded.pth', COMPACT='checkpoints/compact.pth')
    names.update(DARKNET='net.weights', LOG='log/scalars.json')
    found = {name: root / path for name, path in names.items()}
    for name in ('BAD', 'DATA', 'CHECKPOINTS', 'KEPT'):
        found[name].mkdir()
    cfg = small_config(street, root / 'out')
    cfg.dump(found['CONFIG'])
    write_checkpoints(found['CHECKPOINTS'], cfg)
    cfg.custom_hooks = []
    cfg.visualizer = dict(type='SegLocalVisualizer', name='bad_input')
    cfg.dump(found['PLAIN'])
    damaged_data(found['DATA'], street)
    voc = Config.fromfile(VOC)
    for loader in (voc.train_dataloader, voc.val_dataloader, voc.test_dataloader):
        loader.dataset.data_root = f'{found["DATA"]}/broken_xml/'
        loader.update(num_workers=0, persistent_workers=False)
    voc.dump(found['VOC'])
    write_bad_files(found['BAD'])
    for name in ('net.onnx', 'net.pth', 'curves.png'):
        (found['KEPT'] / name).write_text('kept')
    found['DARKNET'].write_bytes(struct.pack('<4i', 0, 1, 0, 64) + bytes(1000))
    (root / 'log').mkdir()
    found['LOG'].write_text(json.dumps(dict(loss=1.0, step=1)) + '\n')
    found['IMAGE'] = next(street.glob('leftImg8bit/train/town/*.png'))
    return found


def snapshot(places) -> dict[str, tuple[int, int]]:
    """Size and time of every file that was there before."""
    root = places['CONFIG'].parent
    files = [path for path in root.rglob('*') if path.is_file()]
    return {
        str(path): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in files
        if places['OUT'] not in path.parents
    }


def fill(command: str, places) -> list[str]:
    return [part.format(**places) if '{' in part else part for part in command.split()]


@pytest.mark.skipif(torch.cuda.is_available(), reason='some of it is not wrong with a GPU')
@pytest.mark.parametrize(('command', 'words'), CASES, ids=[command for command, _ in CASES])
def test_bad_input(places, capfd, monkeypatch, command, words):
    # As without a GPU; a process that torchrun has not started.
    monkeypatch.delenv('LOCAL_RANK', raising=False)
    # Loggers of other tests write to streams that are closed.
    monkeypatch.setattr(logging, 'raiseExceptions', False)
    before = snapshot(places)
    capfd.readouterr()
    status, message = run(*fill(command, places))
    printed = capfd.readouterr()
    assert status != 0
    if not message:  # argparse: usage, and a line that says what is wrong with it
        message = printed.err.splitlines()[-1]
    assert re.search(words, message), message
    assert '\n' not in message.strip()
    assert 'Traceback' not in printed.out + printed.err
    assert snapshot(places) == before
    assert not [*places['OUT'].glob('*.pth'), *places['OUT'].glob('compact*')]


def call(command: list[str]) -> subprocess.CompletedProcess:
    environment = dict(os.environ, OMP_NUM_THREADS='1')
    argv = [sys.executable, TOOLS / command[0], *command[1:]]
    return subprocess.run(
        list(map(str, argv)), capture_output=True, text=True, env=environment, timeout=900
    )


def test_processes_end_with_one_paragraph(places):
    done = call(fill('contract.py {CONFIG} {CHECKPOINTS}/truncated.pth', places))
    assert done.returncode == 1
    assert re.fullmatch(r'contract\.py: .*truncated\.pth .*\n', done.stderr)


def test_debug_shows_the_traceback(places):
    done = call(fill('plan.py {BAD}/names.py --debug', places))
    assert done.returncode == 1
    assert 'Traceback' in done.stderr
    assert 'NameError' in done.stderr


@pytest.mark.parametrize(
    'bug',
    [
        lambda *_: int('x'),
        lambda *_: dict()['x'],
        lambda *_: None.x,
        lambda *_: torch.zeros(2) @ torch.zeros(3),
        lambda *_: next(iter([])),
    ],
)
def test_bugs_keep_their_traceback(places, monkeypatch, bug):
    monkeypatch.setattr(load('plan.py'), 'build_compact_model', bug)
    with pytest.raises(Exception) as error:
        run('plan.py', places['CONFIG'])
    assert not isinstance(error.value, SystemExit)


def test_a_bug_in_the_package_keeps_its_traceback(places, monkeypatch):
    # Raised inside mmexpand, but no UserError.
    monkeypatch.setattr(command_line, 'check_keys', lambda cfg, *needed: cfg.model + 1)
    with pytest.raises(TypeError):
        run('plan.py', places['CONFIG'])
