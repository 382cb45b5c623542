"""The page of `specprune explain`: complete in itself, harmless, and right in words and pictures.

What the page does is tested in a real Chromium where there is one, over its debugging pipe.
"""

import base64
import dataclasses
import fcntl
import hashlib
import html.parser
import itertools
import json
import os
import re
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import DATA, make_action, make_observation, make_policy
from hypothesis import given, settings
from hypothesis import strategies as st

from specprune_ros.cli import main
from specprune_ros.config_files import from_mapping
from specprune_ros.explain import (
    PICTURE_WIDTH,
    About,
    Explanation,
    changed_settings,
    explain,
    jpeg,
    method_sentences,
    mode_words,
    patch_words,
)
from specprune_ros.images import turned
from specprune_ros.overlay import draw_overlay
from specprune_ros.types import Mode, Observation, PruneReport, Reason

ROOT = Path(__file__).parent.parent
GRID = (4, 6)
PATCHES = GRID[0] * GRID[1]
STATIC, LAYER = 2, 6
HOSTILE = (
    '</script><script>window.hacked = 1</script><!--<img src=x onerror="window.hacked=1">&amp;'
)
CROP_SIDE = 0.9**0.5


def make_report(query: int = 0, **changes) -> PruneReport:
    """Two cameras; each query keeps other patches."""
    random = np.random.default_rng(query)
    reason = random.integers(0, 8, 2 * PATCHES).astype(np.uint8)
    gone = np.where(reason == 0, STATIC, random.choice([0, 0, LAYER], 2 * PATCHES))
    static, kept = (gone != STATIC).reshape(2, -1).sum(1), (gone == 0).reshape(2, -1).sum(1)
    fields = {
        'stamp_ns': query * 400_000_000,
        'chunk_id': query + 1,
        'epoch': 1,
        'method': 'specprune',
        'budget': 'union',
        'alpha': 0.8,
        'mode': Mode.COARSE,
        'mode_reason': 'v_t 0.90, v_r 0.10, dz -0.10',
        'translation_speed': 0.9,
        'rotation_speed': 0.1,
        'vertical_displacement': -0.1,
        'cameras': ('wrist', 'side'),
        'grid_rows': np.full(2, GRID[0], np.uint32),
        'grid_cols': np.full(2, GRID[1], np.uint32),
        'rotation_deg': np.array([0, 180], np.uint32),
        'crop_side': CROP_SIDE,
        'tokens_total': np.full(2, PATCHES, np.uint32),
        'tokens_static': static.astype(np.uint32),
        'tokens_kept': kept.astype(np.uint32),
        'recall': np.array([0.5, 0.9]),
        'recall_mean': np.array([0.6, np.nan]),
        'flops_share': 0.4,
        'reason': reason,
        'pruned_after_layer': gone.astype(np.uint8),
        'important': (reason & Reason.GLOBAL > 0).astype(np.uint8),
        'static_layer': STATIC,
        'layer_index': np.array([STATIC, LAYER], np.uint32),
        'layer_tokens': np.array([static.sum(), kept.sum()], np.uint32),
        'layer_confidence': np.linspace(0.1, 0.3, 8),
        'sequence_tokens': 2 * PATCHES + 20,
        'latency_decode_s': 0.02,
        'latency_total_s': 0.03,
    }
    return PruneReport(**{**fields, **changes})


def make_view(query: int = 0, **changes) -> Observation:
    """Smooth pictures of several shapes, which JPEG keeps."""
    random = np.random.default_rng(100 + query)
    images = {
        name: cv2.resize(random.integers(0, 255, (6, 8, 3), np.uint8), size)
        for name, size in (('wrist', (224, 224)), ('side', (640, 480)))
    }
    return make_observation(query, **{'images': images, **changes})


def about(**parameters: object) -> About:
    values = {name.replace('__', '.'): value for name, value in parameters.items()}
    return About(
        config=from_mapping(values),
        model='tiny',
        recording='demo',
        environment={'torch': '2'},
    )


