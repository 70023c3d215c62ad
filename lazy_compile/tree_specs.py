"""The form of a return value, as ``torch.utils._pytree`` writes it, read without importing what a file names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.utils import _pytree as pytree

from lazy_compile.errors import ArtifactError, shown
from lazy_compile.storage import parse_json

MAX_DEPTH = 32

_IMPORTS = frozenset({"collections.defaultdict"})
"""Types whose context names a module, which pytree then imports."""


def load_tree_spec(text: str, where: str) -> pytree.TreeSpec | None:
    """What ``treespec_dumps`` wrote; None for a return type that nothing imported so far has registered.

    Raises:
        ArtifactError: it is not of that form, or names something to import.
    """
    known = check_tree_spec(text, where)
    try:
        return pytree.treespec_loads(text) if known else None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, NotImplementedError, AssertionError) as e:
        raise ArtifactError(f"the form of the result in {where} is damaged ({shown(e)}); export again") from e


def check_tree_spec(text: str, where: str) -> bool:
    """Whether all its types are known here.

    Raises:
        ArtifactError: it is not of the expected form, or names something to import.
    """
    if not text:
        return False
    values = parse_json(text, where)
    if not isinstance(values, list) or len(values) != 2 or values[0] != 1:
        raise ArtifactError(f"the form of the result in {where} is {shown(values)}; export again")
    return _check_node(values[1], where, 0)


def _check_node(node: Any, where: str, depth: int) -> bool:
    good = isinstance(node, dict) and node.keys() == {"type", "context", "children_spec"} and depth < MAX_DEPTH
    children = node["children_spec"] if good else None
    if not isinstance(children, list) or not isinstance(node["type"], str | None):
        raise ArtifactError(f"the form of the result in {where} holds {shown(node)}; export again")
    if node["type"] in _IMPORTS or not _is_plain(node["context"], where, 0):
        raise ArtifactError(
            f"the form of the result in {where} names something to import ({shown(node['type'])}), which is refused; "
            "return tuples, lists, dictionaries or outputs of diffusers"
        )
    known = node["type"] is None or node["type"] in pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE
    below = [_check_node(child, where, depth + 1) for child in children]  # all are looked at
    return known and all(below)


def _is_plain(context: Any, where: str, depth: int) -> bool:
    """Names and numbers, without an object, which is how an enumeration and its module are written."""
    if isinstance(context, str) and depth == 0:
        return _is_plain(parse_json(context, where), where, 1)
    if isinstance(context, list):
        return depth < MAX_DEPTH and all(_is_plain(item, where, depth + 1) for item in context)
    return not isinstance(context, Mapping)
