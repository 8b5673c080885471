"""`byol token` and `byol models` against a real server."""

import json
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from byol_cli.models import command as models
from byol_cli.token import command as token
from byol_serving.config import ServeConfig
from byol_serving.errors import Forbidden, InvalidConfig
from serving.rpc.conftest import ServerThread
from serving.support import make_bundle


def byol(command: click.Command, *words: str, **environment: str) -> dict[str, Any]:
    ran = CliRunner().invoke(command, [*words, "--json"], env=environment)
    if ran.exception is not None:
        raise ran.exception
    found: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return found


def test_a_token_made_by_the_command_opens_what_its_scopes_say(
    tmp_path: Path,
) -> None:
    file = tmp_path / "tokens.toml"
    make_bundle(tmp_path / "models" / "cats" / "v1", seed=1)
    make_bundle(tmp_path / "models" / "cats" / "v2", seed=2)
    chief = byol(token, "chief", "--file", str(file), "--scope", "admin", "--rate", "100")
    reader = byol(token, "reader", "--file", str(file))
    assert (chief["scopes"], reader["scopes"]) == (["admin"], ["read"])
    with pytest.raises(InvalidConfig, match="already"):
        byol(token, "reader", "--file", str(file))
    server = ServerThread(ServeConfig(models=tmp_path / "models", tokens=file, port=0))
    try:
        where = ("--server", server.address)
        listed = byol(models, "list", *where, BYOL_TOKEN=chief["token"])["models"]
        assert [(m["name"], m["version"], m["in_use"]) for m in listed] == [
            ("cats", "v1", False),
            ("cats", "v2", True),
        ]
        switched = byol(
            models, "switch", "cats", "v1", "--unload-previous", *where, BYOL_TOKEN=chief["token"]
        )
        assert (switched["version"], switched["in_use"]) == ("v1", True)
        loaded = byol(models, "load", "cats", *where, BYOL_TOKEN=chief["token"])
        assert (loaded["version"], loaded["in_use"]) == ("v2", False)
        byol(models, "unload", "cats", "v2", *where, BYOL_TOKEN=chief["token"])
        with pytest.raises(Forbidden, match="needs admin"):
            byol(models, "list", *where, BYOL_TOKEN=reader["token"])
    finally:
        server.stop()
