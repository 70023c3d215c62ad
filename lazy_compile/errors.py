"""Every error that lazy_compile raises on purpose.

Each message says what was seen, what was expected and what to do next.
"""

from __future__ import annotations

import importlib
from types import ModuleType


class LazyCompileError(Exception):
    """Base class; the command line prints its message on one line and exits with :attr:`exit_code`."""

    exit_code = 1


class ConfigError(LazyCompileError):
    """An option, a policy or an argument is not of the expected form."""

    exit_code = 2


class CaptureError(LazyCompileError):
    """No strategy could capture the model as a graph."""

    exit_code = 3


class NoBranchError(LazyCompileError):
    """The graph was captured, but holds nothing that could be gated."""

    exit_code = 4


class ArtifactError(LazyCompileError):
    """A saved file is missing, damaged, or belongs to another model."""

    exit_code = 5


class BackendError(LazyCompileError):
    """Lowering to, or running on, another runtime failed."""

    exit_code = 6


class VerificationError(LazyCompileError):
    """A transformed model does not do what the original does."""

    exit_code = 7


class MissingDependencyError(LazyCompileError):
    """An optional package is not installed."""

    exit_code = 8


class PassError(LazyCompileError):
    """A pass broke its contract: this is a defect of the pass, not of the model."""

    exit_code = 9


def one_line(text: str, limit: int = 120) -> str:
    """A text of whatever origin as one short line of a message."""
    line = " ".join(text[: 4 * limit].split())
    line = "".join(letter if letter.isprintable() else "?" for letter in line)
    return line if len(line) <= limit else f"{line[: limit - 3]}..."


def shown(value: object, limit: int = 120) -> str:
    """A value that a file holds, or what another library's error says, as one short line of a message."""
    if isinstance(value, BaseException):
        return one_line(str(value) or type(value).__name__, limit)
    if isinstance(value, list | dict | tuple) and len(value) > limit:
        return f"a {type(value).__name__} of {len(value)}"
    try:
        return one_line(repr(value[: 4 * limit] if isinstance(value, str | bytes) else value), limit)
    except (ValueError, RecursionError):  # a number of thousands of digits, lists in lists
        return f"a {type(value).__name__}"


def import_optional(module: str, extra: str) -> ModuleType:
    """Import ``module``, or say in one line which extra of lazy-compile installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingDependencyError(
            f"this needs the package {module!r}, which cannot be imported ({error}); install it with: "
            f"pip install 'lazy-compile[{extra}]'"
        ) from error
