"""The soak in short: one training is killed, one finds the disk full, one loses its folder."""

import random

import pytest

from .soak import Fault, Soak, check_whole, cut_short


@pytest.fixture(scope='module')
def soak(tmp_path_factory):
    return Soak(tmp_path_factory.mktemp('soak'))


@pytest.mark.parametrize(
    'fault',
    [
        Fault('kill', 'checkpoint'),
        Fault('full disk', 'contraction'),
        Fault('no folder', 'evaluation'),
    ],
    ids=str,
)
def test_a_disturbed_training_ends_as_if_nothing_had_happened(soak, fault):
    assert soak.run(fault.what.replace(' ', '_'), fault).startswith('hit')


def test_a_truncated_checkpoint_is_never_taken_for_whole(soak):
    work_dir, _ = soak.undisturbed(1)
    for name in ('iter_12.pth', 'compact_last.pth'):
        assert cut_short(work_dir / name, 20, random.Random(0)) == 20
    # The check that the soak relies on can fail.
    compact = work_dir / 'compact_ema.pth'
    content = compact.read_bytes()
    compact.write_bytes(content[:-100])
    with pytest.raises(AssertionError, match=r'taken for whole: .*compact_ema\.pth'):
        check_whole(work_dir)
    compact.write_bytes(content)
