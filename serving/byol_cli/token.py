"""`byol token`: an access token for a server."""

from pathlib import Path
from typing import cast

import click

from byol_cli.output import emit, json_option


@click.command()
@click.argument("name")
@click.option(
    "--file",
    type=click.Path(path_type=Path, dir_okay=False),
    required=True,
    help="File of tokens, made if need be.",
)
@click.option(
    "--scope",
    "scopes",
    type=click.Choice(["read", "write", "admin"]),
    multiple=True,
    default=["read"],
    show_default=True,
    help="What it allows; may be given several times, none includes another.",
)
@click.option("--rate", type=click.FloatRange(0, 1e9, min_open=True), help="Requests a second.")
@click.option("--burst", type=click.FloatRange(0, 1e9, min_open=True), help="Requests at once.")
@json_option
def command(
    name: str,
    file: Path,
    scopes: tuple[str, ...],
    rate: float | None,
    burst: float | None,
    as_json: bool,
) -> None:
    """Make a token for NAME and add it to a file. It is shown once: the file has only its hash.

    \b
    Example:  byol token alice --file tokens.toml --scope read --scope write --rate 100
    Serve:    byol serve --bundle bundles/photos --tokens tokens.toml
    Use it:   BYOL_TOKEN=byol_... byol search photo.jpg --collection photos
    """
    from byol_serving.tokens import Scope, Token, add_token, new_token

    secret, digest = new_token()
    allowed = frozenset(cast(Scope, scope) for scope in scopes)
    add_token(file, Token(name=name, sha256=digest, scopes=allowed, rate=rate, burst=burst))
    emit({"name": name, "scopes": sorted(allowed), "file": file, "token": secret}, as_json)
