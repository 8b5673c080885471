"""Where a server's bundles lie on disk: the one of --bundle, and NAME/VERSION/ under --models."""

import re
from pathlib import Path

from byol_serving.bundle import INFO_FILE, load_bundle
from byol_serving.errors import InvalidConfig, InvalidRequest, UnknownModel

_GOOD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class Shelf:
    """Finds bundles by name and version; loads nothing."""

    def __init__(self, bundle: Path | None, models: Path | None) -> None:
        """Reads the facts of `bundle`, if there is one.

        Raises:
            InvalidBundle: `bundle` is none, or damaged.
            InvalidConfig: `models` is no folder, or has the name of `bundle` too.
        """
        if models is not None and not models.is_dir():
            raise InvalidConfig(f"models {models} is not a folder; give one of NAME/VERSION/")
        self._bundle, self._folder = bundle, models
        self.own = "" if bundle is None else load_bundle(bundle).info.name
        """The name of the model of `bundle`."""
        if self.own and self.own in self.names():
            raise InvalidConfig(
                f"{models} has a model {self.own!r}, the name of {bundle} too; rename one of them"
            )

    def names(self) -> list[str]:
        """Models of the folder."""
        if self._folder is None:
            return []
        return sorted(
            each.name for each in self._folder.iterdir() if each.is_dir() and _is_name(each.name)
        )

    def versions(self, name: str) -> list[str]:
        """Bundles of a model of the folder, oldest first: v2 comes before v10."""
        if self._folder is None or not _is_name(name):
            return []
        found = (self._folder / name).glob(f"*/{INFO_FILE}")
        return sorted((each.parent.name for each in found if _is_name(each.parent.name)), key=_age)

    def find(self, name: str, version: str) -> tuple[Path, str]:
        """The folder of a bundle, and its version; empty for the version that its content has.

        Raises:
            UnknownModel: there is none.
            InvalidRequest: the name or version could not be that of a folder.
        """
        if name == self.own and self._bundle is not None:
            return self._bundle, version
        for part in (name, version or name):
            if not _is_name(part):
                raise InvalidRequest(
                    f"{part!r} cannot name a model or version; use letters, digits, . _ and -"
                )
        versions = self.versions(name)
        if not versions or (version and version not in versions):
            raise UnknownModel(
                f"no bundle of model {name!r}"
                + (f" version {version!r}" if version else "")
                + f" in {self._folder or 'a folder: the server has no --models'}"
            )
        version = version or versions[-1]
        assert self._folder is not None
        return self._folder / name / version, version


def _is_name(text: str) -> bool:
    return _GOOD_NAME.fullmatch(text) is not None


def _age(version: str) -> list[tuple[int, int, str]]:
    """Numbers in a version compare as numbers."""
    return [
        (1, int(part), "") if part.isdigit() else (0, 0, part)
        for part in re.split(r"(\d+)", version)
        if part
    ]
