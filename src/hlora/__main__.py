"""The `hlora` command, and `python -m hlora`, as torchrun and accelerate launch start it."""

import sys
from importlib.util import find_spec

from hlora.system.errors import how_to_install

RUN = ("trl", "datasets", "gguf", "lm_eval", "typer", "jinja2", "markupsafe", "matplotlib", "pyarrow", "scipy")
"""Modules that the command line needs and the library does not."""


def main() -> None:
    missing = [name for name in RUN if find_spec(name) is None]
    if missing:
        print(f"hlora: the command line needs {', '.join(missing)}. {how_to_install('run')}", file=sys.stderr)
        sys.exit(2)
    from hlora.cli import main as command_line

    command_line()


if __name__ == "__main__":
    main()
