"""Which input of a model is the denoising time, read from its graph."""

from __future__ import annotations

from torch import Tensor, fx

from lazy_compile.errors import ConfigError
from lazy_compile.ir.operators import PASSTHROUGH, operator_name, value_of
from lazy_compile.ir.program import Program, Role

_TIME_WORDS = frozenset(
    [
        *["timestep", "timesteps", "time", "t", "t_hat", "tau", "sigma", "sigmas", "log_snr", "logsnr"],
        *["noise_level", "noise_levels", "noise_labels", "noise_cond", "c_noise"],
        *["step", "steps", "times", "diffusion_step", "diffusion_steps", "diffusion_timestep", "diffusion_timesteps"],
    ]
)


def find_timestep_input(program: Program, wanted: str | None) -> int | None:
    """Position of the time input among the user's tensors; None if the model has none.

    It is the scalar, or tensor of one value per row, that a sinusoidal embedding reads, also through a linear layer
    that multiplies it by learned frequencies; else one that picks a line of a table that is not trained. Where several
    are embedded so (FLUX embeds its guidance too), the argument's name decides, then the order. One value for each
    frame or token is the time only if a sinusoid reads it and its name says so: positions look the same.

    Raises:
        ConfigError: ``wanted`` names no tensor input.
    """
    users = [
        (node, item.name)
        for node, item in zip(program.placeholders, program.inputs, strict=True)
        if item.role is Role.USER
    ]
    names = [name for _, name in users]
    if wanted is not None:
        if wanted not in names:
            raise ConfigError(f"timestep_input is {wanted!r}; the tensor inputs of this model are {', '.join(names)}")
        return names.index(wanted)
    small = [position for position, (node, _) in enumerate(users) if _is_small(node)]
    embedded = [position for position in small if _reaches_sinusoid(users[position][0])]
    trained = _informed_by(program, (Role.PARAMETER, Role.USER))
    embedded = embedded or [position for position in small if _picks_a_line(users[position][0], trained)]
    candidates = embedded or [position for position in small if names_the_time(names[position])]
    candidates = candidates or [position for position, user in enumerate(users) if _is_time_of_parts(*user)]
    named = [position for position in candidates if names_the_time(names[position])]
    return next(iter(named or candidates), None)


def names_the_time(path: str, wanted: str | None = None) -> bool:
    """Whether an argument is called like a timestep, or as the caller has said that it is called."""
    return path == wanted or (wanted is None and path.rpartition(".")[2] in _TIME_WORDS)


def _is_small(node: fx.Node) -> bool:
    value = value_of(node)
    return isinstance(value, Tensor) and all(isinstance(size, int) and size == 1 for size in value.shape[1:])


def _is_time_of_parts(node: fx.Node, name: str) -> bool:
    value = value_of(node)
    return isinstance(value, Tensor) and value.dim() == 2 and names_the_time(name) and _reaches_sinusoid(node)


def _reaches_sinusoid(source: fx.Node) -> bool:
    frontier, seen = [source], {source}
    while frontier:
        node = frontier.pop()
        for user in node.users:
            value = value_of(user)
            if user in seen or not isinstance(value, Tensor) or value.dim() > 5:
                continue
            if operator_name(user) in ("sin", "cos"):
                return True
            if operator_name(user) in _ELEMENTWISE or _multiplies_by_frequencies(user, node):
                seen.add(user)
                frontier.append(user)
    return False


def _picks_a_line(source: fx.Node, trained: set[fx.Node]) -> bool:
    """Whether a whole number says where to look in a table of embeddings, as sines that were computed beforehand are.

    A table of weights is looked up by a class.
    """
    frontier, seen = [source], {source}
    while frontier:
        node = frontier.pop()
        for user in node.users.keys() - seen:
            if operator_name(user) in _LOOKUPS and user.args[0] is not node:
                table = user.args[0]
                if isinstance(table, fx.Node) and table not in trained and value_of(table).is_floating_point():
                    return True
            elif operator_name(user) in PASSTHROUGH:
                seen.add(user)
                frontier.append(user)
    return False


def _informed_by(program: Program, roles: tuple[Role, ...]) -> set[fx.Node]:
    """Nodes that depend on an input of one of these roles."""
    found = {node for node, item in zip(program.placeholders, program.inputs, strict=True) if item.role in roles}
    for node in program.graph.nodes:
        if not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def _multiplies_by_frequencies(user: fx.Node, node: fx.Node) -> bool:
    """Whether a linear layer takes single numbers, as that of a learned Fourier embedding does."""
    value = value_of(node)
    return operator_name(user) in _LINEAR and value.dim() > 0 and value.shape[-1] == 1


_LOOKUPS = frozenset({"index", "index_select", "embedding"})
_LINEAR = frozenset({"linear", "mm", "addmm"})
_ELEMENTWISE = frozenset(
    {
        "_to_copy", "to", "expand", "view", "reshape", "unsqueeze", "squeeze", "slice", "select", "flatten", "repeat",
        "mul", "div", "add", "sub", "rsub", "neg", "einsum", "outer", "ger", "cat", "clone", "contiguous", "matmul",
        "type_as", "log", "log2", "log10", "log1p", "exp", "sqrt", "rsqrt", "pow", "reciprocal", "clamp", "clamp_min",
        "atan",
    }
)  # fmt: skip