class Page(html.parser.HTMLParser):
    """Elements of a page, and what stands in its scripts and styles."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.bodies: list[tuple[str, dict, str]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        tag, attributes = self.tags[-1] if self.tags else ('', {})
        if tag in ('script', 'style') and data.strip():
            self.bodies.append((tag, attributes, data))

    def named(self, tag: str) -> list[tuple[dict, str]]:
        return [(attributes, body) for name, attributes, body in self.bodies if name == tag]

    @property
    def data(self) -> dict:
        def refuse(word):
            raise ValueError(f'{word} is not JSON')

        (payload,) = [b for a, b in self.named('script') if a.get('type') == 'application/json']
        return json.loads(payload, parse_constant=refuse)


def pages(count: int, **changes) -> str:
    reports = [make_report(query, **changes) for query in range(count)]
    return explain(reports, [make_view(query) for query in range(count)], about())


@pytest.fixture(scope='module')
def three() -> str:
    return pages(3)


# One file --------------------------------------------------------------------------------------


def test_page_refers_to_nothing_outside(three):
    namespace = 'http://www.w3.org/2000/svg'  # an identifier, which nothing loads
    assert not re.search(r'https?:|//\w+\.', three.replace(namespace, ''))
    for tag, attributes in Page(three).tags:
        assert tag not in ('link', 'iframe', 'object', 'embed', 'base', 'img')
        assert 'src' not in attributes
        assert not any(name.startswith('on') for name in attributes)
    for word in ('@import', 'url(', 'fetch(', 'XMLHttpRequest', 'WebSocket', 'innerHTML', 'eval('):
        assert word not in three


def test_security_policy_allows_the_pages_own_elements_only(three):
    page = Page(three)
    (policy,) = [a['content'] for tag, a in page.tags if 'http-equiv' in a]
    rules = dict(rule.split(maxsplit=1) for rule in policy.split(';'))
    assert rules['default-src'] == "'none'"
    assert rules['img-src'] == 'data:'
    for tag in ('style', 'script'):
        (body,) = [b for a, b in page.named(tag) if not a]
        digest = base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()
        assert rules[f'{tag}-src'] == f"'sha256-{digest}'"


def test_hostile_text_stays_text():
    report = make_report(mode=Mode.FALLBACK, fallback_reason=HOSTILE, mode_reason=HOSTILE)
    view = make_view(instruction=HOSTILE)
    says = dataclasses.replace(
        about(model__checkpoint=HOSTILE), recording=HOSTILE, environment={HOSTILE: HOSTILE}
    )
    page = Page(explain([report], [view], says))
    assert [tag for tag, _ in page.tags].count('script') == 2
    assert page.data['recording'] == HOSTILE
    assert page.data['environment'] == {HOSTILE: HOSTILE}
    assert page.data['settings'][0]['value'] == HOSTILE
    assert page.data['queries'][0]['instruction'] == HOSTILE
    assert page.data['queries'][0]['fallback_reason'] == HOSTILE


@given(st.text() | st.text(alphabet='<>/!-&;scriptSCRIPT@DATAPOLICY\\u\u2028 "\''))
@settings(deadline=None, max_examples=60)
def test_any_text_comes_back_as_it_was(text):
    view = make_view(images=dict.fromkeys(('wrist', 'side'), np.zeros((4, 4, 3), np.uint8)))
    says = dataclasses.replace(about(), recording=text)
    page = Page(explain([make_report()], [dataclasses.replace(view, instruction=text)], says))
    assert page.data['queries'][0]['instruction'] == text
    assert page.data['recording'] == text
    assert [tag for tag, _ in page.tags].count('script') == 2


# Data ------------------------------------------------------------------------------------------


def test_every_query_with_its_masks_and_unknown_as_null(three):
    queries = Page(three).data['queries']
    assert [query['chunk_id'] for query in queries] == [1, 2, 3]
    assert [query['time_s'] for query in queries] == [0.0, 0.4, 0.8]
    for index, query in enumerate(queries):
        report = make_report(index)
        for name, text in query['masks'].items():
            assert list(base64.b64decode(text)) == getattr(report, name).tolist()
        assert query['recall_mean'] == [0.6, None]
        assert query['guard_disagreement'] is None


def test_pictures_are_small_and_turned_as_the_model_sees_them(three):
    view = make_view(1)
    texts = Page(three).data['queries'][1]['pictures']
    wrist, side = (
        cv2.imdecode(np.frombuffer(base64.b64decode(text), np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
        for text in texts
    )
    assert wrist.shape == (224, 224, 3)
    assert side.shape == (360, PICTURE_WIDTH, 3)
    small = cv2.resize(turned(view.images['side'], 180), (PICTURE_WIDTH, 360))
    assert np.abs(wrist.astype(int) - view.images['wrist']).mean() < 8
    assert np.abs(side.astype(int) - small).mean() < 8


@given(rows=st.integers(1, 700), cols=st.integers(1, 1500))
@settings(deadline=None, max_examples=20)
def test_pictures_of_any_shape(rows, cols):
    data = jpeg(np.zeros((rows, cols, 3), np.uint8), 180)
    picture = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    assert picture.shape[1] == min(cols, PICTURE_WIDTH)
    assert picture.shape[0] == pytest.approx(rows * min(1, PICTURE_WIDTH / cols), abs=1)


def test_settings_that_differ_are_listed():
    rows = changed_settings(from_mapping({'pruning.alpha': 0.6, 'pruning.prune_layers': [10]}))
    assert [(row['name'], row['value'], row['default']) for row in rows] == [
        ('pruning.alpha', '0.6', '0.8'),
        ('pruning.prune_layers', '10', '10, 15, 20, 25'),
    ]
    assert all(row['meaning'] for row in rows)
    assert changed_settings(from_mapping({})) == []


def test_reports_of_a_policy_have_words_for_every_patch():
    policy = make_policy(pruning__budget='fixed')
    reports, views = [], []
    for step in range(3):
        views.append(make_observation(8 * step))
        reports.append(policy.infer(views[-1]).report)
        for _ in range(8):
            policy.observe_executed(make_action(0.9), views[-1].images)
    page = Page(explain(reports, views, About(config=policy.config))).data
    assert [query['mode'] for query in page['queries']] == [Mode.DENSE, Mode.COARSE, Mode.COARSE]
    for query, report in zip(page['queries'], reports, strict=True):
        pairs = zip(report.reason, report.pruned_after_layer, strict=True)
        assert {f'{reason}:{gone}' for reason, gone in pairs} == set(query['words'])
    assert page['stand_in']


def test_pages_without_queries_or_with_too_few_observations():
    with pytest.raises(ValueError, match='no query'):
        explain([], [], about())
    with pytest.raises(ValueError, match='shorter'):
        explain([make_report()], [], about())


# Words -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('reason', 'gone', 'told'),
    [
        (Reason.GLOBAL, 0, ['kept to the end', 'last query (global)']),
        (Reason.GLOBAL | Reason.DYNAMIC, 0, ['(global), changed', '(dynamic)']),
        (Reason.LOCAL | Reason.FILL, 0, ['first two layers (local)', '(fill)']),
        (0, STATIC, ['dropped after layer 2', 'no set wanted it']),
        (Reason.LOCAL, STATIC, ['dropped after layer 2', '(local)', 'beyond the fixed budget']),
        (
            Reason.DYNAMIC,
            LAYER,
            ['dropped after layer 6', '10 % lowest', '5 of 50', '(dynamic)'],
        ),
    ],
)
def test_words_say_what_became_of_a_patch_and_why(reason, gone, told):
    report = make_report(layer_tokens=np.array([50, 45], np.uint32))
    words = patch_words(report, int(reason), gone)
    for part in told:
        assert part in words
    assert ('kept to the end' in words) == (gone == 0)


@pytest.mark.parametrize(
    ('changes', 'told'),
    [
        ({}, 'translates fast (0.90 > 0.5): prune hard'),
        ({'translation_speed': 0.1, 'rotation_speed': 0.3}, 'rotates fast (0.30 > 0.2)'),
        ({'rotation_speed': 0.3}, 'translates fast (0.90 > 0.5) and rotates fast'),
        ({'translation_speed': 0.1, 'vertical_displacement': 0.1}, 'slow but rises (+0.10)'),
        ({'mode': Mode.FINE, 'translation_speed': 0.1}, 'slow and does not rise: prune gently'),
        (
            {'mode': Mode.FINE, 'translation_speed': 0.1, 'vertical_displacement': 0.1},
            'rises (+0.10) but is still slow',
        ),
        (
            {'mode': Mode.FINE, 'translation_speed': np.nan, 'mode_reason': 'nothing is known'},
            'Nothing is known.',
        ),
        ({'mode': Mode.DENSE, 'mode_reason': 'first query'}, 'Dense: first query.'),
        ({'mode': Mode.FALLBACK, 'fallback_reason': 'it broke'}, 'Computed dense: it broke.'),
        ({'alpha': 1.0}, 'raised alpha from 0.8 to 1.'),
    ],
)
def test_words_say_why_a_mode_was_taken(changes, told):
    assert told in mode_words(make_report(**changes), from_mapping({}).pruning)


def test_words_know_of_a_controller_that_is_off():
    pruning = from_mapping({'pruning.controller': False}).pruning
    assert 'controller is off' in mode_words(make_report(), pruning)


def test_the_method_is_told_in_five_sentences_with_the_runs_own_layers():
    sentences = method_sentences([make_report()], from_mapping({}).pruning)
    assert len(sentences) == 5
    assert 'After layer 2' in sentences[1]
    assert 'here 6' in sentences[2]
    assert '10 %' in sentences[2]
    off = from_mapping({'pruning.static': False, 'pruning.dynamic': False}).pruning
    assert [s.endswith('off here.') for s in method_sentences([make_report()], off)] == [
        False, True, True, False, False,
    ]  # fmt: skip
    assert len(method_sentences([make_report(method='none')], off)) == 1


# Command ---------------------------------------------------------------------------------------


def test_command_writes_a_page(tmp_path, capsys):
    out = tmp_path / 'new' / 'page.html'
    arguments = ['--set', 'pruning.alpha=0.6', '--every', '40', '--max-queries', '2']
    assert main(['explain', str(DATA / 'pick_place'), *arguments, '--out', str(out)]) == 0
    data = Page(out.read_text()).data
    assert len(data['queries']) == 2
    assert data['recording'] == 'pick_place'
    assert 'pruning.alpha' in [row['name'] for row in data['settings']]
    assert {'hardware', 'torch', 'specprune'} <= set(data['environment'])
    assert 'stopped after 2 queries' in capsys.readouterr().out


@pytest.mark.parametrize(
    ('arguments', 'told'),
    [(['--out', '{folder}'], '--out'), (['--max-queries', '-1'], '--max-queries')],
)
def test_what_the_user_can_mend_is_one_line(tmp_path, capsys, arguments, told):
    arguments = [text.format(folder=tmp_path) for text in arguments]
    assert main(['explain', str(DATA / 'pick_place'), *arguments]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert told in lines[0]


def test_failed_run_leaves_no_empty_page(tmp_path):
    np.savez(tmp_path / 'one.npz', nothing=np.zeros(1))
    out = tmp_path / 'page.html'
    assert main(['explain', str(tmp_path / 'one.npz'), '--out', str(out)]) == 2
    assert not out.exists()


@pytest.mark.slow
def test_what_pip_installs_is_whole(tmp_path):
    source, prefix = tmp_path / 'source', tmp_path / 'prefix'
    source.mkdir()
    for name in ('setup.py', 'pyproject.toml', 'package.xml'):
        shutil.copy(ROOT / name, source)
    for name in ('specprune_ros', 'config', 'msg'):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns('__pycache__'))
    place = prefix / 'lib' / 'python3' / 'site-packages'
    commands = (['install_lib', f'--install-dir={place}'], ['install_data', f'-d{prefix}'])
    for command in commands:
        setup = [sys.executable, 'setup.py', '-q', *command]
        subprocess.run(setup, cwd=source, check=True, capture_output=True)
    assert (place / 'specprune_ros' / 'explain.html').is_file()
    code = """
