"""A client that streams for ever, until somebody kills it.

python -m soak.victim HOST:PORT IMAGE
"""

import itertools
import sys
from pathlib import Path

from byol_serving.client import Client


def main() -> None:
    address, file = sys.argv[1], Path(sys.argv[2]).read_bytes()
    with Client(address, batch_size=8) as client:
        for _ in client.embed_stream(itertools.repeat(file)):
            print("answered", flush=True)


if __name__ == "__main__":
    main()
