"sasformer_annotate: its page in a real Chromium, what its server refuses, and what is left when it is killed"
import contextlib, errno, json, os, re, shutil, signal, subprocess, sys, threading, time
from pathlib import Path
import httpx2 as httpx
import numpy as np, pytest
from PIL import Image
from starlette.testclient import TestClient
from sasformer import annotate, bench, measure
from sasformer.annotate import MAX_BODY, LabelSet, annotate_app, listen, set_classes, set_folder
from sasformer.annotations import UNLABELLED, draw_lines, read_label_map, write_label_map
from sasformer.datasets import LayoutError, folder, scenes

CLASSES = ['ground', "d'être <b>", 'ring']
CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)


@pytest.fixture(scope='module')
def photographs(tmp_path_factory):
    "Scenes as photographs, among them one that is turned and one of 16 bits"
    path, src = tmp_path_factory.mktemp('scenes'), scenes(n_train=4, n_val=0, size=96)
    for k, id in enumerate(src.splits['train']): src.image(id).resize((160, 120)).save(path/f'{k} photo.png')
    exif = Image.Exif()
    exif[0x0112] = 6
    src.image(id).resize((160, 120)).save(path/'turned é.jpg', exif=exif)
    Image.fromarray(np.arange(120*160, dtype=np.uint16).reshape(120, 160)*3).save(path/'sixteen.tif')
    return path


@pytest.fixture
def maps(photographs, tmp_path):
    "A set beside new photographs"
    root = set_folder(shutil.copytree(photographs, tmp_path/'photos'))
    return LabelSet(root, set_classes(root, CLASSES))


def opened(maps):
    "Somebody who has opened the link of a set"
    client = TestClient(annotate_app(maps, 80, 'secret'), base_url='http://localhost:80',
                        headers=dict(host='localhost:80'))
    assert client.get('/?token=secret').status_code == 200
    return client


@pytest.fixture
def client(maps): return opened(maps)


def stroke(client, n=0, **change):
    version = client.get(f'/api/photos/{n}/photo').json()['version']
    sent = dict(tool='brush', cls=1, width=5, points=[[10, 10], [60, 50]], version=version)
    return client.post(f'/api/photos/{n}/strokes', json={**sent, **change})


def drawn(strokes, shape):
    "The label map of strokes as they were sent, by `draw_lines`"
    out = np.full(shape, UNLABELLED, np.uint8)
    for s in strokes:
        at = draw_lines([(0, s['points'])], shape, s['width'], 'crop') == 0
        out[at] = UNLABELLED if s['tool'] == 'eraser' else s['cls']
    return out


# What the server refuses

PLACES = ['/../pyproject.toml', '/..%2f..%2fsetup.py', '/annotate.js/../../annotate.py', '/static/annotate.js',
          '/api/photos/../../../etc/passwd/image', '/api/photos/..%2f..%2fetc%2fpasswd/thumb', '/api/photos/-1/image',
          '/api/photos/99/labels', '/api/photos/0%00/image', '/api/photos/1e3', '/%2e%2e/%2e%2e/etc/passwd',
          '//etc/passwd', '/api/photos/99999999999999999999/prediction']

@pytest.mark.parametrize('place', PLACES)
def test_no_path_leads_out(client, place):
    "Neither by reading nor by writing"
    for answer in (client.get(place), client.post(place, json={})):
        assert answer.status_code in (404, 405), (place, answer.status_code, answer.text[:80])
        assert 'root:' not in answer.text and 'import ' not in answer.text


ROUTES = ['/', '/annotate.js', '/api/set', '/api/train', '/api/photos/0/photo', '/api/photos/0/image', '/nothing']

@pytest.mark.parametrize('change,words', [
    (dict(token='wrong'), 'token'), (dict(token='wr\u00f6ng'), 'token'), (dict(token=''), 'token'),
    (dict(host='evil.example'), 'host'), (dict(host='127.0.0.1:81'), 'host'),
    (dict(origin='http://evil.example'), 'pages of'), (dict(origin='null'), 'pages of'),
    (dict(origin='http://127.0.0.1:81'), 'pages of')])
def test_strangers_are_refused(client, change, words):
    "On every route, whatever they ask for"
    if 'token' in change: client.cookies.clear()
    asked = {k: v for k, v in change.items() if k != 'token'}
    for route in ROUTES:
        address = f"{route}?token={change['token']}" if 'token' in change else route
        for answer in (client.get(address, headers=asked), client.post(address, headers=asked, json={})):
            assert answer.status_code == 403 and words in answer.text and answer.text.count('\n') == 1, answer.text