from rosbags.typesys import Stores, get_typestore
import specprune_ros
from specprune_ros.config_files import find_config
from specprune_ros.recordings.bag import register_own_messages
store = get_typestore(Stores.ROS2_HUMBLE)
register_own_messages(store)
known = 'specprune_ros/msg/VlaStatus' in store.types
print(specprune_ros.__file__, find_config('models/tiny'), known)
"""
    environment = {**os.environ, 'PYTHONPATH': str(place), 'AMENT_PREFIX_PATH': ''}
    told = subprocess.run(
        [sys.executable, '-c', code], cwd=tmp_path, env=environment, check=True,
        capture_output=True, text=True,
    ).stdout.split()  # fmt: skip
    assert [path.startswith(str(prefix)) for path in told[:2]] == [True, True], told
    assert told[2] == 'True'


# Browser ---------------------------------------------------------------------------------------

NAMES = ('chromium', 'chromium-browser', 'google-chrome', 'google-chrome-stable', 'chrome')
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
in_browser = pytest.mark.skipif(CHROMIUM is None, reason='no Chromium is installed')
WAIT_S = 30.0


class Browser:
    """A headless Chromium without network, driven over its debugging pipe."""

    def __init__(self, profile: Path):
        to_child, commands = os.pipe()
        replies, from_child = os.pipe()
        high = [fcntl.fcntl(fd, fcntl.F_DUPFD, 20) for fd in (to_child, from_child)]
        options = (
            '--headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage '
            '--disable-background-networking --host-resolver-rules=MAP\t*\t~NOTFOUND '
            '--remote-debugging-pipe'
        )
        self._process = subprocess.Popen(
            [CHROMIUM, *(o.replace('\t', ' ') for o in options.split(' ')),
             f'--user-data-dir={profile}', 'about:blank'],
            # Chromium reads commands from descriptor 3 and answers on 4.
            preexec_fn=lambda: (os.dup2(high[0], 3), os.dup2(high[1], 4)),
            pass_fds=(3, 4), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        for fd in (to_child, from_child, *high):
            os.close(fd)
        self._commands, self._replies = commands, replies
        self._buffer, self._count, self._session = b'', itertools.count(1), {}
        self.events: list[dict] = []
        target = self.call('Target.createTarget', url='about:blank')['targetId']
        session = self.call('Target.attachToTarget', targetId=target, flatten=True)
        self._session = {'sessionId': session['sessionId']}
        for domain in ('Page', 'Runtime', 'Log', 'Network', 'Accessibility'):
            self.call(f'{domain}.enable')
        self.call(
            'Network.emulateNetworkConditions',
            offline=True, latency=0, downloadThroughput=0, uploadThroughput=0,
        )  # fmt: skip

    def call(self, method: str, **params) -> dict:
        number = next(self._count)
        message = {'id': number, 'method': method, 'params': params, **self._session}
        os.write(self._commands, json.dumps(message).encode() + b'\0')
        while True:
            answer = self._read()
            if answer.get('id') == number:
                assert 'error' not in answer, answer
                return answer['result']
            self.events.append(answer)

    def _read(self) -> dict:
        while b'\0' not in self._buffer:
            assert select.select([self._replies], [], [], WAIT_S)[0], 'Chromium does not answer'
            data = os.read(self._replies, 1 << 16)
            assert data, 'Chromium ended'
            self._buffer += data
        message, _, self._buffer = self._buffer.partition(b'\0')
        return json.loads(message)

    def js(self, expression: str):
        answer = self.call('Runtime.evaluate', expression=expression, returnByValue=True)
        assert 'exceptionDetails' not in answer, answer
        return answer['result'].get('value')

    def until(self, expression: str) -> None:
        end = time.monotonic() + WAIT_S
        while not self.js(expression):
            assert time.monotonic() < end, expression
            time.sleep(0.02)

    def drawn(self, query: int) -> None:
        """Wait until the pictures of a query are there."""
        self.until(f'document.documentElement.dataset.drawn === "{query}"')

    def open(self, path: Path, query: int = 0, size=(1280, 900), scheme='light') -> None:
        mobile = size[0] < 500
        self.call(
            'Emulation.setDeviceMetricsOverride',
            width=size[0], height=size[1], deviceScaleFactor=1, mobile=mobile,
        )  # fmt: skip
        wanted = [{'name': 'prefers-color-scheme', 'value': scheme}]
        self.call('Emulation.setEmulatedMedia', features=wanted)
        self.call('Page.navigate', url='about:blank')
        self.until('location.href === "about:blank"')
        self.events.clear()
        self.call('Page.navigate', url=f'{path.as_uri()}#query={query}')
        self.until('document.readyState === "complete"')
        self.drawn(query)

    def key(self, name: str) -> None:
        text = {'text': name} if len(name) == 1 else {}
        for kind in ('keyDown', 'keyUp'):
            code = {'ArrowRight': 39, 'ArrowLeft': 37, 'End': 35, ' ': 32}.get(name, 0)
            self.call('Input.dispatchKeyEvent', type=kind, key=name,
                      windowsVirtualKeyCode=code, **text)  # fmt: skip

    def mouse(self, kind: str, selector: str, right: float, down: float) -> None:
        """A mouse event at a place of an element, as shares of its size."""
        self.js(f'document.querySelector("{selector}").scrollIntoView({{block: "center"}})')
        box = self.js(
            f'(({{x, y, width, height}}) => [x, y, width, height])'
            f'(document.querySelector("{selector}").getBoundingClientRect())'
        )
        at = {'x': box[0] + right * box[2], 'y': box[1] + down * box[3]}
        self.call('Input.dispatchMouseEvent', type=kind, button='left', clickCount=1, **at)

    def click(self, selector: str, right: float = 0.5, down: float = 0.5) -> None:
        for kind in ('mousePressed', 'mouseReleased'):
            self.mouse(kind, selector, right, down)

    def canvas(self, camera: int) -> np.ndarray:
        """[rows, cols, 3] RGB of a camera's picture."""
        url = self.js(f'document.querySelectorAll("canvas")[{camera}].toDataURL()')
        data = np.frombuffer(base64.b64decode(url.partition(',')[2]), np.uint8)
        return cv2.imdecode(data, cv2.IMREAD_COLOR)[..., ::-1]

    def screenshot(self) -> np.ndarray:
        data = base64.b64decode(self.call('Page.captureScreenshot')['data'])
        return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)

    def text(self, selector: str) -> str:
        return self.js(f'document.querySelector("{selector}").textContent')

    def complaints(self) -> list[dict]:
        kinds = ('Runtime.exceptionThrown', 'Runtime.consoleAPICalled', 'Log.entryAdded')
        return [event for event in self.events if event['method'] in kinds]

    def requests(self) -> set[str]:
        wanted = [e for e in self.events if e['method'] == 'Network.requestWillBeSent']
        return {event['params']['request']['url'] for event in wanted}

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(10)
        for fd in (self._commands, self._replies):
            os.close(fd)


