"""`python -m mllama_jax.run script.py ...` runs a script that calls `processes.join()` as commands with `--join` run.

What JAX's C++ layer logs goes to a file, and where that layer ends the process, one line says so.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from mllama_jax.errors import InputError
from mllama_jax.processes import attend, attended, leaving


def main() -> None:
    """Run the script that the arguments name in a process that another attends."""
    if len(sys.argv) < 2:
        sys.exit("python -m mllama_jax.run: expected a script and its arguments")
    if not attended():
        sys.exit(attend(["-m", "mllama_jax.run", *sys.argv[1:]]))
    del sys.argv[0]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    try:
        with leaving():
            runpy.run_path(sys.argv[0], run_name="__main__")
    except InputError as error:
        print(f"{sys.argv[0]}: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