def test_the_link_leaves_a_cookie_that_pages_elsewhere_do_not_get(maps):
    client = TestClient(annotate_app(maps, 80, 'secret'), base_url='http://127.0.0.1:80', follow_redirects=False)
    answer = client.get('/?token=secret', headers=dict(host='localhost:80'))
    assert answer.status_code == 303 and answer.headers['location'] == '/'
    assert 'HttpOnly' in answer.headers['set-cookie'] and 'samesite=strict' in answer.headers['set-cookie'].lower()
    assert "default-src 'self'" in answer.headers['content-security-policy']


@pytest.mark.parametrize('change,words', [
    (dict(points=[[1, 1]]*10_001), '10001 points'), (dict(points=[[1, 'x']]), 'positions'), (dict(cls=3), 'class is 3'),
    (dict(cls='ground'), "class is 'ground'"), (dict(cls=254), 'class is 254'), (dict(width=2), 'odd'),
    (dict(width=10**9+1), 'odd'),
    (dict(tool='../../x'), 'tool is'), (dict(points=[[1e308, 1e308]]), 'positions'), (dict(points={}), 'points'),
    (dict(points=[[-50, -50]]), 'outside'), (dict(version='old'), 'another tab'), (dict(version=None), 'another tab')])
def test_strokes_that_cannot_be_meant(client, maps, change, words):
    "Are answered in a line, and nothing is written"
    stroke(client)
    before = maps.files[maps.ids[0]].read_bytes()
    answer = stroke(client, **change)
    error = answer.json()['error']
    assert answer.status_code == (409 if 'version' in change else 422) and words in error and '\n' not in error
    assert len(error) < 300 and maps.files[maps.ids[0]].read_bytes() == before


@pytest.mark.parametrize('body', [b'[' * 100_000, b'{"points": [' + b'[1,1],' * 1_000_000 + b'[1,1]]}', b'\xff', b'7',
                                  b'{"width": NaN'])
def test_bodies_that_are_none(client, body):
    answer = client.post('/api/photos/0/strokes', content=body)
    assert answer.status_code == 422 and '\n' not in answer.json()['error']
    assert len(body) < MAX_BODY or 'bytes' in answer.json()['error']


def test_parts_that_are_none(client):
    for query in ('box=0,0,161,120', 'box=5,5,5,9', 'box=a,b,c,d', 'box=0,0,10,10&size=100000,1',
                  'box=-1,0,10,10', 'size=1'):
        for what in ('image', 'labels'): assert client.get(f'/api/photos/0/{what}?{query}').status_code == 422, query
    for n in range(6): assert client.get(f'/api/photos/{n}/image').headers['content-type'] == 'image/jpeg'


def test_training_before_there_are_labels(client):
    answer = client.post('/api/train/start', json={})
    assert answer.status_code == 422 and 'at least 2' in answer.json()['error']
    assert client.get('/api/photos/0/prediction').status_code == 404
    for wrong in (dict(method='--out=/'), dict(method=7), dict(steps=0), dict(steps='1'), dict(steps=1e9)):
        assert client.post('/api/train/start', json=wrong).status_code == 422, wrong
    assert client.get('/api/train').json()['status'] == 'none'


def test_a_full_disk_loses_nothing(client, maps, monkeypatch):
    for cls in (0, 1): stroke(client, cls=cls)
    file = maps.files[maps.ids[0]]
    before, photo = file.read_bytes(), client.get('/api/photos/0/photo').json()
    def full(*args, **kwargs): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))
    with monkeypatch.context() as m:
        m.setattr(os, 'replace', full)
        for answer in (stroke(client, cls=2), client.post('/api/photos/0/undo', json=dict(version=photo['version']))):
            assert answer.status_code == 507 and 'No space left' in answer.json()['error']
    assert file.read_bytes() == before and client.get('/api/photos/0/photo').json() == photo
    assert [f.name for f in file.parent.iterdir()] == [file.name], 'no half a file is left'
    assert stroke(client, cls=2).status_code == 200, 'the same stroke, later'


