"""Loads, switches and unloads models while requests are being answered.

A bundle is loaded, proved on its golden pairs and warmed up before anything can reach it; the
switch itself is one assignment. One change at a time: it needs the memory of two encoders already.
"""

import asyncio
import ctypes
import gc
import logging
from collections.abc import Awaitable, Callable

from byol_serving.bundle import Bundle, load_bundle
from byol_serving.errors import ByolError, FailedPrecondition, InvalidRequest
from byol_serving.rpc.models import Model, Models
from byol_serving.shelf import Shelf

log = logging.getLogger("byol.models")

Open = Callable[[Bundle, str, str], Model]
"""Loads, proves and warms up a bundle as the named model and version; blocks."""
Say = Callable[[str, bool], Awaitable[None]]
"""Told of each model, and model/version, whether it can be asked now."""


class ModelKeeper:
    """Changes what `Models` holds. Belongs to one event loop."""

    def __init__(self, models: Models, shelf: Shelf, open_bundle: Open, say: Say) -> None:
        """Loads nothing yet."""
        self._models, self._shelf = models, shelf
        self._open, self._say = open_bundle, say
        self._change = asyncio.Lock()

    async def start(self, default: str) -> None:
        """Loads the bundle, and every version of the folder; of each model the newest is in use.

        A version of the folder that fails is logged and left out; the others are served.

        Args:
            default: model of requests that name none; empty: the bundle's, or the only one.

        Raises:
            InvalidBundle: the bundle is damaged, or fails its golden check.
            FailedPrecondition: no version of the default model could be loaded.
        """
        if self._shelf.own:
            await self.switch(self._shelf.own, "")
        names = self._shelf.names()
        for name in names:
            for version in self._shelf.versions(name):
                try:
                    await self.switch(name, version)
                except ByolError as error:
                    log.error("model %s version %s is left out: %s", name, version, error)
                    await self._say(f"{name}/{version}", False)
        only = names[0] if len(names) == 1 else ""
        self._models.default = default or self._shelf.own or only
        if self._models.default and not self._models.versions(self._models.default):
            raise FailedPrecondition(
                f"default model {self._models.default!r} is not loaded; see the log, or name"
                " another with --default-model"
            )

    async def load(self, name: str, version: str) -> Model:
        """A version, loaded now if it was not; raises as `Shelf.find`, and InvalidBundle."""
        async with self._change:
            return await self._load(name or self._models.default, version)

    async def switch(self, name: str, version: str, *, unload_previous: bool = False) -> Model:
        """Makes a version the one in use; raises as `load`.

        Args:
            name: of the model; empty: the default one.
            version: to use; empty: the newest in the folder, or what --bundle holds now.
            unload_previous: also take the version out that was in use; waits for its requests.
        """
        async with self._change:
            name = name or self._models.default
            before = self._models.in_use(name)
            model = await self._load(name, version)
            self._models.use(model)
            log.info("model=%s version=%s is in use", model.name, model.version)
            if unload_previous and before not in ("", model.version):
                await self._unload(name, before)
            return model

    async def refresh(self) -> None:
        """Switches to what --bundle holds now, if it is another encoder than before."""
        if self._shelf.own:
            await self.switch(self._shelf.own, "", unload_previous=True)

    async def unload(self, name: str, version: str) -> None:
        """Takes a version out, and waits for the requests that use it.

        Raises:
            UnknownModel: it is not loaded.
            FailedPrecondition: it is in use, and not the last version of its model.
        """
        async with self._change:
            model = self._models.find(name, version)
            if self._models.is_in_use(model) and len(self._models.versions(model.name)) > 1:
                raise FailedPrecondition(
                    f"version {model.version!r} of model {model.name!r} is in use; switch to"
                    " another version first"
                )
            name, version = model.name, model.version
            del model  # `_unload` is to let go of the last reference
            await self._unload(name, version)

    async def _load(self, name: str, version: str) -> Model:
        if not name:
            raise InvalidRequest("the request names no model and the server has no default one")
        path, version = self._shelf.find(name, version)
        if (loaded := self._models.versions(name).get(version)) is not None:
            return loaded
        bundle = await asyncio.to_thread(load_bundle, path)
        version = version or bundle.info.encoder_id[:12]
        if (loaded := self._models.versions(name).get(version)) is not None:
            return loaded
        if name == self._shelf.own and version != bundle.info.encoder_id[:12]:
            raise InvalidRequest(
                f"{path} holds version {bundle.info.encoder_id[:12]!r} now, not {version!r};"
                " leave the version out"
            )
        model = await asyncio.to_thread(self._open, bundle, name, version)
        self._models.add(model)
        await self._say(name, True)
        await self._say(f"{name}/{version}", True)
        return model

    async def _unload(self, name: str, version: str) -> None:
        model = self._models.find(name, version)
        self._models.remove(model)
        log.info("model=%s version=%s is unloaded", name, version)
        await self._say(f"{name}/{version}", False)
        if not self._models.versions(name):
            await self._say(name, False)
        # Whoever asked may leave: the threads must end all the same.
        await asyncio.shield(model.close())
        del model
        await asyncio.to_thread(_release_memory)


def _release_memory() -> None:
    """Gives the memory of an unloaded model back to the system.

    Pipeline, batchers and encoder refer to each other, and Python, which sees only small objects,
    would leave the sessions' memory lying for long; glibc keeps what was freed between two blocks
    that are in use, 4 MB a switch under load.
    """
    gc.collect()
    if (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)
