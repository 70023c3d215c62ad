"""TensorRT and TensorRT-RTX behind one door: which package, whether it is there, and what it says while it works."""

from __future__ import annotations

import re
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

from lazy_compile.errors import BackendError, ConfigError, import_optional

FlavorName = Literal["tensorrt", "rtx"]


@dataclass(frozen=True)
class Flavor:
    """One of NVIDIA's two builders. Both read ONNX with one parser and share nearly all of their Python interface.

    Attributes:
        name: as it is chosen here.
        title: as NVIDIA writes it.
        module: its Python package.
        extra: the extra of lazy-compile that installs it.
        oldest: the first version that has what is used here.
        tool: its own command-line program.
        builds_without_gpu: whether an engine can be built on a machine without a GPU.
    """

    name: FlavorName
    title: str
    module: str
    extra: str
    oldest: tuple[int, int]
    tool: str
    builds_without_gpu: bool


FLAVORS: dict[str, Flavor] = {
    "tensorrt": Flavor("tensorrt", "TensorRT", "tensorrt", "tensorrt", (10, 0), "trtexec", False),
    "rtx": Flavor("rtx", "TensorRT-RTX", "tensorrt_rtx", "tensorrt-rtx", (1, 0), "tensorrt_rtx", True),
}


def flavor_of(name: str) -> Flavor:
    if name not in FLAVORS:
        raise ConfigError(f"flavor is {name!r}; expected one of {', '.join(map(repr, FLAVORS))}")
    return FLAVORS[name]


def load(flavor: Flavor) -> ModuleType:
    """The package of a flavor.

    Raises:
        MissingDependencyError: it is not installed.
        BackendError: it cannot be loaded, or is too old.
    """
    try:
        trt = import_optional(flavor.module, flavor.extra)
    except OSError as error:  # its shared libraries
        raise BackendError(
            f"{flavor.title} is installed, but its libraries cannot be loaded ({first_sentence(str(error))}); "
            "install it again, for the CUDA version of this machine"
        ) from error
    if version_of(trt) < flavor.oldest:
        raise BackendError(
            f"{flavor.title} is {trt.__version__}; expected {flavor.oldest[0]}.{flavor.oldest[1]} or newer: "
            f"pip install --upgrade 'lazy-compile[{flavor.extra}]'"
        )
    return trt


def version_of(trt: ModuleType) -> tuple[int, int]:
    major, minor, *_ = map(int, [*re.findall(r"\d+", str(trt.__version__)), 0, 0])
    return major, minor


# What it says -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Message:
    """One message of a builder, parser or runtime; ``severity`` is ``"ERROR"``, ``"WARNING"``, ``"VERBOSE"`` ..."""

    severity: str
    text: str


ERRORS = ("ERROR", "INTERNAL_ERROR")

_LOGGERS: dict[str, Any] = {}
_LISTENING = threading.RLock()


def logger_of(trt: ModuleType) -> Any:
    """The logger of this process: TensorRT keeps the first that it is given, whatever is passed later.

    Its ``errors`` are the last ones that any engine caused.
    """
    if trt.__name__ not in _LOGGERS:

        class Logger(trt.ILogger):  # type: ignore[misc, name-defined]
            def __init__(self) -> None:
                trt.ILogger.__init__(self)
                self.messages: list[Message] | None = None
                self.errors: deque[Message] = deque(maxlen=8)

            def log(self, severity: Any, text: str) -> None:
                if severity.name in ERRORS:
                    self.errors.append(Message(severity.name, text))
                if self.messages is not None:
                    self.messages.append(Message(severity.name, text))

        _LOGGERS[trt.__name__] = Logger()
    return _LOGGERS[trt.__name__]


@contextmanager
def record(trt: ModuleType) -> Iterator[list[Message]]:
    """Everything that is said within the context. One thread at a time: messages carry no mark of who caused them."""
    messages: list[Message] = []
    with _LISTENING:
        logger = logger_of(trt)
        before, logger.messages = logger.messages, messages
        try:
            yield messages
        finally:
            logger.messages = before


def first_error(messages: Iterable[Message]) -> str:
    """The first error among them, in one line."""
    errors = [message.text for message in messages if message.severity in ERRORS]
    return first_sentence(errors[0]) if errors else "it gave no reason"


def first_sentence(text: str) -> str:
    """One line of at most 300 characters, without the place in NVIDIA's source code."""
    text = re.sub(r"\s*\(?\b(In|at) \S+ at \S+:\d+\.?|\s*\[\S+\.(cpp|h)[^\]]*\]", "", " ".join(text.split()))
    return text[:300].strip() or "it gave no reason"
