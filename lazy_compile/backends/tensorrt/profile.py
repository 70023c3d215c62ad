"""Optimization profiles: the range of sizes that an engine serves, written as trtexec writes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lazy_compile.errors import ConfigError

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]
Dims = Sequence[int | str]
"""Sizes of an ONNX input: numbers, and names where they are free."""


def parse_shapes(option: str, text: str) -> dict[str, Shape]:
    """``"x:1x4x32x32,t:1"`` as shapes by input name; a name that holds a colon may stand in single quotes.

    >>> parse_shapes("--minShapes", "x:1x4x32x32,t:1")
    {'x': (1, 4, 32, 32), 't': (1,)}
    """
    shapes = {}
    for part in text.split(",") if text else ():
        name, _, sizes = part.strip().rpartition(":")
        if not name.strip("'") or not all(size.isdecimal() for size in sizes.split("x")):
            raise ConfigError(f"{option} {part!r} is not NAME:2x4x32x32; separate several by commas")
        shapes[name.strip("'")] = tuple(map(int, sizes.split("x")))
    return shapes


def profile_of(inputs: Mapping[str, Dims], least: Shapes, best: Shapes, most: Shapes) -> dict[str, tuple[Shape, ...]]:
    """``(min, opt, max)`` of every input that has a free size; empty if none has.

    A free size has one name wherever it occurs, so that the caches of a model follow the sizes of its own inputs.

    Args:
        inputs: sizes of all inputs of the network.
        least: the smallest shapes by input; where it says nothing, the best.
        best: the shapes to optimize for; where it says nothing, the largest.
        most: the largest shapes by input; where it says nothing, the best.

    Raises:
        ConfigError: a shape belongs to no input, contradicts its sizes, or a free size has no range.
    """
    best, most = {**most, **best}, {**best, **most}
    given = ({**best, **least}, best, most)
    sizes: dict[str, list[int | None]] = {}
    for position, shapes in enumerate(given):
        for name, shape in shapes.items():
            for size, free in _free_sizes(inputs, name, shape):
                known = sizes.setdefault(free, [None, None, None])
                if known[position] not in (None, size):
                    raise ConfigError(f"size {free!r} is {known[position]} in one input and {size} in {name!r}")
                known[position] = size
    profile = {}
    for name, dims in inputs.items():
        if any(isinstance(size, str) for size in dims):
            profile[name] = tuple(tuple(_size(name, size, sizes, which) for size in dims) for which in range(3))
            if any(not a <= b <= c for a, b, c in zip(*profile[name], strict=True)):
                raise ConfigError(f"the shapes of {name!r} are {profile[name]}; expected min <= opt <= max throughout")
    return profile


def _free_sizes(inputs: Mapping[str, Dims], name: str, shape: Shape) -> list[tuple[int, str]]:
    if name not in inputs:
        raise ConfigError(f"there is no input {name!r}; the inputs are {', '.join(inputs)}")
    dims = inputs[name]
    if len(dims) != len(shape) or any(isinstance(a, int) and a != b for a, b in zip(dims, shape, strict=True)):
        raise ConfigError(f"shape {list(shape)} of {name!r} does not fit the model, in which it is {list(dims)}")
    return [(size, free) for size, free in zip(shape, dims, strict=True) if isinstance(free, str)]


def _size(name: str, size: int | str, sizes: Mapping[str, Sequence[int | None]], which: int) -> int:
    if isinstance(size, int):
        return size
    value = sizes.get(size, (None, None, None))[which]
    if value is None:
        raise ConfigError(f"size {size!r} of {name!r} is free: give its range with min, opt and max shapes")
    return value