def test_nothing_of_what_was_undone_comes_back(client, maps):
    "Though the file is packed in parts, and there is none in between"
    state = stroke(client, points=[[20, 20]]).json()
    assert client.post('/api/photos/0/undo', json=dict(version=state['version'])).status_code == 200
    assert not maps.files[maps.ids[0]].exists()
    stroke(client, points=[[20, 100]])
    assert (read_label_map(maps.files[maps.ids[0]]) == draw_lines([(1, [[20, 100]])], (120, 160), 5)).all()


def test_names_with_quotes_and_unicode(tmp_path):
    photos = tmp_path/"l'été “à” #1 %2e"
    photos.mkdir()
    names = ['"quoted\' & <b>.png', 'Ñandú ☃ #?.png', 'a%2f..%2fx.png']
    for name in names: Image.new('RGB', (40, 30)).save(photos/name)
    root = set_folder(photos)
    maps = LabelSet(root, set_classes(root, CLASSES))
    client = opened(maps)
    for n in range(3): assert stroke(client, n).status_code == 200
    assert {p['name'] for p in client.get('/api/set').json()['photos']} == set(names)
    src = folder(root, val=.4)
    assert sorted(sum(src.splits.values(), [])) == sorted(Path(n).stem for n in names) and src.classes == CLASSES


def test_links_that_lead_out_are_refused(tmp_path, maps):
    (tmp_path/'secret.png').write_bytes(b'secret')
    (maps.root/'images/x.png').symlink_to(tmp_path/'secret.png')
    with pytest.raises(LayoutError, match='is a link out'): LabelSet(maps.root, CLASSES)
    (maps.root/'images/x.png').rename(tmp_path/'x.png')
    (maps.root/'scribble').symlink_to(tmp_path)
    with pytest.raises(LayoutError, match='is a link out'): LabelSet(maps.root, CLASSES)


def test_a_set_with_splits_and_labels_of_somebody_else(tmp_path):
    "What is there is opened, corrected and saved where `folder` finds it; a file that is none is left alone"
    for split in ('train', 'val'):
        (tmp_path/'images'/split).mkdir(parents=True)
        for k in range(2): Image.new('RGB', (40, 30)).save(tmp_path/'images'/split/f'{split}{k}.png')
    (tmp_path/'codes.txt').write_text('a\nb\n')
    (tmp_path/'scribble/train').mkdir(parents=True)
    there = np.full((30, 40), UNLABELLED, np.uint8)
    there[3:5] = 1
    write_label_map(tmp_path/'scribble/train/train0.png', there)
    write_label_map(tmp_path/'scribble/train/train1.png', there+3)
    maps = LabelSet(tmp_path, set_classes(set_folder(tmp_path)))
    maps.scan()
    assert maps.counts['train0'] == ([0, 80], 1200) and 'id 2' in maps.problems['train1']
    client = opened(maps)
    for n in (0, 2, 3): assert stroke(client, n, cls=0, points=[[20, 20]]).status_code == 200
    assert client.get('/api/photos/1/photo').status_code == 422
    there[draw_lines([(0, [[20, 20]])], (30, 40), 5) == 0] = 0
    assert (read_label_map(tmp_path/'scribble/train/train0.png') == there).all()
    assert set(read_label_map(tmp_path/'scribble/train/train1.png').ravel()) == {2, 4}
    assert (tmp_path/'scribble/val/val1.png').exists()


