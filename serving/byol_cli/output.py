"""What every command shares: the --json option, tables, and how an error is said."""

import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn, TypeVar

import click

Command = TypeVar("Command", bound=Callable[..., Any])


def json_option(command: Command) -> Command:
    """Adds `--json` (parameter `as_json`): one JSON object on the last line of stdout."""
    decorate = click.option(
        "--json", "as_json", is_flag=True, help="End with one JSON object on the last line."
    )
    return decorate(command)


def emit(result: Mapping[str, Any], as_json: bool) -> None:
    """Prints the result as a JSON line, or as aligned `name  value` lines."""
    if as_json:
        print(json.dumps(result, default=str), flush=True)
        return
    width = max(map(len, result), default=0)
    for name, value in result.items():
        print(f"{name.replace('_', ' '):{width}}  {shown(value)}")


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Prints rows under a header, columns aligned; numbers to the right."""
    cells = [[shown(value) for value in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for number, row in enumerate(cells):
        print(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        )
        if number == 0:
            print("  ".join("-" * width for width in widths))


def shown(value: Any) -> str:
    """A value as a person wants it: fractions to 4 digits, lists with commas."""
    match value:
        case bool():
            return "yes" if value else "no"
        case float():
            return f"{value:.4g}"
        case list() | tuple():
            return ", ".join(map(shown, value)) or "-"
        case None:
            return "-"
        case _:
            return str(value)


def fail(kind: str, message: str) -> NoReturn:
    """One line on stderr, the same as JSON on stdout if asked for; exit code 1."""
    print(f"byol: error: {message}", file=sys.stderr)
    if "--json" in sys.argv:
        print(json.dumps({"error": kind, "message": message}), flush=True)
    sys.exit(1)
