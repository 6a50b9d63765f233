"""Errors of a study file name its key."""

import pytest

from mmexpand.study import StudyError, load_study


def test_a_study(write_study, tmp_path):
    study = write_study("arms['cl'].update(lr=0.5, seeds=[7])\n")
    assert study.name == 'small'
    assert study.lrs == (0.01, 0.1)
    assert study.results_dir == tmp_path / 'results'
    assert (study.jobs, study.threads, study.channels_last) == (2, 1, False)
    compact, cl = study.arm('compact'), study.arm('cl')
    assert compact.config == str(tmp_path / 'net.py')
    assert (compact.lr, compact.seeds) == (None, (0, 1))
    assert (cl.lr, cl.seeds) == (0.5, (7,))
    assert cl.cfg_options['custom_hooks'][0]['type'] == 'ExpandHook'


@pytest.mark.parametrize(
    ('line', 'message'),
    [
        ('del metric', 'metric must be a str, not empty; got None'),
        ('seeds = []', 'seeds must be a list, not empty'),
        ("seeds = ['a']", 'seeds must be whole numbers'),
        ('seeds = [0.5]', 'seeds must be whole numbers'),
        ('tune_seeds = [1, 1]', 'tune_seeds must not repeat'),
        ('lrs = []', "lrs must be 'auto' or a list, not empty; got \\[\\]"),
        ("lrs = 'atuo'", "lrs must be 'auto' or a list, not empty; got 'atuo'"),
        ("lrs = ['a']", 'lrs must be numbers'),
        ('lrs = [0.1, 0]', 'lrs must be above 0'),
        ('jobs = 0', 'jobs must be a whole number of at least 1, got 0'),
        ("baseline = 'compac'", "no arm 'compac'; near matches: compact"),
        ("arms['cl'] = 'net.py'", "arms.cl must be a dict with config.*got 'net.py'"),
        ("arms['cl']['rate'] = 2", 'arms.cl must be .*; got config, cfg_options, rate'),
        ("arms['cl']['lr'] = -1", 'arms.cl.lr must be above 0'),
        ("arms['cl']['seeds'] = [1, 'x']", 'arms.cl.seeds must be whole numbers'),
        ("arms['cl']['seeds'] = 3", 'arms.cl.seeds must be a list of seeds, got 3'),
        ("arms['cl']['seeds'] = []", r'arms.cl.seeds must be a list of seeds, got \[\]'),
        ("arms['cl']['cfg_options'] = ['a']", 'arms.cl.cfg_options must be a dict'),
    ],
)
def test_bad_studies(write_study, line, message):
    with pytest.raises(StudyError, match=rf'small\.py.*{message}'):
        write_study(line + '\n')


def test_rates_are_searched_by_default(write_study):
    assert write_study('del lrs\n').lrs is None
    assert write_study("lrs = 'auto'\n").lrs is None


def test_no_study(tmp_path):
    with pytest.raises(FileNotFoundError, match='none'):
        load_study(tmp_path / 'none.py')