def test_a_killed_server_loses_at_most_the_last_stroke(photographs, tmp_path):
    shutil.copytree(photographs, tmp_path/'photos')
    env = dict(os.environ, PYTHONPATH=str(Path(annotate.__file__).parents[1]))
    process = subprocess.Popen([sys.executable, '-m', 'sasformer.annotate', tmp_path/'photos', '--classes', 'a,b,c',
                                '--no-browser'], stdout=subprocess.PIPE, text=True, env=env)
    link = next(line.strip() for line in process.stdout if line.startswith('http'))
    rng, sent, done = np.random.default_rng(0), [], 0
    with httpx.Client(base_url=link.partition('/?')[0], follow_redirects=True) as client:
        client.get(link)
        version = client.get('/api/photos/0/photo').json()['version']
        try:
            while True:
                points = rng.integers(0, 120, (4, 2)).tolist()
                sent.append(dict(tool='brush', cls=int(rng.integers(3)), width=5, points=points))
                version = client.post('/api/photos/0/strokes', json=dict(sent[-1], version=version)).json()['version']
                done += 1
                if done == 10: threading.Timer(.05, process.kill).start()   # while it draws on
        except httpx.TransportError: pass
    assert process.wait() == -signal.SIGKILL and done >= 10
    file, = (tmp_path/'photos_labels/scribble').glob('*.png')
    labels = read_label_map(file)
    assert any((labels == drawn(sent[:n], labels.shape)).all() for n in (done, done+1))
    process = subprocess.Popen([sys.executable, '-m', 'sasformer.annotate', tmp_path/'photos', '--no-browser'],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env,   # it goes on
                               # a test that was started in the background would hand on that Ctrl-C is ignored
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    link = next(line for line in process.stdout if line.startswith('http'))
    process.send_signal(signal.SIGINT)
    assert 'every stroke is saved' in process.communicate(timeout=120)[1] and process.returncode == 130


# The page

@pytest.fixture(scope='module')
def browser():
    "Debian's Chromium, driven by Playwright"
    if CHROMIUM is None: pytest.skip("no Chromium here: the page is not tested (apt-get install chromium)")
    sync = pytest.importorskip('playwright.sync_api', reason="Playwright is not here: the page is not tested")
    with sync.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=[*measure.CHROMIUM_FLAGS])
        yield browser
        browser.close()


class Screen:
    "A page and a hand at its mouse"
    def __init__(self, page, maps, link):
        self.page, self.maps, self.link, self.sent, self.errors = page, maps, link, [], []
        page.set_default_timeout(120_000)   # milliseconds; a busy machine is slow, not wrong
        page.on('pageerror', lambda e: self.errors.append(str(e)))
        page.on('request', self.note)
        page.goto(link)
        self.ready(0)
    def note(self, request):
        if request.url.endswith('/strokes'): self.sent.append(json.loads(request.post_data))
    def ready(self, n): self.page.wait_for_selector(f'#stage[data-ready="{n}"]')
    def at(self, x, y):
        "Where a pixel of the photograph (by its centre) is on the screen"
        box = self.page.locator('#stage').bounding_box()
        view = self.page.evaluate('page.stage.view')
        return tuple(box[k]+(v+.5-view[k])*view['scale'] for k, v in (('x', x), ('y', y)))
    def drag(self, *points):
        self.page.mouse.move(*self.at(*points[0]))
        self.page.mouse.down()
        for p in points[1:]: self.page.mouse.move(*self.at(*p), steps=4)
        self.page.mouse.up()
    def press(self, *keys):
        for k in keys: self.page.keyboard.press(k)
    def saved(self, n):
        "Until so many strokes have been sent and all is saved"
        self.until('!page.saver.queue.length && !page.saver.busy && !page.stage.pending.length',
                   lambda: len(self.sent) == n)
    def until(self, js, also=lambda: True, seconds=300):
        end = time.time()+seconds
        while not (self.page.evaluate(js) and also()):
            said = [self.page.locator(f'#{id}').text_content() for id in ('trouble-text', 'train-said')]
            assert time.time() < end, (js, said)
            self.page.wait_for_timeout(150)
    def file(self, n): return read_label_map(self.maps.files[self.maps.ids[n]])
    def colour(self, layer, x, y):
        "Of a pixel of the photograph in one layer of the page: red, green, blue, opacity"
        return self.page.evaluate("""([layer, x, y]) => {
            const s = page.stage, at = [x+.5-s.view.x, y+.5-s.view.y].map(v => v*s.density())
            return [...s.layers[layer].context.getImageData(...at, 1, 1).data] }""", [layer, x, y])


@contextlib.contextmanager
def served(maps, *options):
    "A set's page, its server in a thread: its address and its `Pages`"
    import uvicorn
    sock = listen(0)
    port = sock.getsockname()[1]
    app = annotate_app(maps, port, 'secret', options)
    server = uvicorn.Server(uvicorn.Config(app, log_level='warning', lifespan='off', timeout_graceful_shutdown=1))
    server.install_signal_handlers = lambda: None
    thread = threading.Thread(target=server.run, kwargs=dict(sockets=[sock]))
    thread.start()
    maps.scan()
    try: yield f'http://127.0.0.1:{port}/?token=secret', app.pages
    finally:
        server.should_exit = True
        thread.join()
        app.pages.close()


@pytest.fixture
def screen(browser, maps):
    "The page of a new set"
    options = '--size', '32', '--bs', '2', '--device', 'cpu', '--decoder_dim', '32'
    with served(maps, *options) as (link, pages), browser.new_page(viewport=dict(width=1280, height=720)) as page:
        screen = Screen(page, maps, link)
        screen.training = pages.training
        yield screen
    assert not screen.errors, screen.errors


