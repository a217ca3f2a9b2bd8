"""Fetches LEVIR-CD (2.5 GB) and unpacks it to data/train, data/val and data/test.

    python data/download.py [FOLDER]

What is there already is skipped, so a broken download goes on where it stopped, an archive at a time.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import urllib.error
from pathlib import Path

from torchvision.datasets.utils import download_and_extract_archive

URL = "https://huggingface.co/datasets/satellite-image-deep-learning/LEVIR-CD/resolve/6a6bb0a5b389403d81c05e33bf08bc0b9e5f13a6"
MD5 = {
    "train": "a638e71f480628652dea78d8544307e4",  # 1.72 GB
    "val": "f7b857978524f9aa8c3bf7f94e3047a4",  # 0.25 GB
    "test": "07d5dd89e46f5c1359e2eca746989ed9",  # 0.50 GB
}


class DownloadError(RuntimeError):
    """An archive that can't be fetched or isn't the one expected; the message says what to do."""


def download(folder: str | os.PathLike, url: str = URL, md5: dict[str, str] = MD5) -> None:
    """Make `folder/SPLIT/{A,B,label}` from the archives `url/SPLIT.zip`; a split folder that is there is kept as is.

    Args:
        folder: made where missing.
        url: where the archives lie.
        md5: the archives' checksums, by split.

    Raises:
        DownloadError: an archive can't be fetched, or its checksum differs.
    """
    for split, checksum in md5.items():
        archive, target, part = f"{url}/{split}.zip", Path(folder, split), Path(folder, f"{split}.part")
        if target.is_dir():
            print(f"{target} is there already")
            continue
        shutil.rmtree(part, ignore_errors=True)  # left by a run that was stopped while unpacking
        try:
            download_and_extract_archive(archive, folder, part, md5=checksum, remove_finished=True)
        except (urllib.error.URLError, OSError) as error:
            raise DownloadError(f"{archive}: can't be fetched ({error}); try again, or see data/README.md") from error
        except RuntimeError as error:
            raise DownloadError(
                f"{Path(folder, split)}.zip: its MD5 isn't {checksum}: cut short, or another file; "
                "run this again to fetch it anew"
            ) from error
        except Exception as error:  # what zipfile meets in a broken archive
            raise DownloadError(f"{Path(folder, split)}.zip: can't be unpacked ({error}); fetch it anew") from error
        os.replace(part, target)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Fetch LEVIR-CD, 2.5 GB, and unpack it; what is there is skipped.")
    parser.add_argument("folder", nargs="?", type=Path, default=Path(__file__).parent, help="(data)")
    try:
        download(parser.parse_args().folder)
    except DownloadError as error:
        sys.exit(f"error: {error}")