@pytest.fixture(scope='module')
def browser(tmp_path_factory):
    opened = Browser(tmp_path_factory.mktemp('profile'))
    yield opened
    opened.close()


@pytest.fixture(scope='module')
def saved(tmp_path_factory) -> Path:
    """Five queries: dense, coarse, fine, a fallback, and one that the guard compared."""
    changes = [
        {'mode': Mode.DENSE, 'recall': np.full(2, np.nan), 'mode_reason': 'first query'},
        {},
        {'mode': Mode.FINE, 'translation_speed': 0.1},
        {'mode': Mode.FALLBACK, 'fallback_reason': 'it broke', 'layer_confidence': np.zeros(0)},
        {'guard_disagreement': 0.5, 'flops_share': 1.4},
    ]
    nothing = {
        'layer_index': np.zeros(0, np.uint32),
        'layer_tokens': np.zeros(0, np.uint32),
        'reason': np.zeros(2 * PATCHES, np.uint8),
        'pruned_after_layer': np.zeros(2 * PATCHES, np.uint8),
    }
    for index in (0, 3):
        changes[index] |= nothing
    reports = [make_report(query, **change) for query, change in enumerate(changes)]
    path = tmp_path_factory.mktemp('page') / 'a page.html'
    path.write_text(explain(reports, [make_view(query) for query in range(5)], about()))
    return path


