"""data/download.py against a server on this machine."""

import functools
import hashlib
import http.server
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import random_pair, write_pair

from data.download import MD5, DownloadError, download
from dataset import LEVIRCD


@pytest.fixture
def archives(tmp_path):
    """Archives of one pair each: (their folder, their address, their checksums, the paths that were asked for)."""
    served, asked = tmp_path / "served", []
    served.mkdir()
    for split in MD5:
        write_pair(tmp_path / "source" / split, f"{split}_1", *random_pair(np.random.default_rng(0), 16, 16))
        with zipfile.ZipFile(served / f"{split}.zip", "w") as archive:
            for file in (tmp_path / "source" / split).rglob("*.png"):
                archive.write(file, file.relative_to(tmp_path / "source" / split))

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            asked.append(self.path)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=served)) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        md5 = {split: hashlib.md5((served / f"{split}.zip").read_bytes()).hexdigest() for split in MD5}
        yield served, f"http://127.0.0.1:{httpd.server_port}", md5, asked
        httpd.shutdown()


def test_fetches_unpacks_and_skips_what_is_there(archives, tmp_path):
    _, url, md5, asked = archives
    download(tmp_path / "data", url, md5)
    for split in MD5:
        assert LEVIRCD(tmp_path / "data", split).name(0) == f"{split}_1"
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == ["test", "train", "val"]
    asked.clear()
    download(tmp_path / "data", url, md5)
    assert asked == []


def test_goes_on_where_it_stopped(archives, tmp_path):
    served, url, md5, asked = archives
    archive = served / "val.zip"
    held, whole = archive.read_bytes(), archive
    archive.write_bytes(held[:-20])
    with pytest.raises(DownloadError, match=r"val\.zip: its MD5 isn't"):
        download(tmp_path / "data", url, md5)
    assert (tmp_path / "data" / "train").is_dir() and not (tmp_path / "data" / "val").exists()
    whole.write_bytes(held)
    asked.clear()
    download(tmp_path / "data", url, md5)
    assert LEVIRCD(tmp_path / "data", "val").name(0) == "val_1" and "/train.zip" not in asked


@pytest.mark.parametrize("fault", ["no such file", "no server"])
def test_what_cannot_be_fetched(archives, tmp_path, fault):
    served, url, md5, _ = archives
    if fault == "no such file":
        (served / "train.zip").unlink()
    else:
        url = "http://127.0.0.1:9"
    with pytest.raises(DownloadError, match=f"{url}/train.zip: can't be fetched"):
        download(tmp_path / "data", url, md5)
    assert not Path(tmp_path / "data" / "train").exists()
