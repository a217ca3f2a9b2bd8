"""Downloads LEVIR-CD (2.5 GB) and unpacks it to data/train, data/val and data/test.

    python data/download.py [FOLDER]

A split that exists is skipped, so an interrupted download continues with the archive it had reached.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from pathlib import Path

from torchvision.datasets.utils import download_and_extract_archive

URL = "https://huggingface.co/datasets/satellite-image-deep-learning/LEVIR-CD/resolve/6a6bb0a5b389403d81c05e33bf08bc0b9e5f13a6"
MD5 = {
    "train": "a638e71f480628652dea78d8544307e4",  # 1.72 GB
    "val": "f7b857978524f9aa8c3bf7f94e3047a4",  # 0.25 GB
    "test": "07d5dd89e46f5c1359e2eca746989ed9",  # 0.50 GB
}


class DownloadError(RuntimeError):
    """An archive that can't be downloaded or unpacked."""


def download(folder: str | os.PathLike, url: str = URL, md5: dict[str, str] = MD5) -> None:
    """Make `folder/SPLIT/{A,B,label}` from `url/SPLIT.zip`, for each split whose checksum `md5` gives.

    Raises:
        DownloadError: an archive can't be downloaded or unpacked, or its checksum differs.
    """
    for split, checksum in md5.items():
        archive, target, unfinished = f"{url}/{split}.zip", Path(folder, split), Path(folder, f"{split}.part")
        if target.is_dir():
            print(f"{target} exists already")
            continue
        shutil.rmtree(unfinished, ignore_errors=True)  # left by a run that was stopped while unpacking
        try:
            download_and_extract_archive(archive, folder, unfinished, md5=checksum, remove_finished=True)
        except Exception as error:  # a network, a disk and a broken archive raise many kinds
            raise DownloadError(f"{archive}: {error}; run this again, or see data/README.md") from error
        os.replace(unfinished, target)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Download LEVIR-CD (2.5 GB) and unpack the splits that are missing.")
    parser.add_argument("folder", nargs="?", type=Path, default=Path(__file__).parent, help="(data)")
    try:
        download(parser.parse_args().folder)
    except DownloadError as error:
        sys.exit(f"error: {error}")
