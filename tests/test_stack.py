"""Importing mmexpand names versions that cannot work."""

from importlib.metadata import PackageNotFoundError

import pytest

from mmexpand import stack


@pytest.mark.parametrize(
    ('installed', 'words'),
    [
        (dict(mmdet='3.2.0'), r"mmdet 3.3.0 or newer, but 3.2.0 is installed: pip install -U 'mm"),
        (dict(torch='2.4.1+cu121'), 'torch 2.5 or newer'),
        ({'onedl-mmcv': '2.3.6', 'mmcv': '2.1.0'}, 'mmcv and onedl-mmcv are both installed'),
        (dict(mmcv='2.2.0', mmdet='3.3.0'), r"mmcv 2.2.0 is unsupported by mmdet: .*'mmcv<2.2.0'"),
    ],
)
def test_refusals(monkeypatch, installed, words):
    def look_up(name):
        if name in installed:
            return installed[name]
        raise PackageNotFoundError(name)

    monkeypatch.setattr(stack, 'version', look_up)
    with pytest.raises(ImportError, match=words):
        stack.check_stack()
