"Layouts, odd files and failing servers: what the notebooks of datasets, benchmarks and downloads do not show"
import hashlib, io, os, pickle, shutil, subprocess, sys, tarfile, threading, zipfile
from collections import namedtuple
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sasformer import benchmarks, datasets, downloads
from sasformer.annotations import AnnotationError, write_label_map
from sasformer.benchmarks import ade20k, camvid, cityscapes, voc2012
from sasformer.datasets import LayoutError, Source, folder, open_image, phantoms, scenes
from sasformer.downloads import DownloadError, download, download_cli, extract

BODY = np.random.default_rng(0).bytes(300_000)
SHA = 'sha256:'+hashlib.sha256(BODY).hexdigest()

class Server:
    "Serves `body`; what it does wrong is set by the attributes"
    def __init__(self):
        self.body, self.tag, self.break_at, self.ranges = BODY, '"1"', None, True
        self.shift, self.status, self.asked = 0, None, []
        outer = self
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self): outer.answer(self)
            def log_message(self, *args): pass
        self.http = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
        threading.Thread(target=self.http.serve_forever, args=(.02,), daemon=True).start()
        self.url = f'http://127.0.0.1:{self.http.server_port}/set.bin'

    def answer(self, h):
        wanted = h.headers.get('Range')
        self.asked.append(wanted)
        if self.status: return h.send_error(self.status)
        start = int(wanted[6:-1]) if wanted and self.ranges and h.headers.get('If-Range') == self.tag else 0
        if start and start >= len(self.body):
            h.send_response(416)
            h.send_header('Content-Range', f'bytes */{len(self.body)}')
            h.send_header('Content-Length', '0')
            return h.end_headers()
        h.send_response(206 if start else 200)
        if start: h.send_header('Content-Range', f'bytes {start+self.shift}-{len(self.body)-1}/{len(self.body)}')
        if self.tag: h.send_header('ETag', self.tag)
        h.send_header('Content-Length', str(len(self.body)-start))
        h.end_headers()
        h.wfile.write(self.body[start:self.break_at])

@pytest.fixture
def server():
    s = Server()
    yield s
    s.http.shutdown()
    s.http.server_close()

def interrupted(server, dest, at=100_000):
    "Leave a part of `at` bytes behind"
    server.break_at = at
    with pytest.raises(DownloadError, match=f'the connection broke.*{at} bytes are '):
        download(server.url, dest, SHA, retries=0)
    server.break_at = None
    assert dest.with_name('set.bin.part').stat().st_size == at and not dest.exists()
    server.asked.clear()

def test_resumes_across_calls(server, tmp_path):
    dest, seen = tmp_path/'deep/set.bin', []
    interrupted(server, dest)
    assert download(server.url, dest, SHA, progress=lambda done, size: seen.append((done, size))) == dest
    assert dest.read_bytes() == BODY and server.asked == ['bytes=100000-']
    assert seen[0][0] > 100_000 and seen[-1] == (len(BODY),)*2
    assert [o.name for o in dest.parent.iterdir()] == ['set.bin']

def test_no_resume(server, tmp_path):
    interrupted(server, tmp_path/'set.bin')
    download(server.url, tmp_path/'set.bin', SHA, resume=False)
    assert server.asked == [None] and (tmp_path/'set.bin').read_bytes() == BODY

@pytest.mark.parametrize('change', [dict(ranges=False), dict(tag='"2"'), dict(tag=None)])
def test_starts_again_where_the_rest_would_not_fit(server, tmp_path, change):
    "A server without ranges, and one whose file is another one by now"
    interrupted(server, tmp_path/'set.bin')
    vars(server).update(change)
    server.body = BODY[::-1]
    assert download(server.url, tmp_path/'set.bin').read_bytes() == BODY[::-1]
    assert server.asked == ['bytes=100000-']

def test_server_without_tags_is_not_resumed(server, tmp_path):
    server.tag = None
    interrupted(server, tmp_path/'set.bin')
    assert download(server.url, tmp_path/'set.bin', SHA).read_bytes() == BODY and server.asked == [None]

def test_wrong_range_is_refused(server, tmp_path):
    interrupted(server, tmp_path/'set.bin')
    server.shift = 1
    with pytest.raises(DownloadError, match="asked for bytes from 100000, the server sent range '100001-"):
        download(server.url, tmp_path/'set.bin', SHA)
    assert not (tmp_path/'set.bin').exists()