def test_drawing(screen):
    "Each tool by mouse, undo, zoom, next photograph, reload: the file is what `draw_lines` says"
    page = screen.page
    assert page.evaluate('location.search') == '', 'the token is not left in the address'
    screen.press('2')
    screen.drag((20, 20), (60, 30), (80, 70))
    screen.press('l', '3', ']')
    screen.drag((100, 20), (140, 100))
    for p in ((30, 90), (50, 100), (70, 90)): page.mouse.click(*screen.at(*p))   # a line from corner to corner
    screen.press('Enter', 'p', '1')
    page.mouse.click(*screen.at(120, 30))
    screen.press('e')
    screen.drag((60, 20), (60, 60))
    screen.saved(5)
    tools, points = zip(*((s['tool'], s['points']) for s in screen.sent))
    assert tools == ('brush', 'line', 'line', 'point', 'eraser') and points[1] == [[100, 20], [140, 100]]
    assert points[2] == [[30, 90], [50, 100], [70, 90]] and points[3] == [[120, 30]] and points[0][0] == [20, 20]
    assert (screen.file(0) == drawn(screen.sent, (120, 160))).all()
    assert tuple(screen.colour('labels', 120, 60)) == (0, 130, 255, 255) and screen.colour('labels', 5, 5)[3] == 0

    screen.press('Control+z')
    screen.saved(5)
    assert (screen.file(0) == drawn(screen.sent[:4], (120, 160))).all()
    screen.press('Control+y')
    screen.saved(5)
    assert (screen.file(0) == drawn(screen.sent, (120, 160))).all()

    page.mouse.move(*screen.at(40, 60))
    page.mouse.wheel(0, -400)   # the pixel under the pointer stays there
    page.wait_for_timeout(200)
    assert page.evaluate('page.stage.view.scale') > 8
    screen.press('b', '1', '[')
    screen.drag((38, 60), (44, 63))
    screen.saved(6)
    assert screen.sent[5]['points'][0] == [38, 60] and screen.sent[5]['points'][-1] == [44, 63]
    assert (screen.file(0) == drawn(screen.sent, (120, 160))).all()

    screen.press('n')
    screen.ready(1)
    assert 'next without labels' in page.locator('#hint').text_content()
    page.reload()
    screen.ready(1)
    page.locator('#list button').first.click()
    screen.ready(0)
    assert '%' in page.locator('#list button').first.locator('.far').text_content()
    assert '1 of 6' in page.locator('#summary').text_content() and tuple(screen.colour('labels', 120, 60))[3] == 255
    assert page.locator('#class-buttons .name').all_text_contents() == CLASSES


def test_labels_that_come_late(screen):
    "Ready means drawn, and a stroke stays in view, when the view is moved before the picture of the labels is here"
    page = screen.page
    screen.press('2')
    screen.drag((40, 40), (80, 40))
    screen.saved(1)
    page.add_init_script("""{ const at_once = fetch; let asked = 0
        fetch = async (address, options) => {
            if (/labels/.test(address)) await new Promise(done => setTimeout(done, 500 * ++asked))
            return at_once(address, options) } }""")
    page.reload()
    screen.ready(0)
    assert screen.colour('labels', 60, 40)[3] == 255
    screen.drag((40, 60), (80, 60))
    screen.until('!page.saver.queue.length && !page.saver.busy', lambda: len(screen.sent) == 2)
    screen.press('0')   # the same view once more
    screen.saved(2)
    assert screen.colour('labels', 60, 40)[3] == screen.colour('labels', 60, 60)[3] == 255


def test_a_stroke_stays_with_its_photograph(screen):
    "Where saving fails while another is asked for, this one stays open; a line in hand is saved before the next opens"
    page, refused = screen.page, []
    page.route('**/strokes', lambda route: refused.append(route))
    screen.press('2')
    screen.drag((20, 20), (60, 30))
    screen.press('PageDown')
    screen.until('page.saver.busy', lambda: refused)
    refused[0].fulfill(status=507, content_type='application/json', body='{"error": "no space left"}')
    page.wait_for_selector('#trouble:not([hidden])')
    assert page.evaluate('page.n') == 0 and 'no space left' in page.locator('#trouble-text').text_content()
    page.unroute('**/strokes')
    page.click('#trouble-again')
    screen.saved(2)
    screen.press('l')
    for p in ((100, 20), (140, 60), (100, 90)): page.mouse.click(*screen.at(*p))
    screen.press('PageDown')
    screen.ready(1)
    screen.saved(3)
    assert (screen.file(0) == drawn(screen.sent[1:], (120, 160))).all()
    assert not screen.maps.files[screen.maps.ids[1]].exists()


