"""`byol index`: from a folder, archive or bucket into a collection, here or behind a server."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from byol_cli.offline import Engine, engine_options, finish, offline_bar, plan_options, quiet_option
from byol_cli.options import index_option
from byol_cli.output import json_option

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from byol_serving.bundle import BundleInfo
    from byol_serving.client import Client
    from byol_serving.collections.types import CollectionInfo, IndexKind, Metadata
    from byol_serving.indexing.sinks import Target


@click.command()
@click.argument("source")
@engine_options
@click.option("--collection", "-c", required=True, help="Collection; made if it is not there.")
@click.option(
    "--store",
    type=click.Path(path_type=Path, file_okay=False),
    help="The store it is in, on this machine and not being served.",
)
@click.option(
    "--server", default="127.0.0.1:50051", show_default=True, help="Or the server that has it."
)
@index_option("flat")
@click.option(
    "--journal",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder that remembers what is done; default: in the store, or with --server in"
    " ~/.local/state/byol.",
)
@plan_options
@quiet_option
@json_option
def command(
    source: str,
    bundle_path: Path,
    engine: Engine,
    collection: str,
    store: Path | None,
    server: str,
    index: "IndexKind",
    journal: Path | None,
    quiet: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Embed SOURCE into a collection: a folder, tars, Parquet files, a list of paths, or a URL.

    Metadata comes from folder names (`label`), JSON files beside the images and Parquet columns.
    Stop it at any point and start it again: finished shards are kept.

    \b
    Example:  byol index photos --bundle bundles/photos --store store -c photos
              byol index photos --bundle bundles/photos --server 127.0.0.1:50051 -c photos --sync
    """
    from byol_serving.bundle import load_bundle
    from byol_serving.indexing.plan import EmbedPlan
    from byol_serving.indexing.sinks import CollectionSink
    from byol_serving.indexing.sources import open_source

    columns = {key: settings[key] for key in ("image_column", "id_column")}
    place = hashlib.sha256(open_source(source, **columns).location.encode()).hexdigest()[:16]
    bundle = load_bundle(bundle_path)
    opened = (
        _in_store(store, collection, bundle.info, index)
        if store is not None
        else _on_server(server, collection, bundle.info, index)
    )
    with opened as (target, folder), offline_bar(quiet or as_json) as on_progress:
        plan = EmbedPlan(source=source, out=journal or folder / place, **settings)
        sink = CollectionSink(collection, target)
        summary = engine.run(plan, bundle, sink, on_progress)
    finish(summary, as_json)


@contextmanager
def _in_store(
    path: Path, name: str, encoder: "BundleInfo", index: "IndexKind"
) -> "Iterator[tuple[Target, Path]]":
    """The collection, and a folder in it for journals, so that they are dropped with it."""
    from byol_serving.collections.store import Store
    from byol_serving.errors import UnknownCollection

    with Store(path) as store:
        try:
            found = store.get(name)
        except UnknownCollection:
            found = store.create(name, dim=encoder.dim, encoder_id=encoder.encoder_id, index=index)
        _check(found.info, encoder)
        yield found, path / name / "indexing"


@contextmanager
def _on_server(
    address: str, name: str, encoder: "BundleInfo", index: "IndexKind"
) -> "Iterator[tuple[Target, Path]]":
    """The collection behind a server, and a folder of this user's for journals."""
    from byol_serving.client import Client
    from byol_serving.errors import UnknownCollection

    with Client(address) as client:
        try:
            info = client.collection(name)
        except UnknownCollection:
            info = client.create_collection(
                name, dim=encoder.dim, encoder_id=encoder.encoder_id, index=index
            )
        _check(info, encoder)
        state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
        folder = hashlib.sha256(f"{address}/{name}".encode()).hexdigest()[:16]
        target = _Served(client, name, encoder.encoder_id)
        yield target, state / "byol" / "index" / folder


@dataclass(frozen=True)
class _Served:
    """A collection behind a server, as a sink wants it."""

    client: "Client"
    name: str
    encoder_id: str

    def upsert(
        self, ids: Sequence[str], vectors: "NDArray[np.float32]", metadata: "Sequence[Metadata]"
    ) -> object:
        """Inserts or replaces; on disk when it returns."""
        return self.client.upsert(
            self.name, ids, vectors=vectors, metadata=metadata, encoder_id=self.encoder_id
        )

    def delete(self, ids: Sequence[str]) -> object:
        """Deletes what exists of `ids`."""
        return self.client.delete(self.name, ids)

    def get(self, ids: Sequence[str]) -> object:
        """Raises UnknownId where one is not there."""
        return self.client.get(self.name, ids)


def _check(info: "CollectionInfo", encoder: "BundleInfo") -> None:
    """Refuses a collection of another encoder before anything is embedded."""
    from byol_serving.errors import EncoderMismatch

    if info.encoder_id != encoder.encoder_id:
        raise EncoderMismatch(
            f"collection {info.name!r} holds vectors of encoder {info.encoder_id[:12]}, not of"
            f" {encoder.encoder_id[:12]}; use another collection, or the bundle that made it"
        )