@in_browser
@pytest.mark.slow
@pytest.mark.parametrize('scheme', ['light', 'dark'])
@pytest.mark.parametrize('size', [(1280, 900), (400, 800)])
def test_page_opens_from_a_file_without_network(browser, saved, size, scheme):
    browser.open(saved, 1, size, scheme)
    for query in (2, 3, 4, 0):
        browser.js(f'location.hash = "query={query}"')
        browser.drawn(query)
    assert browser.complaints() == []
    urls = browser.requests()
    assert saved.as_uri() in urls
    assert all(url.startswith(('file:', 'data:image/jpeg')) for url in urls)
    assert browser.js('document.documentElement.scrollWidth') <= size[0]
    dark = browser.screenshot().mean() < 100
    assert dark == (scheme == 'dark')


@in_browser
@pytest.mark.slow
def test_slider_changes_the_picture(browser, saved):
    browser.open(saved, 1)
    before, shot = browser.canvas(0), browser.screenshot()
    browser.js('document.getElementById("query").focus()')
    browser.key('ArrowRight')
    browser.drawn(2)
    assert np.abs(browser.canvas(0).astype(int) - before).mean() > 5
    assert np.abs(browser.screenshot().astype(int) - shot).mean() > 1
    assert 'query 2 of 0–4' in browser.text('#where')
    assert browser.js('location.hash') == '#query=2'


