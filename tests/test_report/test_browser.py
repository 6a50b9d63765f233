"""The pages in a browser, clicked through."""

import base64
import io
import json
import re
import shutil
from collections import Counter

import numpy as np
import pytest

pytest.importorskip('jinja2')
pytest.importorskip('plotly')
pytest.importorskip('selenium')

from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.select import Select
from selenium.webdriver.support.wait import WebDriverWait

from mmexpand.files import write_text
from mmexpand.report.curves import Log
from mmexpand.report.gallery import (
    MEASURES,
    Boxes,
    Gallery,
    boxes_picture,
    class_colors,
    mask_picture,
)
from mmexpand.report.run import Cost, LayerRow, RunReport, WeightSet, render_run
from mmexpand.report.study import render_study

CHROMIUM, DRIVER = shutil.which('chromium'), shutil.which('chromedriver')
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason='chromium and chromedriver are not installed'
)
CLASSES = ['cat', 'dog', '<b>bird</b>']
CAT, DOG, BIRD = ((20 * i, 0, 20 * i + 10, 10) for i in range(3))
OPTIONS = (
    *('--headless', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run'),
    *('--disable-background-networking', '--disable-component-update', '--disable-sync'),
    '--window-size=1300,1000',
)


@pytest.fixture(scope='module')
def browser(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for option in (*OPTIONS, f'--user-data-dir={tmp_path_factory.mktemp("chromium")}'):
        options.add_argument(option)
    options.set_capability('goog:loggingPrefs', {'browser': 'ALL', 'performance': 'ALL'})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def picture(name, truth, said):
    def boxes(labels, scores=None):
        corners = np.array([(CAT, DOG, BIRD)[label] for label in labels], float).reshape(-1, 4)
        return Boxes(corners, np.array(labels, int), scores)

    image = np.full((40, 60, 3), 180, np.uint8)
    scores = np.full(len(said), 0.9)
    return boxes_picture(name, image, boxes(truth), boxes(said, scores), CLASSES)


def run_report():
    gallery = Gallery(
        [
            picture('half.jpg', [0, 1], [0]),  # The cat is found, the dog is not.
            picture('right.jpg', [1, 2], [1, 2]),
            picture('wrong.jpg', [0], [2]),
        ],
        CLASSES,
        class_colors(None, 3),
        'compact_best.pth.',
        MEASURES['boxes'],
    )
    found = dict(
        output_error=2e-7,
        max_error=3e-7,
        compared='outputs',
        layer_errors={'backbone.conv': 3e-7, 'backbone.last': 0.0},
        verified_on={'backbone.conv': 'in the model', 'backbone.last': 'on random input'},
        metrics_compact=dict(mAP=0.5),
    )
    row = LayerRow('backbone.conv', 'cl', ['8x4x1x1'], 10, 100, (1000, 9000, 1100))
    steps = [10, 20, 30, 40]
    return RunReport(
        'a run',
        ['a fact'],
        ['Something: it is missing'],
        Cost([row], {'not included': ['head.conv']}, 1000, 5000, (10_000, 90_000, 11_000), (4, 6)),
        [WeightSet('best', 'compact_best.pth', 1.5, 1e-3, found)],
        Log(
            dict(loss=(steps, [4.0, 3.0, 2.0, 1.0]), lr=(steps, [0.1] * 4), step=(steps, steps)),
            dict(mAP=([20, 40], [0.3, 0.5]), step=([20, 40], [20, 40])),
        ),
        gallery,
    )


@pytest.fixture(scope='module')
def page(browser, tmp_path_factory):
    path = tmp_path_factory.mktemp('page') / 'report.html'
    write_text(render_run(run_report()), path)
    return path


@pytest.fixture
def opened(browser, page):
    browser.get_log('performance')
    browser.get(page.as_uri())
    return browser


def shown(browser):
    """Names of the pictures that one sees, in their order, with the text of each."""
    figures = browser.find_elements(By.CSS_SELECTOR, '#gallery figure')
    figures = [figure for figure in figures if figure.is_displayed()]
    figures.sort(key=lambda figure: (figure.location['y'], figure.location['x']))
    return {f.find_element(By.TAG_NAME, 'code').text: caption(f) for f in figures}


def caption(figure):
    return figure.find_element(By.TAG_NAME, 'b').text


def choose(browser, control, text):
    Select(browser.find_element(By.ID, control)).select_by_visible_text(text)


def count(browser):
    return browser.find_element(By.ID, 'count').text


def test_the_worst_pictures_come_first(opened):
    found = shown(opened)
    assert list(found) == ['wrong.jpg', 'half.jpg', 'right.jpg']
    assert list(found.values()) == ['error 1.00', 'error 0.50', 'error 0.00']
    assert count(opened) == '3 of 3 pictures'


def test_sorting(opened):
    choose(opened, 'order', 'smallest error first')
    assert list(shown(opened)) == ['right.jpg', 'half.jpg', 'wrong.jpg']
    choose(opened, 'order', 'by name')
    assert list(shown(opened)) == ['half.jpg', 'right.jpg', 'wrong.jpg']
    choose(opened, 'order', 'largest error first')
    assert list(shown(opened)) == ['wrong.jpg', 'half.jpg', 'right.jpg']


def test_filtering_by_class_sorts_by_the_errors_of_that_class(opened):
    choose(opened, 'class', 'dog')
    assert shown(opened) == {'half.jpg': 'error 1.00', 'right.jpg': 'error 0.00'}
    assert count(opened) == '2 of 3 pictures'
    choose(opened, 'class', 'cat')
    assert shown(opened) == {'wrong.jpg': 'error 1.00', 'half.jpg': 'error 0.00'}
    faint = [
        box.get_attribute('class') for box in opened.find_elements(By.CSS_SELECTOR, 'figure g')
    ]
    assert faint.count('other') == 6, 'boxes of dogs and birds'
    choose(opened, 'order', 'smallest error first')
    assert list(shown(opened)) == ['half.jpg', 'wrong.jpg']
    choose(opened, 'class', 'all')
    assert list(shown(opened)) == ['right.jpg', 'half.jpg', 'wrong.jpg']


def test_filtering_leaves_the_pixels_of_the_class(browser, tmp_path):
    truth = np.repeat([[0, 1, 255]], 8, 0).repeat(8, 1).astype(np.uint8)
    colors = [(255, 0, 0), (0, 0, 255)]
    image = np.full((8, 24, 3), 90, np.uint8)
    report = run_report()
    report.gallery = Gallery(
        [mask_picture('a.png', image, truth, np.zeros_like(truth), colors)],
        CLASSES[:2],
        colors,
        'compact_best.pth.',
        MEASURES['masks'],
    )
    write_text(render_run(report), tmp_path / 'masks.html')
    browser.get((tmp_path / 'masks.html').as_uri())
    assert shown(browser) == {'a.png': 'error 0.67'}
    wait_for_colors(browser, {(255, 0, 0): 64, (0, 0, 255): 64}, {(255, 0, 0): 192})
    choose(browser, 'class', 'cat')
    wait_for_colors(browser, {(255, 0, 0): 64}, {(255, 0, 0): 192})
    choose(browser, 'class', 'dog')
    wait_for_colors(browser, {(0, 0, 255): 64}, {})
    choose(browser, 'class', 'all')
    wait_for_colors(browser, {(255, 0, 0): 64, (0, 0, 255): 64}, {(255, 0, 0): 192})


def wait_for_colors(browser, *expected):
    WebDriverWait(browser, 60).until(lambda driver: visible_colors(driver) == list(expected))


def visible_colors(browser):
    """Return the visible pixels of both masks by color."""
    masks = browser.find_elements(By.CSS_SELECTOR, 'image.mask')
    found = []
    for mask in masks:
        data = base64.b64decode(mask.get_attribute('href').split(',')[1])
        pixels = Image.open(io.BytesIO(data)).convert('RGBA').getdata()
        found.append(dict(Counter(pixel[:3] for pixel in pixels if pixel[3])))
    return found


def test_names_are_text_and_no_markup(opened):
    choose(opened, 'class', '<b>bird</b>')
    assert list(shown(opened).items()) == [('wrong.jpg', 'error 1.00'), ('right.jpg', 'error 0.00')]
    assert not opened.find_elements(By.CSS_SELECTOR, '.legend b, option b')


def test_pictures_are_drawn_on_both_sides(opened):
    images = opened.find_elements(By.CSS_SELECTOR, '#gallery svg > image')
    uses = opened.find_elements(By.CSS_SELECTOR, '#gallery svg > use')
    assert len(images) == len(uses) == 3
    for element in (*images, *uses):
        assert element.size['width'] > 200
    wrong = opened.find_elements(By.CSS_SELECTOR, 'figure[data-name="half.jpg"] rect.wrong')
    assert len(wrong) == 1, 'the dog that was missed'


def test_charts_are_drawn(opened):
    for section, traces in (('losses', 1), ('curves', 2), ('verification', 1)):
        plots = opened.find_elements(By.CSS_SELECTOR, f'#{section} .js-plotly-plot')
        assert len(plots) == 1
        drawn = plots[0].find_elements(By.CSS_SELECTOR, '.scatterlayer .trace')
        assert len(drawn) == traces
    points = opened.find_elements(By.CSS_SELECTOR, '#verification .scatterlayer .point')
    assert len(points) == 3, 'end to end, and two layers, of which one has no error at all'
    steps = opened.execute_script(
        'return document.querySelector("#curves .js-plotly-plot").data[0].x'
    )
    assert list(steps) == [20, 40]


def test_a_name_in_the_legend_hides_its_curve(opened):
    toggle = opened.find_elements(By.CSS_SELECTOR, '#curves .legendtoggle')[0]
    opened.execute_script('arguments[0].scrollIntoView({block: "center"})', toggle)
    webdriver.ActionChains(opened).move_to_element(toggle).click().perform()
    trace = 'return document.querySelector("#curves .js-plotly-plot").data[0].visible'
    WebDriverWait(opened, 60).until(lambda driver: driver.execute_script(trace) == 'legendonly')


def test_nothing_comes_from_elsewhere_and_nothing_fails(opened):
    messages = [json.loads(entry['message'])['message'] for entry in opened.get_log('performance')]
    asked = [m['params']['request']['url'] for m in messages if m['method'].endswith('WillBeSent')]
    assert any(url.startswith('file:') for url in asked)
    assert [url for url in asked if not re.match('(file|data|blob):', url)] == []
    assert opened.get_log('browser') == []
    assert not opened.execute_script(
        'return document.documentElement.scrollWidth > document.documentElement.clientWidth'
    )


def test_all_parts_are_there(opened):
    text = opened.find_element(By.TAG_NAME, 'body').text
    for part in ('Something: it is missing', 'compact_best.pth', '0.5000', 'not included: 1 layer'):
        assert part in text


def test_a_study_is_drawn(browser, tmp_path):
    html = render_study(
        title='a study',
        metric='mIoU',
        baseline='compact',
        table=[('arm', 'mean'), ('compact', '40.00'), ('cl', '42.00')],
        sentences=['cl is above compact by 2.00.'],
        problems=['dbb has not been run.'],
        curves={'compact': [[(10, 30.0), (20, 40.0)]], 'cl': [[(10, 31.0)], [(10, 33.0)]]},
        differences={'cl': ({0: 1.0, 1: 3.0}, -10.0, 14.0)},
        tuning={'compact': {0.1: 40.0, 0.01: 30.0}},
    )
    write_text(html, tmp_path / 'study.html')
    browser.get((tmp_path / 'study.html').as_uri())
    assert 'cl is above compact by 2.00.' in browser.find_element(By.ID, 'results').text
    assert 'dbb has not been run.' in browser.find_element(By.ID, 'problems').text
    data = {
        name: browser.execute_script(
            'return document.querySelector(arguments[0] + " .js-plotly-plot").data.map('
            'trace => [Array.from(trace.x), Array.from(trace.y)])',
            f'#{name}',
        )
        for name in ('curves', 'differences', 'tuning')
    }
    band, mean = data['curves'][2:]
    assert mean == [[10], [32]]
    assert band[1] == pytest.approx([32 + 2**0.5, 32 - 2**0.5])
    assert data['differences'][1] == [[2], ['cl']]
    assert data['tuning'] == [[[0.01, 0.1], [30, 40]]]
    assert browser.get_log('browser') == []
