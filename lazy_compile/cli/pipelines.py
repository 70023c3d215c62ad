"""Pipelines that the command line is given: a folder, its prompts, the arguments of its call."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lazy_compile.cli.models import announce
from lazy_compile.errors import ArtifactError, ConfigError, import_optional, shown


def load_pipeline(folder: str, device: str = "cpu") -> Any:
    """The pipeline in a folder that ``save_pretrained`` wrote; nothing is downloaded.

    Raises:
        ConfigError: the folder holds no pipeline, or the device cannot be used.
        ArtifactError: the pipeline cannot be read.
    """
    if not (Path(folder) / "model_index.json").exists():
        raise ConfigError(
            f"{shown(folder, 80)} holds no pipeline (no model_index.json); name the folder that pipe.save_pretrained() "
            "wrote, or leave out --prompts"
        )
    announce(f"loading the pipeline {folder}")
    diffusers = import_optional("diffusers", "diffusers")
    try:
        pipe = diffusers.DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # diffusers raises whatever a strange configuration leads to
        raise ArtifactError(f"cannot load the pipeline {folder}: {type(error).__name__}: {shown(error)}") from error
    try:
        return pipe if device == "cpu" else pipe.to(device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device {device!r} cannot be used ({shown(error)}); try --device cpu") from None


def read_prompts(file: Path) -> list[str]:
    """
    Raises:
        ArtifactError: there is no such file, or no prompt in it.
    """
    try:
        prompts = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ArtifactError(f"cannot read the prompts in {file}: {shown(error)}") from error
    if not prompts:
        raise ArtifactError(f"{file} holds no prompt; write one a line")
    return prompts


def call_arguments(given: Sequence[str]) -> dict[str, Any]:
    """``height=512`` as an argument; what is no number, list, True, False or None is a text.

    Raises:
        ConfigError: it has no name.
    """
    values: dict[str, Any] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise ConfigError(f"--call {shown(text)} is not NAME=VALUE, such as height=512")
        try:
            values[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            values[name] = value
    return values