@in_browser
@pytest.mark.slow
def test_more_work_than_dense_fits_its_bar(browser, saved):
    browser.open(saved, 4)
    assert '40' in browser.text('#work')
    assert 'more' in browser.text('#work')
    widths = browser.js(
        '[...document.querySelectorAll("#work-bar rect")].map((r) => +r.getAttribute("width"))'
    )
    assert widths[1] == pytest.approx(widths[0])
    browser.open(saved, 1)
    assert 'saved' in browser.text('#work')


@in_browser
@pytest.mark.slow
@pytest.mark.parametrize('words', ['', 'skipped: cameras/side stale 3 x'])
def test_page_says_what_was_skipped(browser, tmp_path, words):
    explanation = Explanation(about())
    explanation.add(make_report(0), make_view(0))
    path = tmp_path / 'page.html'
    path.write_text(explanation.html(words))
    browser.open(path, 0)
    assert browser.js('document.getElementById("skipped").hidden') == (not words)
    if words:
        assert 'side stale 3 x' in browser.text('#skipped')


@in_browser
@pytest.mark.slow
def test_keys_move_and_play(browser, saved):
    browser.open(saved, 0)
    for key, query in (('ArrowRight', 1), ('ArrowRight', 2), ('ArrowLeft', 1), ('End', 4),
                       ('Home', 0), ('ArrowLeft', 0)):  # fmt: skip
        browser.key(key)
        browser.drawn(query)
    browser.key(' ')
    assert browser.text('#play') == 'Pause'
    browser.drawn(2)
    browser.key(' ')
    assert browser.text('#play') == 'Play'


