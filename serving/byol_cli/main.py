"""`byol`: the command line. Each command's module is imported only when it is named.

Exit codes: 0 done; 1 an error, said in one line on stderr; 2 wrong usage; 3 done, but some inputs
were rejected; 130 interrupted.
"""

import importlib
import sys

import click

from byol_cli.output import fail
from byol_serving.errors import ByolError

COMMANDS = {
    "demo": "The whole path on real images, in minutes.",
    "train": "Pretrain an encoder on unlabelled images.",
    "evaluate": "Measure a trained run or a bundle.",
    "report": "Put a trained run on one HTML page.",
    "export": "Turn a trained run into an encoder bundle.",
    "serve": "Serve a bundle and its collections over gRPC.",
    "embed": "Embed a folder or archive into files.",
    "index": "Embed a folder or archive into a collection.",
    "search": "Find an image's nearest neighbours.",
    "collections": "Make, inspect, back up and analyse collections.",
    "models": "List, load, switch and unload a server's encoders.",
    "token": "Make an access token for a server.",
    "doctor": "Say what this machine offers and lacks.",
}


class LazyGroup(click.Group):
    """Lists commands from `COMMANDS`, so that `byol --help` imports none of them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names, in the order a new user meets them."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Imports the command's module: byol_cli.NAME holds `command`."""
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"byol_cli.{cmd_name}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """One line a command, from `COMMANDS`."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="byol-server", prog_name="byol")
def cli() -> None:
    """Turn a pile of unlabelled images into an embedding and similarity-search service.

    \b
    Start here:  byol demo
    Then:        byol train PHOTOS --out runs/photos
                 byol export runs/photos --out bundles/photos
                 byol serve --bundle bundles/photos --store store
    """


def main() -> None:
    """Runs the command line and exits."""
    try:
        # Every option can also come from the environment, as containers prefer: BYOL_SERVE_BUNDLE.
        cli.main(standalone_mode=False, auto_envvar_prefix="BYOL")
    except click.exceptions.Abort:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except ByolError as error:
        fail(type(error).__name__, str(error))
    except ModuleNotFoundError as error:
        fail("MissingPackage", _missing(error))
    except OSError as error:
        fail("OSError", f"{error.strerror or error}: {error.filename or ''}".rstrip(": "))


def _missing(error: ModuleNotFoundError) -> str:
    match (error.name or "").split(".")[0]:
        case "torch" | "torchvision" | "onnx" | "onnxscript" | "safetensors" | "byol_training":
            extra = "training"
        case "onnxruntime" | "faiss":
            extra = "cpu"
        case "pyarrow":
            extra = "parquet"
        case "ray":
            extra = "ray"
        case "pymilvus":
            extra = "milvus"
        case "skimage" | "sklearn":
            extra = "demo"
        case _:
            raise error
    return f"{error.name} is not installed; run: pip install 'byol-server[{extra}]'"


if __name__ == "__main__":
    main()
