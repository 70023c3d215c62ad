"""``python -m lazy_compile``, for launchers that start a module."""

from lazy_compile.cli.app import main

if __name__ == "__main__":
    main()