def test_whole_part_is_accepted(server, tmp_path):
    "Killed between the last byte and the renaming"
    (tmp_path/'set.bin.part').write_bytes(BODY)
    (tmp_path/'set.bin.part.tag').write_text('"1"')
    assert download(server.url, tmp_path/'set.bin', SHA).read_bytes() == BODY

def test_part_longer_than_the_file_is_dropped(server, tmp_path):
    (tmp_path/'set.bin.part').write_bytes(BODY+b'more')
    (tmp_path/'set.bin.part.tag').write_text('"1"')
    assert download(server.url, tmp_path/'set.bin', SHA).read_bytes() == BODY

def test_corrupt_transfer(server, tmp_path):
    server.body = BODY[:-1]+bytes([BODY[-1]^1])
    with pytest.raises(DownloadError, match='checksum sha256:.*, expected sha256:.*; it is removed'):
        download(server.url, tmp_path/'set.bin', SHA)
    assert not list(tmp_path.iterdir())

def test_corrupt_file_on_disk_is_not_touched(server, tmp_path):
    (tmp_path/'set.bin').write_bytes(b'something else')
    with pytest.raises(DownloadError, match='delete it to fetch it again'):
        download(server.url, tmp_path/'set.bin', SHA)
    assert (tmp_path/'set.bin').read_bytes() == b'something else' and not server.asked

@pytest.mark.parametrize('status', [404,503])
def test_http_error(server, tmp_path, status):
    server.status = status
    with pytest.raises(DownloadError, match=f'set.bin: the server answers {status}'):
        download(server.url, tmp_path/'set.bin')
    assert not list(tmp_path.iterdir()) and len(server.asked) == 1

def test_nobody_there(server, tmp_path):
    server.http.server_close()
    with pytest.raises(DownloadError, match=r'refused.*\(2 attempts\); 0 bytes are kept'):
        download(server.url, tmp_path/'set.bin', retries=1)
    server.http = ThreadingHTTPServer(('127.0.0.1', 0), BaseHTTPRequestHandler)      # for the fixture to close
    threading.Thread(target=server.http.serve_forever, daemon=True).start()

def test_disk_full(server, tmp_path, monkeypatch):
    interrupted(server, tmp_path/'set.bin')
    monkeypatch.setattr(shutil, 'disk_usage', lambda p: namedtuple('u', 'total used free')(10, 9, 1))
    with pytest.raises(DownloadError, match='no space left.*200000 bytes to fetch, 1 free.*100000 bytes are kept'):
        download(server.url, tmp_path/'set.bin', SHA)
    assert len(server.asked) == 1

@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='no /dev/full on this system')
def test_disk_full_while_writing(server, tmp_path):
    (tmp_path/'set.bin.part').symlink_to('/dev/full')
    with pytest.raises(DownloadError, match='no space left on the disk'): download(server.url, tmp_path/'set.bin', SHA)

# ---- archives

def tar_with(path, name, **kwargs):
    with tarfile.open(path, 'w:gz') as t:
        m = tarfile.TarInfo(name)
        for k, v in kwargs.items(): setattr(m, k, v)
        data = b'' if kwargs else b'x'
        m.size = len(data)
        t.addfile(m, io.BytesIO(data))
    return path

def zip_with(path, name, mode=0o644):
    with zipfile.ZipFile(path, 'w') as z:
        m = zipfile.ZipInfo(name)
        m.external_attr = mode<<16
        z.writestr(m, 'x')
    return path

@pytest.mark.parametrize('make', [
    lambda p: tar_with(p, '../out.txt'),
    lambda p: tar_with(p, 'link', type=tarfile.SYMTYPE, linkname='/etc'),
    lambda p: tar_with(p, 'hard', type=tarfile.LNKTYPE, linkname='../../out.txt'),
    lambda p: tar_with(p, 'device', type=tarfile.CHRTYPE),
    lambda p: zip_with(p, '../out.txt'),
    lambda p: zip_with(p, 'a/../../out.txt'),
    lambda p: zip_with(p, '/out.txt'),
    lambda p: zip_with(p, '..\\out.txt'),
    lambda p: zip_with(p, 'C:/out.txt'),
    lambda p: zip_with(p, 'link', 0o120777),
    lambda p: p.write_bytes(b'no archive at all') and p,
    lambda p: p.write_bytes(tar_with(p, 'a').read_bytes()[:40]) and p,
])
def test_bad_archive_leaves_nothing(tmp_path, make):
    archive = make(tmp_path/'archive')
    with pytest.raises(DownloadError, match='archive'): extract(archive, tmp_path/'in/here')
    assert sorted(o.relative_to(tmp_path).as_posix() for o in tmp_path.rglob('*')) == ['archive','in','in/here']