@in_browser
@pytest.mark.slow
def test_play_stops_at_the_end_and_starts_over(browser, saved):
    browser.open(saved, 3)
    browser.click('#play')
    browser.drawn(4)
    browser.until('document.getElementById("play").textContent === "Play"')
    browser.click('#play')
    browser.drawn(0)
    browser.click('#play')


@in_browser
@pytest.mark.slow
@pytest.mark.parametrize(('wanted', 'shown'), [('', 0), ('#query=3', 3), ('#query=99', 4)])
def test_address_chooses_the_query(browser, saved, wanted, shown):
    browser.open(saved, 1)
    browser.js(f'location.hash = "{wanted}"')
    browser.drawn(shown)


@in_browser
@pytest.mark.slow
@pytest.mark.parametrize('query', [0, 1, 2, 3])
def test_picture_is_the_overlay_that_the_node_draws(browser, saved, query):
    browser.open(saved, query)
    data = Page(saved.read_text()).data['queries'][query]
    fields = {name: np.asarray(data[name]) for name in ('tokens_total', 'grid_rows', 'grid_cols')}
    masks = {
        name: np.frombuffer(base64.b64decode(text), np.uint8)
        for name, text in data['masks'].items()
    }
    report = make_report(query, mode=Mode(data['mode']), **fields, **masks)
    for camera, name in enumerate(report.cameras):
        shown = browser.canvas(camera)
        image = cv2.resize(make_view(query).images[name], shown.shape[1::-1])
        drawn = draw_overlay(image, report, name, 0.45)
        expected = cv2.resize(drawn, shown.shape[1::-1]) if len(drawn) < len(shown) else drawn
        difference = np.abs(shown.astype(int) - expected[: len(shown), : shown.shape[1]])
        assert difference.mean() < 6