def test_a_refused_stroke_is_dropped_alone(screen):
    "A click beside the photograph is no stroke; of several that wait, the refused one goes"
    page, (x, y) = screen.page, screen.at(80, -4)
    page.mouse.click(x, y)
    page.route('**/strokes', lambda route: route.fulfill(status=422, content_type='application/json',
                                                         body='{"error": "is none"}'), times=1)
    screen.press('2')
    screen.drag((20, 20), (60, 30))
    screen.drag((20, 60), (60, 70))
    page.wait_for_selector('#trouble:not([hidden])')
    page.click('#trouble-drop')
    screen.saved(2)
    assert (screen.file(0) == drawn(screen.sent[1:], (120, 160))).all()


def test_turned_photograph_by_keyboard_alone(screen):
    page = screen.page
    page.locator('#list button', has_text='turned').focus()
    screen.press('Enter')
    screen.ready(5)
    shape = screen.maps.shape('turned é')
    assert shape == (160, 120)
    for _ in range(60):   # everything can be reached by Tab, and is seen to be
        screen.press('Tab')
        if page.evaluate('document.activeElement.id') == 'stage': break
    assert page.evaluate('document.activeElement.id') == 'stage'
    screen.press('b', '3', 'ArrowLeft', 'Space', 'Shift+ArrowRight', 'ArrowDown', 'Space')
    screen.saved(1)
    assert len(screen.sent[0]['points']) == 3 and (screen.file(5) == drawn(screen.sent, shape)).all()


def test_touch_draws_with_one_finger_and_moves_with_two(screen):
    "By the events that a touch screen sends"
    x, y = screen.at(40, 40)
    fire = """([type, id, x, y]) => page.stage.element.dispatchEvent(new PointerEvent(type, {pointerId: id,
        pointerType: 'touch', clientX: x, clientY: y, button: 0, bubbles: true, cancelable: true}))"""
    def touch(*events):
        for type, id, dx, dy in events: screen.page.evaluate(fire, [f'pointer{type}', id, x+dx, y+dy])
    touch(('down', 1, 0, 0), ('move', 1, 40, 20), ('up', 1, 40, 20))
    screen.saved(1)
    scale = screen.page.evaluate('page.stage.view.scale')
    touch(('down', 1, 0, 0), ('down', 2, 100, 0), ('move', 2, 200, 0), ('up', 1, 0, 0), ('up', 2, 200, 0))
    screen.saved(1)   # two fingers draw nothing
    assert screen.page.evaluate('page.stage.view.scale') > 1.5*scale


def test_two_tabs(screen, browser):
    "The second to draw is told, and nothing of either is lost"
    other = Screen(browser.new_page(), screen.maps, screen.link)
    screen.drag((20, 20), (60, 30))
    screen.saved(1)
    other.press('3')
    other.drag((100, 20), (140, 100))
    other.page.wait_for_selector('#trouble:not([hidden])')
    assert 'another tab' in other.page.locator('#trouble-text').text_content()
    assert (screen.file(0) == drawn(screen.sent, (120, 160))).all()
    other.page.click('#trouble-again')
    other.saved(2)
    assert (screen.file(0) == drawn(screen.sent+other.sent[1:], (120, 160))).all()
    other.page.close()


