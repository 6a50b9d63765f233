import itertools
import json
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

pytest.importorskip('mmdet')
pytest.importorskip('mmseg')
pytest.importorskip('cityscapesscripts')
import cv2
from cityscapesscripts.helpers.labels import id2label
from mmdet.datasets import VOCDataset
from mmseg.datasets import CityscapesDataset

sys.path.insert(0, str(Path(__file__).parents[2] / 'tools/demo'))
import draw_cityscapes
import draw_voc
from painting import Canvas, rectangle

SIZE = (160, 96)


@pytest.fixture(scope='module')
def voc(tmp_path_factory):
    out = tmp_path_factory.mktemp('drawn') / 'voc'
    draw_voc.draw_voc(out, num_train=12, num_test=4, size=SIZE, seed=3)
    return out


@pytest.fixture(scope='module')
def cityscapes(tmp_path_factory):
    out = tmp_path_factory.mktemp('drawn') / 'cityscapes'
    draw_cityscapes.draw_cityscapes(out, num_train=4, num_val=2, size=SIZE, seed=3)
    return out


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob('*') if p.is_file()}


DRAWERS = [
    (draw_voc.draw_voc, dict(num_train=4, num_test=1)),
    (draw_cityscapes.draw_cityscapes, dict(num_train=1, num_val=1)),
]


@pytest.mark.parametrize(('draw', 'counts'), DRAWERS)
def test_same_seed_same_files(draw, counts, tmp_path):
    for name, seed in (('a', 0), ('b', 0), ('c', 1)):
        draw(tmp_path / name, **counts, size=SIZE, seed=seed)
    one, same, other = (contents(tmp_path / name) for name in 'abc')
    assert one == same
    assert one.keys() == other.keys()
    images = [
        path for path in one if path.suffix in ('.jpg', '.png') and 'gtFine' not in path.parts
    ]
    assert images
    assert all(one[path] != other[path] for path in images)


@pytest.mark.parametrize(('draw', 'counts'), DRAWERS)
def test_existing_folder_is_left_alone(draw, counts, tmp_path):
    (tmp_path / 'out').mkdir()
    (tmp_path / 'out/mine.txt').write_text('mine')
    with pytest.raises(FileExistsError, match=r'out exists already'):
        draw(tmp_path / 'out', **counts, size=SIZE)
    assert [p.name for p in tmp_path.rglob('*')] == ['out', 'mine.txt']


@pytest.mark.parametrize(('draw', 'counts'), DRAWERS)
def test_nothing_half_drawn_stays(draw, counts, tmp_path, monkeypatch):
    def full(*_):
        raise OSError('disk full')

    monkeypatch.setattr(sys.modules[draw.__module__], 'write_image', full)
    with pytest.raises(OSError, match='disk full'):
        draw(tmp_path / 'out', **counts, size=SIZE)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(('key', 'value'), [('num_train', 3), ('num_test', 0), ('size', (63, 80))])
def test_too_little_is_refused_by_name(key, value, tmp_path):
    with pytest.raises(ValueError, match=key):
        draw_voc.draw_voc(tmp_path / 'out', **{key: value})
    assert list(tmp_path.iterdir()) == []


def test_voc_as_mmdet_reads_it(voc):
    names = {}
    for split, count in (('train', 9), ('val', 3), ('trainval', 12), ('test', 4)):
        dataset = VOCDataset(
            data_root=str(voc),
            ann_file=f'VOC2007/ImageSets/Main/{split}.txt',
            data_prefix=dict(sub_data_root='VOC2007/'),
            test_mode=True,
            pipeline=[],
        )
        assert len(dataset) == count
        assert dataset.metainfo['dataset_type'] == 'VOC2007'
        names[split] = {dataset.get_data_info(i)['img_id'] for i in range(count)}
        for info in (dataset.get_data_info(i) for i in range(count)):
            image = cv2.imread(info['img_path'])
            assert image.shape == (SIZE[1], SIZE[0], 3)
            assert Path(info['img_path']).read_bytes()[:2] == b'\xff\xd8'
            for instance in info['instances']:
                x1, y1, x2, y2 = instance['bbox']
                assert 0 <= x1 <= x2 < SIZE[0]
                assert 0 <= y1 <= y2 < SIZE[1]
                assert dataset.metainfo['classes'][instance['bbox_label']] in draw_voc.KINDS
    assert names['train'] | names['val'] == names['trainval']
    assert not names['trainval'] & names['test']


def test_voc_annotations_hold_what_real_ones_do(voc):
    flags, flat, found = set(), 0, set()
    for path in sorted((voc / 'VOC2007/Annotations').iterdir()):
        root = ElementTree.parse(path).getroot()
        assert root.find('filename').text == f'{path.stem}.jpg'
        assert [int(root.find(f'size/{k}').text) for k in ('width', 'height', 'depth')] == [
            *SIZE,
            3,
        ]
        for node in root.findall('object'):
            flags |= {(key, node.find(key).text) for key in ('difficult', 'truncated')}
            box = [int(node.find(f'bndbox/{k}').text) for k in ('xmin', 'ymin', 'xmax', 'ymax')]
            assert min(box) >= 1
            flat += box[0] == box[2] or box[1] == box[3]
            found.add(node.find('name').text)
    assert flags >= {('difficult', '0'), ('truncated', '0'), ('truncated', '1')}
    assert flat == 2
    assert len(found) >= 4