@pytest.mark.parametrize('kind', ['zip', 'gztar'])
def test_archives_that_unpack_to_too_much(tmp_path, kind):
    (tmp_path/'made').mkdir()
    (tmp_path/'made/zeros').write_bytes(bytes(100_000))
    archive = shutil.make_archive(tmp_path/'bomb', kind, tmp_path/'made')
    with pytest.raises(DownloadError, match='bomb.*unpacks to more than'):
        extract(archive, tmp_path/'out', max_bytes=9e4)
    assert not list((tmp_path/'out').iterdir())
    assert extract(archive, tmp_path/'out', max_bytes=1e5) == [tmp_path/'out/zeros']

def test_a_page_in_place_of_an_archive(server, tmp_path):
    "It never gets the archive's name, so the next call is free to try again"
    server.body = b'<!DOCTYPE html><p>Please log in'
    for _ in range(2):
        with pytest.raises(DownloadError, match="what came is no archive, it begins with '<!DOCTYPE html>"):
            download(server.url, tmp_path/'set.zip')
        assert not list(tmp_path.iterdir())
    (tmp_path/'set.zip').write_bytes(server.body)
    with pytest.raises(DownloadError, match='set.zip: is no archive.*delete it'):
        download(server.url, tmp_path/'set.zip')

def test_what_is_promised_of_a_server_without_tags(server, tmp_path):
    server.tag, server.break_at = None, 100_000
    with pytest.raises(DownloadError, match='its 100000 bytes are of, so the next call begins again'):
        download(server.url, tmp_path/'set.bin', SHA, retries=0)

@pytest.mark.skipif(os.name == 'nt', reason='no umask')
def test_files_follow_the_umask(tmp_path):
    from sasformer.annotations import replacing
    before = os.umask(0o027)
    try:
        with replacing(tmp_path/'a') as f: os.close(os.open(f, os.O_CREAT|os.O_WRONLY, 0o600))
        with replacing(tmp_path/'b') as f:
            f.write_text('b')
            f.chmod(0o600)
        scenes(tmp_path/'made', 1, 1, size=32)
    finally: os.umask(before)
    modes = [oct((tmp_path/n).stat().st_mode)[-3:] for n in ('a', 'b', 'made', 'made/codes.txt')]
    assert modes == ['640', '640', '750', '640']

def test_good_tar(tmp_path):
    tar_with(tmp_path/'a.tgz', 'top/file')
    assert extract(tmp_path/'a.tgz', tmp_path/'out') == [tmp_path/'out/top']
    assert (tmp_path/'out/top/file').read_text() == 'x'

# ---- command line

def test_cli_fetches_unpacks_and_checks(server, tmp_path, monkeypatch, capsys):
    scenes(tmp_path/'made/camvid', 2, 1, size=32)
    shutil.make_archive(tmp_path/'set', 'gztar', tmp_path/'made')
    server.body = (tmp_path/'set.tar.gz').read_bytes()
    monkeypatch.setitem(downloads.DOWNLOADS, 'camvid',
                        downloads.Archive(server.url, 'md5:'+hashlib.md5(server.body).hexdigest(), None, 'none'))
    download_cli('download', 'camvid', path=str(tmp_path/'got'))
    assert [o.name for o in (tmp_path/'got').iterdir()] == ['camvid']
    download_cli('check', 'camvid', path=str(tmp_path/'got/camvid'), read=True)
    assert 'camvid: 2 train, 1 val' in capsys.readouterr().out
    with pytest.raises(SystemExit, match='coco2014 is not to be had'):
        download_cli('download', 'coco2014', path=str(tmp_path))
    with pytest.raises(SystemExit, match='no such folder; expected'):
        download_cli('check', 'voc2012', path=str(tmp_path))

def test_cli_keeps_an_archive_that_was_there(server, tmp_path, monkeypatch):
    "Somebody fetched it in a browser: it is unpacked and stays; only an archive of our own is removed"
    scenes(tmp_path/'made/camvid', 2, 1, size=32)
    shutil.make_archive(tmp_path/'got/set', 'gztar', tmp_path/'made')
    archive = tmp_path/'got/set.tar.gz'
    monkeypatch.setitem(datasets.DOWNLOADS, 'camvid',
                        datasets.Archive(f'{server.url.rpartition("/")[0]}/set.tar.gz', None, None, 'none'))
    download_cli('download', 'camvid', path=str(tmp_path/'got'))
    assert archive.exists() and (tmp_path/'got/camvid').is_dir()

