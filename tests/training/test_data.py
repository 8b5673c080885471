"""Folders and archives become pixels; what is wrong in them is listed, not fatal."""

import io
import resource
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from byol_serving import images as decoding
from byol_serving.errors import InvalidSource, StoreError
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
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]  # any mode
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


def test_greyscale_cmyk_16_bit_and_palette_files_are_read(tmp_path: Path) -> None:
    for name, mode, value in (
        ("grey.png", "L", 100),
        ("print.jpg", "CMYK", (10, 20, 30, 40)),
        ("deep.png", "I;16", 100 * 257),
        ("few.gif", "P", 1),
    ):
        Image.new(mode, (12, 12), value).save(tmp_path / name)
    images = load_images(tmp_path, 8)
    assert images.names == ["deep.png", "few.gif", "grey.png", "print.jpg"]
    assert not images.rejected
    assert images.pixels[0, 0, 0].tolist() == images.pixels[2, 0, 0].tolist() == [100, 100, 100]


def test_a_class_of_one_image_is_a_class(tmp_path: Path) -> None:
    files = {"a/1.png": png(1), "a/2.png": png(2), "b/1.png": png(3)}
    images = load_images(write(tmp_path, files), 8)
    assert images.labels is not None
    assert images.labels.tolist() == [0, 0, 1]


def test_a_link_to_nothing_is_rejected(tmp_path: Path) -> None:
    write(tmp_path, {"1.png": png(1)})
    (tmp_path / "2.png").symlink_to(tmp_path / "gone.png")
    images = load_images(tmp_path, 8)
    assert [(r.path, "No such file" in r.reason) for r in images.rejected] == [("2.png", True)]


def test_cache_is_used_again_and_only_for_what_it_was_made_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, cache = write(tmp_path / "s", FILES), tmp_path / "c"
    first = load_images(source, 8, cache=cache)
    check(first)
    assert first.on_disk
    decoded: list[int] = []
    load = decoding.load_input

    def counted(data: bytes, how: decoding.Preprocess) -> decoding.Pixels:
        decoded.append(len(data))
        return load(data, how)

    monkeypatch.setattr(decoding, "load_input", counted)
    again = load_images(source, 8, cache=cache)
    check(again)
    assert not decoded
    assert np.array_equal(again.pixels, first.pixels)
    assert again.fingerprint == first.fingerprint
    again.pixels[:] = 0  # copy on write: the cache stays as it is
    assert np.array_equal(load_images(source, 8, cache=cache).pixels, first.pixels)
    load_images(source, 8, cache=cache, only=["dog/2.png"])
    load_images(source, 6, cache=cache)
    (source / "cat/1.png").write_bytes(png(11, (13, 13)))
    changed = load_images(source, 8, cache=cache)
    assert changed.pixels[0, 0, 0, 0] == 11
    assert len(list(cache.iterdir())) == 4
    assert not list(cache.glob("*.tmp"))


def test_a_cache_without_room_says_so(tmp_path: Path) -> None:
    source = write(tmp_path / "s", {f"{i}.png": png(i) for i in range(20)})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(
            StoreError, match=r"no room for .* GiB of decoded images .* set --cache"
        ):
            load_images(source, 32, cache=tmp_path / "c")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list((tmp_path / "c").iterdir())


def test_a_damaged_cache_is_made_anew(tmp_path: Path) -> None:
    source, cache = write(tmp_path / "s", {"a.png": png(5), "b.png": png(6)}), tmp_path / "c"
    load_images(source, 8, cache=cache)
    (place,) = cache.iterdir()
    (place / "pixels.u8").write_bytes(b"short")
    assert load_images(source, 8, cache=cache).pixels[:, 0, 0, 0].tolist() == [5, 6]


def test_whole_pictures_keep_their_shape_in_mind(tmp_path: Path) -> None:
    wide = Image.new("RGB", (40, 20), (200, 0, 0))
    wide.paste((0, 0, 200), (10, 0, 30, 20))
    wide.save(tmp_path / "a.png")
    turned = Image.Exif()
    turned[0x0112] = 6
    wide.save(tmp_path / "b.jpg", exif=turned, quality=95)
    images = load_images(tmp_path, 20, resize="whole")
    assert images.shapes is not None
    assert images.shapes.tolist() == [[20, 40], [40, 20]]
    assert images.pixels[0, 10, [0, 19], 0].tolist() == [200, 200]  # both ends are there
    assert (images.squares(np.array([0]))[0, :, 1:-1, 2] > 170).all()  # the centre, not squashed
    again = load_images(tmp_path, 20, resize="whole", cache=tmp_path / "c")
    assert again.shapes is not None
    assert again.shapes.tolist() == images.shapes.tolist()