@pytest.mark.parametrize('name', draw_voc.KINDS)
@pytest.mark.parametrize('mirrored', [False, True])
def test_an_object_fills_its_box(name, mirrored):
    rng = np.random.default_rng(0)
    canvas = Canvas(100, 80, rng)
    brush = draw_voc.Brush(canvas, np.array([20.0, 10, 70, 60]), mirrored)
    draw_voc.KINDS[name].paint(brush, rng)
    ys, xs = np.nonzero(brush.mask)
    np.testing.assert_allclose([xs.min(), ys.min(), xs.max(), ys.max()], [20, 10, 70, 60], atol=5)
    painted = np.abs(canvas.image).max(-1) > 0
    assert (painted | ~brush.mask).all()


def test_hidden_objects_are_difficult_or_left_out(monkeypatch):
    """Two objects at one place: the second hides the first, which must not be annotated."""
    box = np.array([20.0, 10, 120, 80])
    monkeypatch.setattr(draw_voc, 'random_box', lambda *_: box)
    monkeypatch.setattr(draw_voc, 'KINDS', {'tvmonitor': draw_voc.KINDS['tvmonitor']})
    seen = [len(draw_voc.draw_scene(*SIZE, np.random.default_rng(seed))[1]) for seed in range(8)]
    assert set(seen) == {1}
    boxes = [[20.0, 10, 100, 70], [55.0, 10, 135, 70]]
    for seed in itertools.count():
        left = iter(np.array(boxes + boxes))
        monkeypatch.setattr(draw_voc, 'random_box', lambda *_, left=left: next(left))
        scene = draw_voc.draw_scene(*SIZE, np.random.default_rng(seed))[1]
        if len(list(left)) == 2:
            break
    first, second = scene
    assert first.difficult
    assert not second.difficult
    # Its stand is seen left of the other stand.
    assert first.box[2] < 80
    assert second.box[0] in (54, 55, 56)


def test_canvas_paints_the_polygon_alone():
    canvas = Canvas(30, 20, np.random.default_rng(0))
    mask = canvas.fill(rectangle(5, 4, 15, 12), np.array([10.0, 100, 200]), shading=0, grain=0)
    np.testing.assert_allclose(canvas.image[6:11, 7:14], np.full((5, 7, 3), [10, 100, 200]), atol=1)
    assert mask[6:11, 7:14].all()
    assert canvas.image[:3].max() == canvas.image[14:].max() == canvas.image[:, 17:].max() == 0
    outside = canvas.fill(rectangle(40, 4, 50, 12), np.full(3, 9.0))
    assert not outside.any()


def test_cityscapes_as_mmseg_reads_it(cityscapes):
    for split, count in (('train', 4), ('val', 2)):
        dataset = CityscapesDataset(
            data_root=str(cityscapes),
            data_prefix=dict(img_path=f'leftImg8bit/{split}', seg_map_path=f'gtFine/{split}'),
            pipeline=[dict(type='LoadImageFromFile'), dict(type='mmseg.LoadAnnotations')],
        )
        assert len(dataset) == count
        found = set()
        for item in (dataset[i] for i in range(count)):
            assert item['img'].shape == (SIZE[1], SIZE[0], 3)
            labels = item['gt_seg_map']
            assert labels.shape == (SIZE[1], SIZE[0])
            found |= {dataset.metainfo['classes'][k] for k in np.unique(labels) if k != 255}
            assert (labels == 255).any()
            # Picture and labels belong together: the sky is lighter than the road.
            assert item['img'][labels == 10].mean() > item['img'][labels == 0].mean() + 20
        assert found >= {
            'road',
            'sidewalk',
            'building',
            'vegetation',
            'sky',
            'car',
            'person',
            'pole',
        }


def test_label_images_come_from_the_polygons(cityscapes):
    paths = sorted((cityscapes / 'gtFine').rglob('*_gtFine_polygons.json'))
    assert len(paths) == 6
    for path in paths:
        content = json.loads(path.read_text())
        assert (content['imgWidth'], content['imgHeight']) == SIZE
        for item in content['objects']:
            polygon = np.array(item['polygon'])
            assert (polygon >= 0).all()
            assert (polygon < SIZE).all()
        ids, train_ids = (
            cv2.imread(str(path).replace('polygons.json', f'{kind}.png'), cv2.IMREAD_UNCHANGED)
            for kind in ('labelIds', 'labelTrainIds')
        )
        assert {id2label[i].name for i in np.unique(ids)} <= {
            o['label'] for o in content['objects']
        }
        expected = np.array([id2label[i].trainId % 256 for i in range(len(id2label) - 1)])
        np.testing.assert_array_equal(train_ids, expected[ids])