def test_training_seen_stopped_and_gone_on_with(screen):
    "A prediction with its uncertainty, taken over as a mask; then the run goes on with more labels"
    page = screen.page
    for n in range(3):
        screen.press('1')
        screen.drag((10, 10), (150, 12))
        screen.press('2')
        screen.drag((60, 60), (90, 70))
        screen.saved(2*n+2)
        screen.press('PageDown')
        screen.ready(n+1)
    screen.press('PageUp')
    screen.ready(2)
    page.fill('#steps', '60')
    page.select_option('#method', 'baseline')
    page.click('#train')
    screen.until("page.training.rows.length > 0 && page.model")
    assert re.search(r'epoch \d+ of 60', page.locator('#train-said').text_content())
    assert page.locator('#curves polyline').count() >= 1
    page.click('#train')
    screen.until("page.training.status == 'stopped'")
    done = page.evaluate('page.training.rows.length')
    assert page.locator('#train').text_content() == 'Go on'

    for layer in ('prediction', 'entropy'): page.check(f'#{layer}-on')
    screen.until("page.stage.layers.prediction.whole && page.stage.layers.entropy.whole")
    palette = screen.maps.palette.tolist()
    assert screen.colour('prediction', 80, 100)[:3] in palette and screen.colour('entropy', 80, 100)[3] == 255
    strokes = screen.file(2)
    page.click('#accept')
    screen.saved(6)
    mask = screen.file(2)
    assert mask.max() < 3 and (mask == strokes)[strokes < UNLABELLED].all()
    assert page.locator('#list button').nth(2).locator('.far').text_content() == 'mask'

    screen.press('n')
    screen.until("page.n > 2")
    page.click('#train')
    screen.until("page.training.status == 'running'")
    run, *options = screen.training.process.args[-3:]
    assert options == ['--resume', '--allow_changes'] and run.endswith('runs/001')
    assert page.evaluate('page.training.rows.length') == done


@pytest.mark.parametrize('hidden', [False, True])
def test_the_canvas_in_a_notebook(browser, maps, hidden):
    "The widget's JavaScript in Chromium, its kernel's side here: what is drawn is at once in the kernel and on disk"
    import base64
    pytest.importorskip('anywidget', reason="anywidget is not here: the canvas of notebooks is not tested")
    widget = annotate.annotate(maps.root, height=300)
    page = browser.new_page()
    page.set_default_timeout(120_000)
    page.expose_function('toKernel', lambda content: (lambda data, sent: [
        data, [base64.b64encode(b).decode() for b in sent]])(*annotate.answer_message(widget.pages, content)))
    page.goto('about:blank')
    if hidden: page.evaluate('() => { ResizeObserver = class { observe() {} } }')   # in a hidden tab it says nothing
    page.evaluate("""async code => {
        const {default: {render}} = await import(URL.createObjectURL(new Blob([code], {type: 'text/javascript'})))
        let heard
        const model = {get: () => 300, on: (_, f) => heard = f, send: async content => {
            const [data, sent] = await toKernel(content)
            heard(data, sent.map(b => Uint8Array.from(atob(b), c => c.charCodeAt(0))))
        }}
        document.body.append(document.createElement('div'))
        render({model, el: document.body.firstChild})
    }""", widget._esm)
    page.add_style_tag(content=widget._css)
    page.wait_for_selector('[data-ready="0"]')
    page.get_by_text('ring').click()
    box = page.locator('.stage').bounding_box()
    page.mouse.move(box['x']+box['width']/2-30, box['y']+100)
    page.mouse.down()
    page.mouse.move(box['x']+box['width']/2+30, box['y']+150, steps=4)
    page.mouse.up()
    page.get_by_text('Saved').wait_for()
    labels = widget.label_map(maps.ids[0])
    assert set(labels.ravel()) == {2, UNLABELLED} and (labels == read_label_map(maps.files[maps.ids[0]])).all()
    page.get_by_text('▶').click()
    page.wait_for_selector('[data-ready="1"]')
    page.close()


@pytest.fixture
def lab(tmp_path):
    "A JupyterLab of its own, on a folder: its address"
    pytest.importorskip('jupyterlab', reason="JupyterLab is not here: the canvas is not tested in it")
    with listen(0) as sock: port = sock.getsockname()[1]
    own = {f'JUPYTER_{k}_DIR': str(tmp_path/'.jupyter'/k) for k in ('CONFIG', 'RUNTIME')}
    env = dict(os.environ, PYTHONPATH=str(Path(annotate.__file__).parents[1]), **own)
    options = dict(port=port, token='secret', root_dir=tmp_path, open_browser=False, allow_root=True)
    log = (tmp_path/'lab.txt').open('w')
    command = [sys.executable, '-m', 'jupyterlab', *(f'--ServerApp.{k}={v}' for k, v in options.items())]
    process = subprocess.Popen([*command, '--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate'],
                               stdout=log, stderr=log, env=env)
    address, end = f'http://127.0.0.1:{port}', time.time()+120
    while True:
        try: httpx.get(f'{address}/api/status?token=secret').raise_for_status(); break
        except httpx.HTTPError: time.sleep(.2)
        assert process.poll() is None and time.time() < end, (tmp_path/'lab.txt').read_text()[-2000:]
    yield address
    httpx.post(f'{address}/api/shutdown?token=secret')   # its kernels go with it
    process.wait(60)


