"""``python -m lazy_compile`` and the console script. Ctrl-C ends either with one line, while it imports too."""

import os
import sys


def main() -> None:
    """The console script."""
    try:
        from lazy_compile.cli.app import app

        app()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    if os.getcwd() in sys.path:
        sys.path.remove(os.getcwd())  # a folder named like an installed module would hide it
    main()
