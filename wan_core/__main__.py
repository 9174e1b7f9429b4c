"""The shell: `python -m wan_core generate "..." --out clip.mp4`, `... inspect FILE`, `... quantize IN OUT`,
`... calibrate "..." --out FILE.json` and `... attention`."""

import argparse
import logging
import sys
from collections.abc import Sequence

import torch

from .shell.attention import add_attention
from .shell.files import add_inspect, add_quantize
from .shell.runs import add_calibrate, add_generate


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status. What the user can mend is one line on stderr and status 2."""
    parser = argparse.ArgumentParser(prog="python -m wan_core", description="Wan video models from the shell.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in (add_generate, add_inspect, add_quantize, add_calibrate, add_attention):
        add(commands)
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        print(options.run(options))
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
