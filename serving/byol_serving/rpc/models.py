"""The encoders that the server holds: models by name, versions of each, one of them in use.

A request takes a model with `Models.using` and keeps it until it is answered. So a switch to
another version fails nobody: requests that have begun end on the version they began with, and that
one is closed when the last of them has let go.
"""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import TracebackType

from byol_serving.bundle import BundleInfo
from byol_serving.errors import EncoderMismatch, FailedPrecondition, UnknownModel
from byol_serving.rpc.features import Features
from byol_serving.rpc.pipeline import Pipeline


@dataclass(eq=False)
class Model:
    """One version of an encoder that is ready to answer."""

    name: str
    version: str
    info: BundleInfo
    provider: str
    pipeline: Pipeline
    features: Features
    requests: int = 0
    """That use it now."""
    idle: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        """Nobody uses it yet."""
        self.idle.set()

    async def close(self) -> None:
        """Waits for the requests that use it, and ends its threads."""
        await self.idle.wait()
        await self.features.close()
        await self.pipeline.close()

    def queued(self) -> dict[str, int]:
        """Images that wait for each step."""
        return {**self.pipeline.queued(), "features": self.features.queued()}


class Models:
    """What is loaded. Belongs to one event loop."""

    def __init__(self) -> None:
        """Holds nothing yet."""
        self.default = ""
        """The model of requests that name none."""
        self._versions: dict[str, dict[str, Model]] = {}
        self._in_use: dict[str, str] = {}

    def add(self, model: Model) -> None:
        """Takes a model in; the first version of a name is in use at once."""
        self._versions.setdefault(model.name, {})[model.version] = model
        self._in_use.setdefault(model.name, model.version)

    def all(self) -> list[Model]:
        """Every version of every model, sorted."""
        return [
            versions[version]
            for _, versions in sorted(self._versions.items())
            for version in sorted(versions)
        ]

    def remove(self, model: Model) -> None:
        """Takes a version out: no further request finds it. Who has it keeps it."""
        versions = self._versions[model.name]
        del versions[model.version]
        if not versions:
            del self._versions[model.name], self._in_use[model.name]

    def use(self, model: Model) -> None:
        """Makes a loaded version the one that requests without a version get."""
        self._in_use[model.name] = model.version

    def versions(self, name: str) -> Mapping[str, Model]:
        """The loaded versions of a model; none if it is unknown."""
        return dict(self._versions.get(name, {}))

    def in_use(self, name: str) -> str:
        """The version in use of a model; empty if it is unknown."""
        return self._in_use.get(name, "")

    def is_in_use(self, model: Model) -> bool:
        """Whether requests that name no version get this one."""
        return self._in_use.get(model.name) == model.version

    def find(self, name: str = "", version: str = "") -> Model:
        """A model; without a name the default one, without a version the one in use.

        Raises:
            UnknownModel: no such model, or not this version of it.
            FailedPrecondition: no name was given, and the server has no default model.
        """
        if not name and self.default not in self._versions:
            raise FailedPrecondition(
                "this server has no encoder for requests that name none; start it with --bundle or"
                " --models, or name one of several"
            )
        name = name or self.default
        versions = self._versions.get(name)
        if versions is None:
            known = ", ".join(sorted(self._versions)) or "none"
            raise UnknownModel(f"no model {name!r}; loaded are: {known}")
        version = version or self._in_use[name]
        if version not in versions:
            known = ", ".join(sorted(versions))
            raise UnknownModel(f"model {name!r} has no version {version!r}; loaded are: {known}")
        return versions[version]

    def using(self, name: str = "", version: str = "") -> "Held":
        """The model, kept open until the block ends; raises as `find`."""
        return Held(self.find(name, version))

    def making(self, encoder_id: str, collection: str) -> "Held":
        """The model that makes a collection's vectors, kept open until the block ends.

        Raises:
            EncoderMismatch: no loaded model has this encoder_id.
            FailedPrecondition: no model is loaded at all.
        """
        for model in self.all():
            if model.info.encoder_id == encoder_id:
                return Held(model)
        loaded = self.find().info.encoder_id
        raise EncoderMismatch(
            f"collection {collection!r} holds vectors of encoder {encoder_id[:12]}, not of"
            f" {loaded[:12]}; use another collection, or serve the encoder that made it"
        )

    async def close(self) -> None:
        """Closes all."""
        for model in self.all():
            await model.close()


class Held:
    """A model that stays open while the `with` block lasts."""

    def __init__(self, model: Model) -> None:
        """Made by `Models` only."""
        self._model = model

    def __enter__(self) -> Model:
        """The model."""
        if not self._model.requests:
            self._model.idle.clear()
        self._model.requests += 1
        return self._model

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Lets go of it."""
        self._model.requests -= 1
        if not self._model.requests:
            self._model.idle.set()