@in_browser
@pytest.mark.slow
def test_pointing_at_a_patch_tells_its_fate(browser, saved):
    browser.open(saved, 1)
    data = Page(saved.read_text()).data['queries'][1]
    report = make_report(1)
    for camera, name in enumerate(report.cameras):
        reason, gone = report.camera_grid(name)
        for row, col in ((0, 0), (3, 5), (1, 4), (2, 0)):
            right, down = (
                (1 - CROP_SIDE) / 2 + CROP_SIDE * (at + 0.5) / cells
                for at, cells in ((col, GRID[1]), (row, GRID[0]))
            )
            browser.mouse('mouseMoved', f'figure:nth-child({camera + 1}) canvas', right, down)
            told = browser.text(f'figure:nth-child({camera + 1}) .patch')
            words = data['words'][f'{reason[row, col]}:{gone[row, col]}']
            assert told.startswith(f'Row {row + 1}, column {col + 1}: {words}.')


@in_browser
@pytest.mark.slow
def test_arrow_keys_walk_over_patches_of_a_picture_in_focus(browser, saved):
    browser.open(saved, 1)
    browser.js('document.querySelector("canvas").focus()')
    for key in ('ArrowRight', 'ArrowRight'):  # the first one chooses the patch in the middle
        browser.key(key)
    assert browser.text('.patch').startswith('Row 3, column 5: ')
    assert browser.text('#where').startswith('query 1 ')


@in_browser
@pytest.mark.slow
def test_views_colour_the_picture_or_leave_it(browser, saved):
    browser.open(saved, 1)
    shown = {}
    for view in ('reason', 'layer', 'important', 'off'):
        browser.click(f'input[value={view}]')
        shown[view] = browser.canvas(0).astype(int)
    for one, other in itertools.combinations(shown, 2):
        assert np.abs(shown[one] - shown[other]).mean() > 3
    plain = cv2.resize(make_view(1).images['wrist'], shown['off'].shape[1::-1])
    assert np.abs(shown['off'] - plain).mean() < 4


@in_browser
@pytest.mark.slow
def test_click_on_a_plot_goes_to_its_query(browser, saved):
    browser.open(saved, 0)
    browser.click('#plots svg', 0.99, 0.5)
    browser.drawn(4)
    browser.click('#plots svg', 0.5, 0.5)
    browser.drawn(2)


@in_browser
@pytest.mark.slow
def test_fallbacks_and_the_guard_stand_out(browser, saved):
    browser.open(saved, 3)
    assert 'it broke' in browser.text('#fallback')
    assert browser.js('document.getElementById("fallback").checkVisibility()')
    assert 'it broke, in query 3' in browser.text('#fallbacks')
    browser.key('ArrowRight')
    browser.drawn(4)
    assert not browser.js('document.getElementById("fallback").checkVisibility()')
    assert browser.text('#guard-value') == '0.5000'
    assert 'relaxed' in browser.text('#guard-words')


@in_browser
@pytest.mark.slow
def test_everything_that_can_be_seen_or_used_has_a_name(browser, saved):
    browser.open(saved, 4)
    nodes = browser.call('Accessibility.getFullAXTree')['nodes']
    named = ('image', 'img', 'button', 'slider', 'radio', 'link', 'region', 'navigation')
    used = [n for n in nodes if n.get('role', {}).get('value') in named and not n['ignored']]
    assert len(used) > 20
    assert [node for node in used if not node['name']['value'].strip()] == []


@in_browser
@pytest.mark.slow
def test_hostile_text_is_shown_and_not_run(browser, tmp_path):
    path = tmp_path / 'page.html'
    report = make_report(mode=Mode.FALLBACK, fallback_reason=HOSTILE, mode_reason=HOSTILE)
    says = dataclasses.replace(
        about(model__checkpoint=HOSTILE), recording=HOSTILE, environment={HOSTILE: HOSTILE}
    )
    path.write_text(explain([report], [make_view(instruction=HOSTILE)], says))
    browser.open(path)
    assert browser.js('typeof window.hacked') == 'undefined'
    for selector in ('#title', '#instruction', '#fallback', '#fallbacks', '#settings',
                     '#environment'):  # fmt: skip
        assert HOSTILE in browser.text(selector)
    assert browser.complaints() == []


@in_browser
@pytest.mark.slow
def test_page_of_the_recording(browser, tmp_path):
    out = tmp_path / 'page.html'
    assert main(['explain', str(DATA / 'pick_place'), '--out', str(out)]) == 0
    assert out.stat().st_size < 3e6
    browser.open(out, 12)
    assert browser.text('#where').startswith('query 12 of 0–19')
    assert browser.js('document.querySelectorAll("canvas").length') == 3
    assert browser.complaints() == []