def test_cli_as_a_program():
    r = subprocess.run([sys.executable, '-m', 'sasformer.downloads', 'list'], capture_output=True, text=True)
    assert r.returncode == 0 and 'voc2012' in r.stdout and 'by hand' in r.stdout

@pytest.mark.parametrize('module', ['datasets', 'benchmarks', 'downloads'])
def test_modules_need_no_torch(module):
    code = f"import sys, sasformer.{module}; print('torch' in sys.modules)"
    env = dict(os.environ, PYTHONPATH=str(Path(datasets.__file__).parents[1]))
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=env).stdout == 'False\n'

@pytest.mark.parametrize('name',
                         ['camvid', 'voc2012', 'get_source', 'SOURCES', 'download', 'DOWNLOADS', 'download_cli'])
def test_names_that_have_moved(name):
    "… are found where they were, with one line that says where they are"
    with pytest.warns(DeprecationWarning, match=f'sasformer.datasets.{name} has moved to sasformer.') as caught:
        value = getattr(datasets, name)
    assert len(caught) == 1 and caught[0].filename == __file__
    assert value is getattr(benchmarks, name, None) or value is getattr(downloads, name, None)

def test_no_such_name():
    with pytest.raises(ImportError, match='VOC_PLACE'): from sasformer.datasets import VOC_PLACE

def test_cli_asks_for_the_folder():
    with pytest.raises(SystemExit, match='name a data set and its folder'): download_cli('check', 'camvid')

# ---- images, masks, layouts

@pytest.mark.parametrize('mode,value,expected', [
    ('1', 1, (255,)*3), ('L', 7, (7,)*3), ('LA', (7, 255), (7,)*3),
    ('RGBA', (9, 8, 7, 255), (9, 8, 7)), ('CMYK', (0, 0, 0, 0), (255,)*3)])
def test_modes(tmp_path, mode, value, expected):
    Image.new(mode, (5, 3), value).save(tmp_path/'a.tif')
    im = open_image(tmp_path/'a.tif')
    assert im.mode == 'RGB' and im.size == (5, 3) and im.getpixel((0, 0)) == expected

def test_grey_of_16_bits_keeps_its_range(tmp_path):
    Image.fromarray(np.array([[0,257,65535]], np.uint16)).save(tmp_path/'a.png')
    assert np.asarray(open_image(tmp_path/'a.png'))[0,:,0].tolist() == [0,1,255]

def test_float_image_is_refused(tmp_path):
    Image.new('F', (5, 3), .5).save(tmp_path/'a.tif')
    with pytest.raises(OSError, match='a.tif.*no fixed range'): open_image(tmp_path/'a.tif')

@pytest.fixture
def plain(tmp_path):
    "A folder with two images in train/ and one in val/"
    for s, ids in dict(train='ab', val='c').items():
        for i in ids:
            for f in ('images', 'masks'): (tmp_path/f/s).mkdir(parents=True, exist_ok=True)
            Image.new('RGB', (6, 4)).save(tmp_path/f'images/{s}/{i}.jpg')
            write_label_map(tmp_path/f'masks/{s}/{i}.png', np.tile(np.uint8([0,1]), (4, 3)))
    (tmp_path/'classes.txt').write_text('one\ntwo\n')
    return tmp_path

def test_folder_by_subfolders(plain):
    src = folder(plain).check(read=True)
    assert (src.splits, src.classes) == ({'train':['a','b'], 'val':['c']}, ['one','two'])
    assert src.image_path('c') == plain/'images/val/c.jpg' and src.mask_path('c') == plain/'masks/val/c.png'
    assert 'images/train' in str(pickle.loads(pickle.dumps(src)).image_path('a').as_posix())
    with pytest.raises(LayoutError, match="no image for 'z'"): src.image('z')

def test_sparse_masks_as_masks(plain):
    src = folder(plain, kind='scribble')
    assert (src.annotation('a', 'scribble') == src.mask('a')).all()
    for spec in ('point', 'sim_scribble', 'dense'):
        with pytest.raises(AnnotationError, match='no masks to take it from; it has labels of the kind scribble'):
            src.annotation('a', spec)

