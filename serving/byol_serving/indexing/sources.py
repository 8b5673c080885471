"""Where images come from: each source lists entries cheaply, in an order that never varies.

Listing costs names, sizes and times only; bytes are had by `Entry.load`, in a decoding thread.
`open_source` finds out what a path or URL is.
"""

import glob
from pathlib import Path

from byol_serving.errors import InvalidSource
from byol_serving.indexing import archives, remote, tables
from byol_serving.indexing.entries import Source, is_image
from byol_serving.indexing.folders import FolderSource, ListSource

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
LIST_SUFFIXES = (".txt", ".lst")


def open_source(
    place: str | Path, *, image_column: str | None = None, id_column: str | None = None
) -> Source:
    """The source at `place`.

    Args:
        place: a folder of images; a folder of (or a glob for) tar shards or Parquet files; one tar
            or Parquet file; a text file of paths or URLs, one a line; or an fsspec URL of a folder,
            a tar, a Parquet file or an image.
        image_column: Parquet column of image bytes or paths; by default looked for by its name.
        id_column: Parquet column of unique names; by default `id` or `key`, else file and row.

    Raises:
        InvalidSource: nothing there, or nothing that can be read as a source.
    """
    text = str(place)
    if "://" in text:
        return _open_url(text, image_column=image_column, id_column=id_column)
    # Path.glob takes no absolute pattern.
    files = [Path(each) for each in sorted(glob.glob(text))] if glob.has_magic(text) else []  # noqa: PTH207
    path = Path(text)
    if path.is_dir():
        files = _shards_in(path)
        if not files:
            return FolderSource(path)
    elif path.is_file():
        files = [path]
    if not files:
        raise InvalidSource(
            f"{text} does not exist; name a folder, a tar, a Parquet file, a list of paths or a URL"
        )
    names = [file.name.lower() for file in files]
    if all(name.endswith(TAR_SUFFIXES) for name in names):
        return archives.TarSource(text, [archives.local_archive(file) for file in files])
    if all(name.endswith(".parquet") for name in names):
        opened = [tables.local_table(file) for file in files]
        return tables.ParquetSource(text, opened, image_column=image_column, id_column=id_column)
    if len(files) == 1 and names[0].endswith(LIST_SUFFIXES):
        return ListSource(files[0])
    raise InvalidSource(
        f"{text} is of no known kind; wanted a folder, {', '.join(TAR_SUFFIXES)}, .parquet or .txt"
    )


def _open_url(url: str, *, image_column: str | None, id_column: str | None) -> Source:
    """The source behind a URL, by its ending: a tar, a Parquet file, one image, or a folder.

    Raises:
        InvalidSource: a scheme that nothing serves, a package missing, nothing there.
    """
    files, path = remote.connect(url)
    lower = path.lower()
    if lower.endswith(TAR_SUFFIXES):
        return archives.TarSource(url, [archives.remote_archive(files, path, url)])
    if lower.endswith(".parquet"):
        table = tables.remote_table(files, path, url)
        return tables.ParquetSource(url, [table], image_column=image_column, id_column=id_column)
    return remote.UrlFolder(url, files, path)


def _shards_in(folder: Path) -> list[Path]:
    """Tar or Parquet files that lie at a folder's top with no image beside them."""
    names = sorted(each.name for each in folder.iterdir() if not each.name.startswith("."))
    if any(is_image(name) for name in names):
        return []
    for suffixes in (TAR_SUFFIXES, (".parquet",)):
        if shards := [folder / name for name in names if name.lower().endswith(suffixes)]:
            return shards
    return []
