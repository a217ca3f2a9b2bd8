"""data/download.py against a server on this machine."""

import functools
import hashlib
import http.server
import threading
import zipfile

import numpy as np
import pytest
from conftest import random_pair, write_pair

from data.download import DownloadError, download
from dataset import LEVIRCD


@pytest.fixture
def served(tmp_path):
    """Archives of train and val, a pair each, on a server: (their folder, its URL, their checksums)."""
    folder, md5 = tmp_path / "served", {}
    folder.mkdir()
    for split in ("train", "val"):
        source = tmp_path / "source" / split
        write_pair(source, f"{split}_1", *random_pair(np.random.default_rng(0), 16, 16))
        with zipfile.ZipFile(folder / f"{split}.zip", "w") as archive:
            for file in source.rglob("*.png"):
                archive.write(file, file.relative_to(source))
        md5[split] = hashlib.md5((folder / f"{split}.zip").read_bytes()).hexdigest()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield folder, f"http://127.0.0.1:{server.server_port}", md5
        server.shutdown()


def test_goes_on_after_a_broken_archive(served, tmp_path):
    folder, url, md5 = served
    whole = (folder / "val.zip").read_bytes()
    (folder / "val.zip").write_bytes(whole[:-20])
    with pytest.raises(DownloadError, match=rf"^{url}/val\.zip: File not found or corrupted\.; run this again"):
        download(tmp_path / "data", url, md5)
    assert not (tmp_path / "data" / "val").exists()
    (folder / "val.zip").write_bytes(whole)
    (folder / "train.zip").unlink()  # so that downloading it again would fail
    download(tmp_path / "data", url, md5)
    for split in md5:
        assert LEVIRCD(tmp_path / "data", split).name(0) == f"{split}_1"
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == ["train", "val"]


def test_a_failure_is_one_line(served, tmp_path):
    folder, url, md5 = served
    (folder / "train.zip").unlink()
    for address in (url, "http://127.0.0.1:9"):  # where there is no server
        with pytest.raises(DownloadError, match=rf"^{address}/train\.zip: [^\n]+$"):
            download(tmp_path / "data", address, md5)
    assert not (tmp_path / "data" / "train").exists()