def test_only_sparse_masks(plain):
    (plain/'masks').rename(plain/'point')
    src = folder(plain, masks=None).check(read=True)
    assert src.mask_path('a') is None and src.annotation('a', 'point').shape == (4, 6)
    with pytest.raises(LayoutError, match='no mask'): src.mask('a')

def test_mask_with_exif_rotated_image(plain):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new('RGB', (4, 6)).save(plain/'images/train/a.jpg', exif=exif)
    src = folder(plain)
    assert src.shape('a') == (4, 6) and src.image('a').size == (6, 4) and src.mask('a').shape == (4, 6)

def test_check_names_what_is_wrong(plain):
    src = folder(plain)
    write_label_map(plain/'masks/train/a.png', np.full((4, 6), 2, np.uint8))
    data = (plain/'images/train/b.jpg').read_bytes()
    (plain/'images/train/b.jpg').write_bytes(data[:len(data)//2])
    src.check()
    with pytest.raises(LayoutError, match=r'(?s)2 problems.*a\.png.*2 classes.*b\.jpg: cannot be read'):
        src.check(read=True)
    (plain/'masks/val/c.png').unlink()
    with pytest.raises(LayoutError, match=r'1 problem\n.*c\.png is missing'): src.check()

@pytest.mark.parametrize('spoil,message', [
    (lambda p: (p/'classes.txt').unlink(), 'no names of classes: write them into .*codes.txt'),
    (lambda p: shutil.rmtree(p/'images/val'), 'expected subfolders train/ and val/'),
    (lambda p: shutil.copy(p/'images/train/a.jpg', p/'images/train/a.png'), 'have the same name'),
    (lambda p: shutil.copy(p/'images/train/a.jpg', p/'images/val/a.jpg'), 'ids must differ'),
    (lambda p: (p/'images/val/c.jpg').unlink(), 'is empty; expected images'),
    (lambda p: shutil.rmtree(p/'masks'), 'masks: no such folder'),
])
def test_wrong_folder(plain, spoil, message):
    spoil(plain)
    with pytest.raises(LayoutError, match=message): folder(plain)

def test_ids_are_unique():
    with pytest.raises(LayoutError, match='these do not: a'):
        Source('x', None, ['k'], {'train':['a'], 'val':['a']}, {}, {})

def test_sbd_mat(tmp_path):
    from scipy.io import savemat
    voc = tmp_path/'VOC2012'
    for f in ('JPEGImages', 'SegmentationClass', 'ImageSets/Segmentation'): (voc/f).mkdir(parents=True)
    for i in ('t', 'v', 's'): Image.new('RGB', (6, 4)).save(voc/f'JPEGImages/{i}.jpg')
    for i in ('t', 'v'):
        write_label_map(voc/f'SegmentationClass/{i}.png', np.zeros((4, 6), np.uint8))
        (voc/'ImageSets/Segmentation'/dict(t='train.txt', v='val.txt')[i]).write_text(i)
    cls = tmp_path/'benchmark_RELEASE/dataset/cls'
    cls.mkdir(parents=True)
    for i in ('v', 's'): savemat(cls/f'{i}.mat', {'GTcls':{'Segmentation':np.full((4, 6), 20, np.uint8)}})
    src = voc2012(tmp_path).check(read=True)
    assert src.splits == {'train':['s','t'], 'val':['v']}
    assert src.mask('s').max() == 20 and src.mask('v').max() == 0            # VOC's own mask wins where both have one
    (cls/'s.mat').write_bytes(b'nothing')
    with pytest.raises(AnnotationError, match='s.mat: not an SBD label file'): src.mask('s')
    (voc/'ImageSets/Segmentation/train_aug.txt').write_text('t\nx\n')
    Image.new('RGB', (6, 4)).save(voc/'JPEGImages/x.jpg')
    with pytest.raises(LayoutError, match='nothing labels 1 of 3 images, such as x'): voc2012(tmp_path).check()
    with pytest.raises(ValueError, match="train='all'"): voc2012(tmp_path, train='all')

def test_segnet_camvid(tmp_path):
    for s in ('train', 'val', 'test'):
        for f in (s, s+'annot'): (tmp_path/'CamVid'/f).mkdir(parents=True)
        Image.new('RGB', (6, 4)).save(tmp_path/f'CamVid/{s}/{s}1.png')
        write_label_map(tmp_path/f'CamVid/{s}annot/{s}1.png', np.tile(np.uint8([10,11]), (4, 3)))
    src = camvid(tmp_path).check(read=True)
    assert src.mask('val1')[0,:2].tolist() == [10,255]
    assert len(src.classes) == 11
    assert list(src.splits) == ['train','val','test']

def test_cityscapes_prefers_train_ids(tmp_path):
    for s in ('train', 'val'):
        for f in ('leftImg8bit', 'gtFine'): (tmp_path/f/s/'ulm').mkdir(parents=True)
        Image.new('RGB', (6, 4)).save(tmp_path/f'leftImg8bit/{s}/ulm/{s}_leftImg8bit.png')
        for kind, v in dict(labelIds=26, labelTrainIds=13).items():
            write_label_map(tmp_path/f'gtFine/{s}/ulm/{s}_gtFine_{kind}.png', np.full((4, 6), v, np.uint8))
    assert cityscapes(tmp_path).mask('train').max() == 13
    for f in tmp_path.rglob('*TrainIds.png'): f.unlink()
    assert cityscapes(tmp_path).mask('train').max() == 13
    next(tmp_path.rglob('val_gtFine_labelIds.png')).unlink()
    with pytest.raises(LayoutError, match='gtFine'): cityscapes(tmp_path)

def test_ade20k_class_names(tmp_path):
    for s in ('training', 'validation'):
        for f in ('images', 'annotations'): (tmp_path/f/s).mkdir(parents=True)
        Image.new('RGB', (6, 4)).save(tmp_path/f'images/{s}/{s}.jpg')
        write_label_map(tmp_path/f'annotations/{s}/{s}.png', np.zeros((4, 6), np.uint8))
    assert ade20k(tmp_path).classes[149] == 'class 150'
    rows = ''.join(f'{i}\t.1\t1\t1\tthing{i}, other\n' for i in range(1, 151))
    (tmp_path/'objectInfo150.txt').write_text('Idx\tRatio\tTrain\tVal\tName\n'+rows)
    assert ade20k(tmp_path).classes[:2] == ['thing1','thing2']

def test_annotation_is_kept_and_safe_to_change():
    src = scenes(n_train=2, n_val=1)
    first = src.annotation('train_0000', 'scribble')
    again = first.copy()
    first[:] = 3
    assert (src.annotation('train_0000', 'scribble') == again).all()
    assert (scenes(n_train=1, n_val=0).annotation('train_0000') == again).all()
    assert (src.annotation('train_0000', 'point:seed=1') != src.annotation('train_0000', 'point')).any()

def test_scenes_written_and_read(tmp_path):
    src = scenes(tmp_path/'s', n_train=3, n_val=2, size=64, seed=5)
    assert src.root == tmp_path/'s' and not [o for o in tmp_path.iterdir() if o.name != 's']
    assert (camvid(tmp_path/'s').mask('val_0001') == scenes(n_train=0, n_val=2, size=64, seed=5).mask('val_0001')).all()
    (tmp_path/'other').mkdir()
    with pytest.raises(LayoutError, match='holds no scenes'): scenes(tmp_path/'other')

def test_phantoms_written_and_read(tmp_path):
    src = phantoms(tmp_path/'p', n_train=3, n_val=2, size=64, seed=5)
    assert (src.mask('val_0001') == phantoms(n_train=0, n_val=2, size=64, seed=5).mask('val_0001')).all()
    assert src.classes == ['background', 'right ventricle', 'muscle', 'left ventricle']
    with pytest.raises(LayoutError, match="asked for .*'seed': 6.*name another folder"):
        phantoms(tmp_path/'p', n_train=3, n_val=2, size=64, seed=6)
    with pytest.raises(LayoutError, match='holds no scenes'): scenes(tmp_path/'p', n_train=3, n_val=2, size=64)

def test_camvid_real(data_dir):
    if not (data_dir/'camvid').is_dir(): pytest.skip('CamVid is not there')
    src = camvid(data_dir/'camvid').check()
    assert {k:len(v) for k, v in src.splits.items()} == {'train':367, 'val':101}
    assert src.shape('0001TP_006690') == (360, 480) == src.annotation('0001TP_006690', 'scribble').shape

# ---- tags, base and novel classes

def tag_file(path, text, **kwargs):
    (path/'tags.csv').write_text(text, encoding='utf-8')
    return folder(path, **kwargs)

def test_tags_follow_from_the_masks(plain):
    write_label_map(plain/'masks/train/a.png', np.full((4, 6), 1, np.uint8))
    write_label_map(plain/'masks/train/b.png', np.full((4, 6), 255, np.uint8))
    src = folder(plain)
    assert [src.tags(i) for i in 'abc'] == [(1,), (), (0, 1)]
    with pytest.raises(AnnotationError, match='no tag for 1 of 2 train images, such as b'): src.check_tags()
    with pytest.raises(AnnotationError, match='no tag for 1 of 2 train images, such as b'): src.precompute('tag')

def test_tags_follow_from_sparse_labels(plain):
    (plain/'masks').rename(plain/'scribble')
    write_label_map(plain/'scribble/train/a.png', np.full((4, 6), 255, np.uint8))
    (plain/'point/train').mkdir(parents=True)
    write_label_map(plain/'point/train/a.png', np.where(np.eye(4, 6), 1, 255))
    src = folder(plain)
    assert (src.tags('a'), src.tags('b')) == ((1,), (0, 1))
    assert folder(plain, masks='scribble', kind='scribble').tags('b') == (0, 1)

def test_a_mask_that_is_read_leaves_its_tags(plain, monkeypatch):
    src = folder(plain)
    src.annotation('a', 'scribble')
    monkeypatch.setattr(datasets, '_read_mask', lambda *args: pytest.fail('read again'))
    assert src.tags('a') == (0, 1)

@pytest.mark.parametrize('text', ['image,tags\na,one;two\nb.jpg,two\n', '\ufeffimage,tags\r\na,one|two\r\nb,two\r\n',
                                  'image,tags\na,two\n\na,one\nb,two\n', 'image,tags\na.jpg,"two ; one"\nb,two\n'])
def test_tag_file(plain, text):
    src = tag_file(plain, text).check(read=True)
    assert [src.tags(i) for i in 'abc'] == [(0, 1), (1,), (0, 1)]     # c is for validation and has a mask

def test_tags_without_masks_for_training(plain):
    "Masks for validation alone: what somebody has who tags"
    shutil.rmtree(plain/'masks/train')
    src = tag_file(plain, 'image,tags\na,one\nb,two\n').check(read=True)
    assert (src.annotation('a', 'tag') == 255).all() and src.mask('c').max() == 1
    with pytest.raises(LayoutError, match="no mask for 'a'"): src.annotation('a', 'scribble')
    shutil.rmtree(plain/'masks')
    with pytest.raises(LayoutError, match='tags.csv: no tags for 1 of 3 images, such as c'): folder(plain)
    assert tag_file(plain, 'image,tags\na,one\nb,two\nc,one\n').check().mask_kind == 'absent'

@pytest.mark.parametrize('text,message', [
    ('image,tags\na,one\n', 'no tags for 1 of 3 images, such as b'),
    ('image,tags\nz,one\n', "no image 'z' among the 3"),
    ('image,tags\na,three\n', "image 'a' has the tag 'three', which is none of the 2 classes: one, two"),
    ('image,tags\na, ; \n', "image 'a' has no tag"),
    ('a,one\n', 'expected the header image,tags, found a,one'), ('', 'found nothing'),
    ('image,tags\na,one,two\n', 'several with ; between them.*found a,one,two'),
])
def test_wrong_tag_file(plain, text, message):
    with pytest.raises((AnnotationError, LayoutError), match=message) as e: tag_file(plain, text)
    assert '\n' not in str(e.value)
    with pytest.raises(LayoutError, match='other.csv: no such file; expected tags'): folder(plain, tags='other.csv')

def test_tags_from_folders(tmp_path):
    for i, c in dict(a='one', b='two', c='one').items():
        (tmp_path/f'images/{c}').mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (6, 4)).save(tmp_path/f'images/{c}/{i}.jpg')
    src = folder(tmp_path, ['one','two'], tags='folders', val=.4).check(read=True)
    assert [src.tags(i) for i in 'abc'] == [(0,), (1,), (0,)] and len(src.splits['val']) == 1
    for s in ('train', 'val'): shutil.copytree(tmp_path/'images', tmp_path/f'more/{s}')
    for f in (tmp_path/'more/val').rglob('*.jpg'): f.rename(f.with_stem('v'+f.stem))
    assert folder(tmp_path, ['one','two'], 'more', tags='folders').tags('vb') == (1,)
    with pytest.raises(LayoutError, match="b.jpg: tags='folders' expects a folder named by a class"):
        folder(tmp_path, ['one'], tags='folders')

def test_voc_objects(tmp_path):
    voc = tmp_path/'VOC2012'
    for f in ('JPEGImages', 'SegmentationClass', 'ImageSets/Segmentation', 'Annotations'): (voc/f).mkdir(parents=True)
    for s, i in (('train', 't'), ('val', 'v')):
        Image.new('RGB', (6, 4)).save(voc/f'JPEGImages/{i}.jpg')
        write_label_map(voc/f'SegmentationClass/{i}.png', np.zeros((4, 6), np.uint8))
        (voc/f'ImageSets/Segmentation/{s}.txt').write_text(i)
    def objects(i, *names):
        text = ''.join(f'<object><name>{n}</name></object>' for n in names)
        (voc/f'Annotations/{i}.xml').write_text(f'<annotation>{text}</annotation>')
    objects('t', 'person', 'cat', 'person')
    assert voc2012(tmp_path).tags('t') == (0,)                           # not all images have a file: the masks count
    with pytest.raises(LayoutError, match='no XML file for 1 of 2 images, such as v'):
        voc2012(tmp_path, tags=voc/'Annotations')
    objects('v', 'dog')
    src = voc2012(tmp_path).check(read=True)
    assert (src.tags('t'), src.tags('v')) == ((8, 15), (12,)) and pickle.loads(pickle.dumps(src)).tags('t') == (8, 15)
    for text in ('<annotation>', '<!DOCTYPE a [<!ENTITY b "c">]><a>&b;</a>'):
        (voc/'Annotations/v.xml').write_text(text)
        with pytest.raises(AnnotationError, match='v.xml: not a plain XML file'): voc2012(tmp_path).tags('v')
    objects('v', 'cow', 'unicorn')
    with pytest.raises(LayoutError, match="v.xml: an object is a 'unicorn', none of VOC's 21 classes"):
        voc2012(tmp_path).check(read=True)

def test_tags_written_and_read(plain):
    (plain/'classes.txt').write_text('one\ntwo; or three\n')
    src = folder(plain)
    datasets.write_tags(src, plain/'tags.csv')
    assert (plain/'tags.csv').read_text().splitlines()[:3] == ['image,tags', 'a,one', 'a,two; or three']
    assert [folder(plain).tags(i) for i in 'abc'] == [src.tags(i) for i in 'abc']

@pytest.mark.parametrize('kind', ['dense', 'scribble', 'point', 'block50', 'sim_scribble'])
def test_novel_classes_lose_their_labels_and_nothing_else(kind):
    src = scenes(n_train=4, n_val=1)
    for i in src.splits['train']:
        full, base = src.annotation(i, kind), src.annotation(i, f'{kind}:novel=striped box+1')
        assert (np.isin(full, (1, 3)) <= (base == 255)).all() and (base == full)[~np.isin(full, (1, 3))].all()
    assert src.tags('train_0001') == scenes(n_train=4, n_val=1).tags('train_0001')

def test_novel_of_released_labels(plain):
    (plain/'masks').rename(plain/'scribble')
    src = folder(plain)
    assert np.unique(src.annotation('a', 'scribble:novel=two')).tolist() == [0,255]
    assert np.unique(src.annotation('a')).tolist() == [0,1]

@pytest.mark.parametrize('spec,message', [
    ('dense:novel=cow', "annotation 'dense:novel=cow': folder has no class 'cow', it has one, two"),
    ('tag:novel=7', "no class '7'"),
    ('scribble:novel=one+two', 'all 2 classes of folder are novel, none is left to be labelled')])
def test_wrong_novel_classes(plain, spec, message):
    src = folder(plain)
    for ask in (lambda: src.annotation('a', spec), lambda: src.groups(spec), lambda: src.precompute(spec)):
        with pytest.raises(AnnotationError, match=message): ask()

def test_groups():
    src = scenes(n_train=1, n_val=1)
    assert src.groups('dense:novel=plain ring+striped disc') == dict(base=(0, 2, 3, 4), novel=(1, 5))
    assert src.groups('scribble') == {}


def test_tags_between_commas(tmp_path):
    "In one cell, as people write them; a class whose own name has a comma stays whole"
    (tmp_path/'tags.csv').write_text('image,tags\na,"cow, dog"\nb,"door, double"\nc,"door, double;cow"\n')
    found = datasets.read_tags(tmp_path/'tags.csv', dict(a=None, b=None, c=None), ['cow', 'dog', 'door, double'])
    assert found == dict(a=['cow', 'dog'], b=['door, double'], c=['door, double', 'cow'])
