"""`byol models`: which encoders a running server holds."""

from typing import TYPE_CHECKING, Any

import click

from byol_cli.output import emit, json_option, table

if TYPE_CHECKING:
    from byol_serving.pb.byol.v1.admin_pb2 import ModelStatus

server_option = click.option(
    "--server", default="127.0.0.1:50051", show_default=True, help="A running server's address."
)


@click.group()
def command() -> None:
    """List, load, switch and unload the encoders of a running server.

    \b
    Example:  byol models list
              byol models switch photos v2 --unload-previous
    """


@command.command("list")
@server_option
@json_option
def list_(server: str, as_json: bool) -> None:
    """List every loaded version of every model.

    \b
    Example:  byol models list
    """
    from byol_serving.client_admin import AdminClient

    with AdminClient(server) as client:
        found = client.models()
    if as_json:
        emit({"models": [_facts(each) for each in found]}, as_json)
        return
    table(
        ["name", "version", "in use", "default", "encoder", "precision", "provider"],
        [
            (m.name, m.version, m.in_use, m.is_default, m.encoder_id[:12], m.precision, m.provider)
            for m in found
        ],
    )


@command.command()
@click.argument("name")
@click.argument("version", default="")
@server_option
@json_option
def load(name: str, version: str, server: str, as_json: bool) -> None:
    """Load VERSION of model NAME beside the others; by default the newest on the server's disk.

    \b
    Example:  byol models load photos v2
    """
    from byol_serving.client_admin import AdminClient

    with AdminClient(server) as client:
        emit(_facts(client.load_model(name, version)), as_json)


@command.command()
@click.argument("name")
@click.argument("version", default="")
@click.option("--unload-previous", is_flag=True, help="Take the former version out afterwards.")
@server_option
@json_option
def switch(name: str, version: str, unload_previous: bool, server: str, as_json: bool) -> None:
    """Make VERSION of model NAME the one in use, with no failed request.

    \b
    Example:  byol models switch photos v2 --unload-previous
    """
    from byol_serving.client_admin import AdminClient

    with AdminClient(server) as client:
        emit(_facts(client.switch_model(name, version, unload_previous=unload_previous)), as_json)


@command.command()
@click.argument("name")
@click.argument("version")
@server_option
@json_option
def unload(name: str, version: str, server: str, as_json: bool) -> None:
    """Take VERSION of model NAME out, once its last request is answered.

    \b
    Example:  byol models unload photos v1
    """
    from byol_serving.client_admin import AdminClient

    with AdminClient(server) as client:
        client.unload_model(name, version)
    emit({"unloaded": name, "version": version}, as_json)


def _facts(status: "ModelStatus") -> dict[str, Any]:
    return {
        "name": status.name,
        "version": status.version,
        "encoder_id": status.encoder_id,
        "precision": status.precision,
        "provider": status.provider,
        "in_use": status.in_use,
        "is_default": status.is_default,
        "requests": status.requests,
    }
