"""A file that another tool changed on purpose, such as a quantiser: it is looked at, and gets a digest again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lazy_compile.backends.onnx.metadata import OnnxMetadata
from lazy_compile.backends.onnx.seal import DIGEST_KEY, properties_of, seal
from lazy_compile.backends.onnx.weight_places import WEIGHTS_KEY
from lazy_compile.errors import ArtifactError, import_optional, shown
from lazy_compile.storage import regular_file


def accept_changes(path: str | Path) -> Counter[str]:
    """Make a changed file one that runners read again.

    Its graph may hold other operators than :func:`~lazy_compile.backends.onnx.export.export_onnx` wrote, as long as
    each gate still is an ``If``. The file no longer says which weight of the model lies where, since that may be wrong.

    Returns:
        how many operators of each type lie in the arms, so that a caller sees whether the change reached them.

    Raises:
        ArtifactError: it is no lazy model, or has lost an ``If``.
    """
    onnx, path = import_optional("onnx", "onnx"), Path(path)
    try:
        proto = onnx.load(str(regular_file(path)), load_external_data=False)
    except Exception as error:  # protobuf's, and the operating system's
        raise ArtifactError(f"cannot read {path} as ONNX ({shown(error)}); export the model again") from error
    metadata = OnnxMetadata.parse(properties_of(proto))
    arms = [arm for node in proto.graph.node if node.op_type == "If" for arm in _graphs(node)]
    if len(arms) != 2 * metadata.conditionals:
        raise ArtifactError(
            f"{path} has {len(arms) // 2} conditionals, and {metadata.conditionals} were exported: what changed it "
            "took gates apart; leave its optimizations of the graph out"
        )
    kept = [entry for entry in proto.metadata_props if entry.key not in (DIGEST_KEY, WEIGHTS_KEY)]
    entries = [onnx.StringStringEntryProto(key=entry.key, value=entry.value) for entry in kept]
    del proto.metadata_props[:]
    proto.metadata_props.extend(entries)
    path.write_bytes(proto.SerializeToString())
    seal(path)
    return Counter(node.op_type for arm in arms for node in _nodes(arm))


def _graphs(node: Any) -> Iterator[Any]:
    return (attribute.g for attribute in node.attribute if attribute.HasField("g"))


def _nodes(graph: Any) -> Iterator[Any]:
    for node in graph.node:
        yield node
        for inner in _graphs(node):
            yield from _nodes(inner)
