"""What a branch is, read from the operators in its body."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from torch import fx

from lazy_compile.analysis.attention_products import attending_products
from lazy_compile.analysis.dataflow import Dataflow
from lazy_compile.ir.branch import BranchKind
from lazy_compile.ir.opaque import opaque_call
from lazy_compile.ir.operators import (
    ACTIVATIONS,
    CONVOLUTIONS,
    FUSED_ATTENTION,
    SOFTMAX,
    is_dense_convolution,
    is_foreign_kernel,
    is_heavy,
    is_spatial_convolution,
    operator_name,
    value_of,
)

_JOINS_APART = frozenset({"cat", "add", "stack"})
_SCANS = frozenset({"cumsum", "cumprod", "logcumsumexp"})


def classify(
    flow: Dataflow, body: Sequence[fx.Node], entries: Sequence[fx.Node], skips: int, activations: int
) -> BranchKind:
    """Name a body.

    An attention core is a softmax attention, written out or not, another product of two tensors that both carry
    activations if it mixes tokens, or a kernel from outside of PyTorch that reads three such. A product that is taken
    for each token apart is none: of streams (hyper-connections, arXiv 2409.19606), of layers (arXiv 2502.09245), or
    with weights that were made from a condition (HyperNetworks, arXiv 1609.09106). Without a core the body is an MLP,
    or a convolution block if most of its operators mix channels over several positions, all of them mix positions (a
    position encoding by a depthwise convolution), or a running sum does (a state space model).

    Args:
        flow: reachability of the graph.
        body: its nodes, in graph order.
        entries: its inputs that depend on a skip connection.
        skips: how many different skip connections it is added to.
        activations: bit set of the nodes that depend on the model's inputs, and not on parameters alone.
    """
    from_entries = 0
    for entry in entries:
        from_entries |= flow.informed(entry)
    attending = attending_products(flow, body, entries, from_entries, activations)
    cores = [node for node in body if node in attending or _is_attention_core(flow, node, activations)]
    if not cores:
        on_the_stream = [node for node in body if is_heavy(node) and from_entries >> flow.position[node] & 1]
        only_convolutions = all(operator_name(node) in CONVOLUTIONS for node in on_the_stream)
        mostly_dense = 2 * sum(map(is_dense_convolution, on_the_stream)) >= max(1, len(on_the_stream))
        no_mlp = mostly_dense or all(map(is_spatial_convolution, on_the_stream))
        scans = any(operator_name(node) in _SCANS and value_of(node).is_floating_point() for node in body)
        return BranchKind.CONV if scans or (no_mlp and only_convolutions) else BranchKind.MLP
    if _has_parallel_mlp(flow, body, cores):
        return BranchKind.PARALLEL
    if all(_reads_a_side_input(flow, core, from_entries) and not attending.get(core) for core in cores):
        return BranchKind.CROSS_ATTENTION
    streams = [operand for core in cores for operand in _attended(core) if not _are_weights(flow, operand, cores)]
    projects_another_stream = any(
        is_heavy(node)
        and (activations & ~from_entries) >> flow.position[node] & 1
        and any(flow.depends(operand, node) for operand in streams)
        for node in body
    )
    return BranchKind.JOINT_ATTENTION if skips > 1 or projects_another_stream else BranchKind.SELF_ATTENTION


def _is_attention_core(flow: Dataflow, node: fx.Node, activations: int) -> bool:
    if operator_name(node) in FUSED_ATTENTION:
        return True
    if (opaque := opaque_call(node)) is not None:
        return opaque.attends
    return is_foreign_kernel(node) and sum(activations >> flow.position[item] & 1 for item in node.all_input_nodes) > 2


def _reads_a_side_input(flow: Dataflow, core: fx.Node, from_entries: int) -> bool:
    operands = _attended(core)[1:] if operator_name(core) in FUSED_ATTENTION else _attended(core)
    return any(not from_entries >> flow.position[operand] & 1 for operand in operands)


def _attended(core: fx.Node) -> list[fx.Node]:
    """Query, key and value, without a mask or bias; both factors of a product; what an opaque module is given."""
    if opaque_call(core) is not None:
        return list(cast(Sequence[fx.Node], core.args[1]))
    return [argument for argument in core.args[:3] if isinstance(argument, fx.Node)] or core.all_input_nodes


def _are_weights(flow: Dataflow, operand: fx.Node, cores: Sequence[fx.Node]) -> bool:
    """Whether an operand is the softmax of another core's scores, to which a mask or bias may have been added."""
    others = flow.bits(cores)
    for core in cores:
        between = flow.region(core, operand)
        if between & others & ~(1 << flow.position[core]):
            continue
        if any(operator_name(node) in SOFTMAX for node in flow.members(between)):
            return True
    return False


def _has_parallel_mlp(flow: Dataflow, body: Sequence[fx.Node], cores: Sequence[fx.Node]) -> bool:
    """An activation function beside the attention that meets it in a concatenation or sum, or not at all.

    One that meets it in a product is a gate of the attention's output.
    """
    after_core = flow.bits(())
    before_core = 0
    for core in cores:
        after_core |= flow.descendants(core)
        before_core |= flow.ancestors(core)
    inside = flow.bits(body)
    for node in body:
        position = flow.position[node]
        if operator_name(node) not in ACTIVATIONS or (after_core | before_core) >> position & 1:
            continue
        meeting = next(flow.members(flow.descendants(node) & after_core & inside), None)
        if meeting is None or operator_name(meeting) in _JOINS_APART:
            return True
    return False
