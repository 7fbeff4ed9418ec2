"""Numbered shards of TFRecord files, such as `train.tfrecord-00000-of-00010`."""

import glob
import os
import re


def complete_shards(name: str) -> list[str]:
    """Paths of the shards `name-00000-of-00010` etc. of a complete set; [] if there is none."""
    numbered = re.compile(re.escape(name) + r"-(\d{5})-of-(\d{5})$")
    sets: dict[int, list[str]] = {}
    for path in sorted(glob.glob(f"{glob.escape(name)}-*")):
        match = numbered.match(path)
        if match:
            sets.setdefault(int(match[2]), []).append(path)
    return next((paths for size, paths in sorted(sets.items()) if len(paths) == size), [])


def shard_paths(name: str, num_shards: int) -> list[str]:
    """Paths `name-00000-of-00010` etc. of a set of shards."""
    return [f"{name}-{k:05d}-of-{num_shards:05d}" for k in range(num_shards)]


def tfds_shards(name: str, split: str) -> list[str]:
    """Shards of the newest version that TensorFlow Datasets has prepared; [] if there is none.

    Data sets are looked for in TFDS_DATA_DIR, or in TensorFlow Datasets' default folder.
    """
    root = os.environ.get("TFDS_DATA_DIR") or os.path.expanduser("~/tensorflow_datasets")
    # A build that was interrupted leaves a folder such as `1.0.0.incomplete7C2`, which is no version.
    folders = glob.glob(os.path.join(glob.escape(root), name, "[0-9]*"))
    versions = [path for path in folders if re.fullmatch(r"[\d.]+", os.path.basename(path))]
    version = lambda path: [int(x) for x in re.findall(r"\d+", os.path.basename(path))]
    for folder in sorted(versions, key=version, reverse=True):
        paths = complete_shards(os.path.join(folder, f"{name.split('/')[0]}-{split}.tfrecord"))
        if paths:
            return paths
    return []
