"""`python -m intermodal` and the `intermodal` command."""

from __future__ import annotations

import sys


def main() -> None:
    from .cli.app import run

    run(sys.argv[1:])


if __name__ == "__main__":
    main()
