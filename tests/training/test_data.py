"""Folders and archives become pixels; what is wrong in them is listed, not fatal."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from byol_serving.errors import InvalidSource
from byol_training import data
from byol_training.data import images_from_arrays, load_images


def png(shade: int, size: tuple[int, int] = (12, 10)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (shade, 0, 255 - shade)).save(buffer, "PNG")
    return buffer.getvalue()


def write(root: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def pack(path: Path, files: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


FILES = {
    "dog/2.png": png(40),
    "cat/1.png": png(10),
    "cat/b/3.PNG": png(20),
    "cat/bad.jpg": b"no picture",
    "dog/empty.png": b"",
    "dog/short.png": png(9)[:40],
    "dog/.hidden.png": png(1),
    "notes.txt": b"read me",
}


def check(images: data.Images) -> None:
    assert images.names == ["cat/1.png", "cat/b/3.PNG", "dog/2.png"]
    assert images.pixels.shape == (3, 8, 8, 3)
    assert images.pixels.dtype == np.uint8
    assert images.pixels[:, 0, 0, 0].tolist() == [10, 20, 40]
    assert images.classes == ["cat", "dog"]
    assert images.labels is not None
    assert images.labels.tolist() == [0, 0, 1]
    assert [r.path for r in images.rejected] == ["cat/bad.jpg", "dog/empty.png", "dog/short.png"]
    assert all(r.reason and "\n" not in r.reason for r in images.rejected)


def test_folder(tmp_path: Path) -> None:
    check(load_images(write(tmp_path, FILES), 8, workers=2))


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_tar_is_read_like_its_folder(tmp_path: Path, mode: str) -> None:
    folder = load_images(write(tmp_path / "f", FILES), 8)
    renamed = {"./" + name: content for name, content in FILES.items()}
    archive = load_images(pack(tmp_path / "a.tar", renamed, mode), 8, workers=2)
    check(archive)
    assert archive.fingerprint == folder.fingerprint


def test_fingerprint_tells_sets_apart(tmp_path: Path) -> None:
    one = load_images(write(tmp_path / "1", {"a.png": png(1), "b.png": png(2)}), 8)
    other = load_images(write(tmp_path / "2", {"a.png": png(1), "c.png": png(2)}), 8)
    assert len(one.fingerprint) == 64
    assert one.fingerprint != other.fingerprint


def test_folders_around_all_images_are_no_classes(tmp_path: Path) -> None:
    files = {"set/train/cat/1.png": png(1), "set/train/dog/1.png": png(2)}
    assert load_images(write(tmp_path / "a", files), 8).classes == ["cat", "dog"]
    flat = load_images(write(tmp_path / "b", {"set/1.png": png(1), "set/2.png": png(2)}), 8)
    assert flat.labels is None
    mixed = load_images(write(tmp_path / "c", {"1.png": png(1), "x/2.png": png(2)}), 8)
    assert mixed.labels is None
    assert mixed.classes == []


def test_links_that_loop(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", {"x/1.png": png(1)})
    (folder / "x" / "again").symlink_to(folder)
    assert load_images(folder, 8).names == ["x/1.png"]


def test_truncated_archive_gives_what_it_has(tmp_path: Path) -> None:
    path = pack(tmp_path / "a.tar", {f"{i}.png": png(i) for i in range(5)})
    path.write_bytes(path.read_bytes()[: 2 * 1024 + 540])
    images = load_images(path, 8)
    assert images.names == ["0.png", "1.png"]
    assert [each.path for each in images.rejected] == ["a.tar", "2.png"]


@pytest.mark.parametrize("files", [{}, {"a.jpg": b"no"}, {"a.txt": b"no"}])
def test_nothing_readable(tmp_path: Path, files: dict[str, bytes]) -> None:
    (tmp_path / "s").mkdir()
    with pytest.raises(InvalidSource, match="no readable image"):
        load_images(write(tmp_path / "s", files), 8)


def test_no_source(tmp_path: Path) -> None:
    with pytest.raises(InvalidSource, match="does not exist"):
        load_images(tmp_path / "gone", 8)
    (tmp_path / "x.tar").write_bytes(b"hello")
    with pytest.raises(InvalidSource, match="no readable tar archive"):
        load_images(tmp_path / "x.tar", 8)


def test_large_sets_are_memory_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path, {"a/1.png": png(1), "b/2.png": png(2)})
    monkeypatch.setattr(data, "IN_MEMORY_LIMIT", 10)
    images = load_images(source, 8)
    assert isinstance(images.pixels, np.memmap)
    assert images.pixels[:, 0, 0, 0].tolist() == [1, 2]


def test_arrays() -> None:
    pixels = np.zeros((4, 8, 8, 3), np.uint8)
    pixels.flags.writeable = False
    images = images_from_arrays(pixels, labels=np.array([0, 1, 1, 2]))
    assert len(images) == 4
    assert images.classes == ["0", "1", "2"]
    assert images.pixels.flags.writeable
    with pytest.raises(InvalidSource, match="float32"):
        images_from_arrays(pixels.astype(np.float32))
    with pytest.raises(InvalidSource, match="do not match"):
        images_from_arrays(pixels, names=["a"])