def test_the_canvas_in_jupyterlab(browser, lab, maps, tmp_path):
    "A notebook that is opened, run and drawn in: the file and the kernel have the stroke"
    nbformat = pytest.importorskip('nbformat')
    from playwright.sync_api import TimeoutError as Late
    pytest.importorskip('anywidget', reason="anywidget is not here: the canvas of notebooks is not tested")
    id = maps.ids[0]
    cells = (f"from sasformer.annotate import annotate\nw = annotate({str(maps.root)!r}, height=300)\nw",
             f"print('the kernel has', (w.label_map({id!r}) == 2).sum())")
    kernel = dict(kernelspec=dict(name='python3', display_name='Python 3', language='python'))
    nbformat.write(nbformat.v4.new_notebook(cells=[*map(nbformat.v4.new_code_cell, cells)], metadata=kernel),
                   tmp_path/'draw.ipynb')
    with browser.new_page(viewport=dict(width=1280, height=900)) as page:
        page.set_default_timeout(300_000)
        page.goto(f'{lab}/lab/tree/draw.ipynb?token=secret')
        prompt = page.locator('.jp-CodeCell .jp-InputPrompt').first
        asked = page.locator('.jp-Dialog .jp-mod-accept')
        while prompt.inner_text().strip() in ('', '[ ]:'):   # a cell is not run before its kernel is there
            with contextlib.suppress(Late):   # a slow machine's JupyterLab asks which kernel, over all else
                if asked.count(): asked.click(timeout=5000)
                page.locator('.jp-CodeCell .cm-content').first.click(timeout=5000)
                page.keyboard.press('Shift+Enter')
            page.wait_for_timeout(1000)
        page.wait_for_selector('.jp-OutputArea-output [data-ready="0"]')
        page.locator('.sasformer-annotate').get_by_text('ring').click()
        box = page.locator('.stage').bounding_box()
        page.mouse.move(box['x']+box['width']/2-30, box['y']+100)
        page.mouse.down()
        page.mouse.move(box['x']+box['width']/2+30, box['y']+150, steps=4)
        page.mouse.up()
        page.locator('.sasformer-annotate').get_by_text('Saved').wait_for()
        labels = read_label_map(maps.files[id])
        assert set(labels.ravel()) == {2, UNLABELLED}
        page.locator('.jp-CodeCell .cm-content').nth(1).click()
        page.keyboard.press('Shift+Enter')
        page.get_by_text(f'the kernel has {(labels == 2).sum()}', exact=True).wait_for()


def test_a_link_that_is_followed_early_waits():
    "The link is printed before the server runs: a connection must not be refused"
    import socket
    with annotate.listen(0) as sock, socket.create_connection(sock.getsockname(), timeout=5): pass


def test_the_benchmark_of_drawing(browser, monkeypatch, tmp_path):
    "On a smaller photograph, without another process and another browser"
    @contextlib.contextmanager
    def here(root):
        with served(LabelSet(root, set_classes(root))) as (link, _): yield link
    monkeypatch.setattr(measure, 'served', here)
    monkeypatch.setattr(measure, 'chromium', lambda: contextlib.nullcontext(browser))
    bench.main(['annotate', '--megapixels', '2', '--steps', '1', '--starts', '1', '--threads', '1',
                '--out', str(tmp_path/'annotate.json')])
    r = json.loads((tmp_path/'annotate.json').read_text())
    for row in r['rows'].values():
        assert row['strokes'] == 1 and row['frames'] > 10 and 0 < row['pen_ms'] < 10_000
        assert 0 < row['save_server_ms'] <= row['save_ms'] and 0 < row['frame_cpu_ms'] <= row['frame_cpu_p95_ms']
    assert r['first_prediction_s'] > 0 and len(r['all_predictions']['first_prediction_s']) == 3


def test_the_benchmark_says_that_playwright_is_missing(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'playwright.sync_api', None)
    with pytest.raises(SystemExit): bench.main(['annotate', '--threads', '1'])
    assert capsys.readouterr().err == 'sasformer_bench: error: Playwright is needed: pip install playwright\n'
