"""The rule that finds residual branches in a graph, by dataflow alone."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from itertools import takewhile

import torch
from torch import Tensor, fx

from lazy_compile.analysis.batch_rows import unfolding_views
from lazy_compile.analysis.dataflow import Dataflow
from lazy_compile.analysis.skip_connections import ADDS, skip_and_region
from lazy_compile.ir.operators import (
    is_dense_convolution,
    is_heavy,
    is_quantiser,
    is_spatial_convolution,
    macs,
    operator_name,
    origins,
    size_text,
    value_of,
)


@dataclass
class Candidate:
    """A residual add, or several that share a body.

    Attributes:
        adds: the residual adds.
        skips: where each skip connection comes from, seen through casts and views.
        heavy: bit set of the heavy operators that belong to this candidate and to no inner one.
        body: bit set of the nodes to compute or reuse: everything between two of the heavy operators.
        refusal: why it is not a branch; empty if it is one.
        fed_by: bit set of heavy operators that feed nothing but its body.
        path: where they lie in the model, for people to read.
    """

    adds: list[fx.Node]
    skips: list[fx.Node]
    heavy: int
    body: int = 0
    refusal: str = ""
    fed_by: int = 0
    path: str = ""


def find_candidates(
    flow: Dataflow, *, batch_symbol: str | None, batch_size: str, conv_branches: bool, activations: int
) -> list[Candidate]:
    """All candidates in graph order, refused ones included.

    1. A *residual add* is an addition of two tensors, floating and of rank 3 or more (or packed tokens: of rank 2, and
       not one line for each row of the batch), one of which, the *skip*, has the shape of the sum and is an ancestor of
       the other, directly or seen through casts, views, earlier residual adds, and products with a constant or with a
       tensor that is stretched over it or a gate that is taken to 1 (interpolation: ``(1 - a) * x + a * f(x)``).
       Or the skip was cut from what leads to the other through heavy operators alone (reversible blocks).
       A GRU cell adds its input to its state by gates (GTrXL, arXiv 1910.06764): the state is the skip.
    2. Its *region* is every node on a path from the skip to the other operand. Without a heavy operator in the region
       the add is arithmetic (a tanh formula, say) and not looked at further; nor is it where the skip lies between the
       heavy operators of an earlier branch (values of the first attention that later ones mix in).
    3. Inner adds come first in graph order. An outer add owns the heavy operators that no inner branch has claimed.
    4. Adds whose regions share a heavy operator, neither inside the other's region, are one candidate, unless one
       takes all that the other owns and goes on from there (an attention that reads what another attended), or other
       residual adds would lie between what they own (an add around a network, one of whose streams ends earlier).
    5. The *body* is the convex hull of the owned heavy operators. If it holds another residual add, the candidate is a
       container and refused; unless it owns more heavy operators, or more work, than the branches that it holds, which
       are then part of it (a temporal convolution with a skip of its own inside an MLP, a scan inside a Mamba block).
       What lies around several convolution blocks, refused ones included, is a network and always a container
       (``c_skip * x + c_out * F(x)``).
    6. The body also takes heavy operators that feed nothing but it and do not depend on the skip (keys and values of a
       text), with what lies between, back to the nearest residual add or other body.
    7. Where an operator of the body makes several tensors, all of them belong to it. If it has more outputs than adds,
       it goes on to where they meet, as long as nothing but constants joins them on the way (the product with a gate
       made from the same tokens, the weighted sum of experts), and to the views behind it that unfold the batch axis of
       an output.
    8. Two bodies each of which reads what the other makes are one, if nothing else lies between them.
    9. A quantiser of an operand counts as a heavy operator.

    ``activations`` is the set of nodes that depend on the model's inputs, and not on parameters alone.
    """
    heavy_bits = flow.bits(node for node in flow.nodes if is_heavy(node) or is_quantiser(node))
    candidates: list[Candidate] = []
    owner: dict[fx.Node, Candidate] = {}
    for add in flow.nodes:
        if operator_name(add) not in ADDS or not _is_token_stream(add, batch_size):
            continue
        skip, region = skip_and_region(flow, add, lambda node: _skip_of(node, owner), heavy_bits)
        heavy = region & heavy_bits
        for node in owner:
            if region >> flow.position[node] & 1:
                heavy &= ~(owner[node].heavy | owner[node].fed_by)
        if not heavy or _is_inside_another(flow, skip, candidates):
            continue
        heavy = _beyond_earlier(flow, heavy, candidates)
        sibling = next((item for item in candidates if item.heavy & heavy and not item.refusal), None)
        if sibling is not None and _held(flow, flow.hull(sibling.heavy | heavy), {*sibling.adds, add}, owner):
            heavy, sibling = heavy & ~sibling.heavy, None
            if not heavy:
                continue
        if sibling is None:
            candidate = Candidate([add], [skip], heavy)
            candidate.refusal = _refuse_convolutions(flow, heavy, conv_branches)
            candidates.append(candidate)
        else:
            candidate = sibling
            candidate.adds.append(add)
            candidate.skips.append(skip)
            candidate.heavy |= heavy
        if not candidate.refusal.startswith("convolution"):
            owner[add] = candidate
            candidate.body = flow.hull(candidate.heavy)
            if not (blocks := _convolution_blocks(flow, candidate, candidates)):
                _absorb_smaller(flow, candidate, owner)
            candidate.refusal = _refuse_container([*_held(flow, candidate.body, candidate.adds, owner), *blocks])
            candidate.fed_by = _exclusive_producers(flow, candidate, heavy_bits, _taken(flow, candidates, owner))
    taken = _taken(flow, candidates, owner)
    for candidate in candidates:
        if not candidate.refusal:
            candidate.body = with_parts(flow, candidate.body | _exclusive_producers(flow, candidate, heavy_bits, taken))
            candidate.body = _until_outputs_meet(flow, candidate, activations, taken)
            candidate.body = with_parts(flow, candidate.body | unfolding_views(flow, candidate.body, batch_symbol))
            taken |= candidate.body
    _join_entangled(flow, candidates, owner)
    return candidates


def _skip_of(add: fx.Node, owner: dict[fx.Node, Candidate]) -> fx.Node | None:
    candidate = owner.get(add)
    return None if candidate is None else candidate.skips[candidate.adds.index(add)]


def _is_inside_another(flow: Dataflow, skip: fx.Node, candidates: list[Candidate]) -> bool:
    """Whether a tensor lies between the heavy operators of an earlier branch, as values do that later ones mix in."""
    for source in origins(skip):
        before, behind = flow.ancestors(source), flow.descendants(source)
        if any(item.heavy & before and item.heavy & behind for item in candidates if not item.refusal):
            return True
    return False


def _is_token_stream(node: fx.Node, batch_size: str) -> bool:
    value = value_of(node)
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return False
    return value.dim() >= 3 or (value.dim() == 2 and size_text(value.shape[0]) != batch_size)


def _refuse_convolutions(flow: Dataflow, heavy: int, conv_branches: bool) -> str:
    if not conv_branches and all(is_spatial_convolution(node) for node in flow.members(heavy) if is_heavy(node)):
        return "convolution block; gate it with conv_branches=True"
    return ""


def _beyond_earlier(flow: Dataflow, heavy: int, candidates: list[Candidate]) -> int:
    """What is left of ``heavy`` behind earlier candidates that it takes in as a whole."""
    for earlier in candidates:
        rest = heavy & ~earlier.heavy
        takes_all = not earlier.refusal and heavy & earlier.heavy == earlier.heavy
        if takes_all and rest and not flow.hull(rest) & flow.hull(earlier.heavy):
            heavy = rest
    return heavy


def _absorb_smaller(flow: Dataflow, candidate: Candidate, owner: dict[fx.Node, Candidate]) -> None:
    """Make branches part of a candidate that lies around them and is of more operators, or more work, than they."""
    held = _held(flow, candidate.body, candidate.adds, owner)
    inner = {id(owner[node]): owner[node] for node in held}.values()
    if not held or any(item.refusal or set(item.adds) - set(held) for item in inner):
        return
    held_in_all = flow.bits(node for item in inner for node in flow.members(item.heavy))
    more = [
        candidate.heavy.bit_count() > held_in_all.bit_count(),
        _work(flow, candidate.heavy) > _work(flow, held_in_all),
    ]
    if any(more):
        for item in inner:
            candidate.heavy |= item.heavy
            item.refusal = f"part of a larger branch, that of {candidate.adds[0].name}"
        for node in held:
            del owner[node]


def _work(flow: Dataflow, heavy: int) -> int:
    return sum(macs(node) for node in flow.members(heavy))


def _held(flow: Dataflow, body: int, own: Collection[fx.Node], owner: dict[fx.Node, Candidate]) -> list[fx.Node]:
    """The residual adds in a body that are not its own."""
    return [node for node in owner if body >> flow.position[node] & 1 and node not in own]


def _convolution_blocks(flow: Dataflow, candidate: Candidate, candidates: list[Candidate]) -> list[fx.Node]:
    """The adds of the convolution blocks that a candidate lies around, where they are several, as in a U-Net."""
    inside = [item for item in candidates if item is not candidate and item.heavy & candidate.body == item.heavy]
    blocks = [item for item in inside if all(map(is_dense_convolution, filter(is_heavy, flow.members(item.heavy))))]
    return [add for item in blocks for add in item.adds] if len(blocks) > 1 else []


def _refuse_container(held: Iterable[fx.Node]) -> str:
    held = list(dict.fromkeys(held))
    if held:
        return f"container: {len(held)} residual adds lie between its operators ({held[0].name}, ...)"
    return ""


def _taken(flow: Dataflow, candidates: list[Candidate], owner: dict[fx.Node, Candidate]) -> int:
    taken = flow.bits(owner)
    for candidate in candidates:
        taken |= 0 if candidate.refusal else candidate.body
    return taken


def _exclusive_producers(flow: Dataflow, candidate: Candidate, heavy_bits: int, taken: int) -> int:
    forbidden = taken
    for skip in candidate.skips:
        forbidden |= flow.informed(skip)
    return exclusive_producers(flow, candidate.body, forbidden, heavy_bits)


def exclusive_producers(flow: Dataflow, body: int, forbidden: int, heavy_bits: int) -> int:
    """Heavy operators outside a body that feed only it, and the nodes from them to it, as far as they are allowed."""
    exclusive = 0
    frontier = [argument for node in flow.members(body) for argument in node.all_input_nodes]
    while frontier:
        node = frontier.pop()
        bit = 1 << flow.position[node]
        if node.op != "call_function" or (forbidden | exclusive | body) & bit:
            continue
        if isinstance(value_of(node), torch.SymInt):
            continue
        if not flow.bits(node.users) & ~(body | exclusive):
            exclusive |= bit
            frontier.extend(node.all_input_nodes)
    return flow.bits(node for node in flow.members(exclusive) if flow.ancestors(node) & exclusive & heavy_bits)


def with_parts(flow: Dataflow, body: int) -> int:
    """The hull of a body with the parts of whatever it makes that is no tensor: only tensors leave a branch."""
    while True:
        hull = flow.hull(body)
        bundles = (node for node in flow.members(hull) if isinstance(value_of(node), list | tuple))
        body = hull | flow.bits(user for node in bundles for user in node.users)
        if body == hull:
            return body


def _until_outputs_meet(flow: Dataflow, candidate: Candidate, activations: int, taken: int) -> int:
    """The body, with what lies between its outputs and where they meet; as it is if nothing joins them alone."""
    body = candidate.body
    outputs = _outputs(flow, body)
    while outputs > len(candidate.adds):
        closures = (flow.hull(body | 1 << position) for position in _follow_ups(flow, body, activations, taken))
        fewer = next((closure for closure in closures if _outputs(flow, closure) < outputs), None)
        if fewer is None or fewer & taken & ~body:
            return body
        body, outputs = fewer, _outputs(flow, fewer)
    return body


def _follow_ups(flow: Dataflow, body: int, activations: int, taken: int) -> Iterator[int]:
    """Positions of the nodes that are made from a body and constants alone, in graph order."""
    known = body
    first = (body & -body).bit_length() - 1
    for position in range(first, len(flow.nodes)):
        node = flow.nodes[position]
        if node.op != "call_function" or (taken | known) >> position & 1:
            continue
        needed = [flow.position[item] for item in node.all_input_nodes if isinstance(value_of(item), Tensor | tuple)]
        if any(known >> item & 1 for item in needed) and all(
            known >> item & 1 or not activations >> item & 1 for item in needed
        ):
            known |= 1 << position
            yield position


def _outputs(flow: Dataflow, body: int) -> int:
    """How many tensors of a body are read outside it."""
    return sum(
        isinstance(value_of(node), Tensor) and any(not body >> flow.position[user] & 1 for user in node.users)
        for node in flow.members(body)
    )


def _join_entangled(flow: Dataflow, candidates: list[Candidate], owner: dict[fx.Node, Candidate]) -> None:
    """Make one branch of a body that both feeds another and is fed by it, since neither could run first.

    If something else lies between them, the later one is refused.
    """
    branches = [candidate for candidate in candidates if not candidate.refusal]
    for position, later in enumerate(branches):
        above = below = 0
        for node in flow.members(later.body):
            above |= flow.ancestors(node)
            below |= flow.descendants(node)
        for earlier in branches[:position]:
            if earlier.refusal or later.refusal or not (above & earlier.body and below & earlier.body):
                continue
            body = with_parts(flow, earlier.body | later.body)
            if body & _taken(flow, [item for item in branches if item not in (earlier, later)], owner):
                later.refusal = "entangled: it both feeds and reads the body of another branch"
                continue
            later.refusal = f"part of a larger branch, that of {earlier.adds[0].name}"
            earlier.adds += later.adds
            earlier.skips += later.skips
            earlier.heavy |= later.heavy
            earlier.body = body


def common_path(paths: list[str]) -> str:
    """The longest module path that all of these lie under."""
    levels = zip(*(path.split(".") for path in paths if path), strict=False)
    return ".".join(names[0] for names in takewhile(lambda names: len(set(names)) == 1, levels))
