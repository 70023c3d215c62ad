"""Optimization profiles: the ranges of sizes that an engine serves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lazy_compile.backends.onnx.metadata import OnnxMetadata
from lazy_compile.backends.onnx.sizes import (
    Shape,
    ShapeRange,
    Size,
    Sizes,
    bound_sizes,
    holds,
    names_in,
    shape_at,
    spelled_sizes,
)
from lazy_compile.errors import ConfigError

Dims = Mapping[str, Sequence[Size]]
"""Shapes of all inputs of a network: numbers, and formulas over the free sizes."""

Profile = dict[str, tuple[Shape, Shape, Shape]]
"""The smallest, the best and the largest shape of every input that has a free size."""


@dataclass(frozen=True)
class SizeRange:
    """The free sizes of one profile: the least, those to optimize for, and the most."""

    least: Sizes
    best: Sizes
    most: Sizes

    @property
    def all(self) -> tuple[Sizes, Sizes, Sizes]:
        return self.least, self.best, self.most

    def profile(self, dims: Dims) -> Profile:
        """The shapes of every input with a free size, so that the caches of a model follow its own inputs.

        Raises:
            ConfigError: a free size has no range, or a shape is smaller at most than at least.
        """
        found: Profile = {}
        for name, shape in dims.items():
            if any(isinstance(size, str) for size in shape):
                _require_known(name, shape, self.best)
                least, best, most = (shape_at(shape, sizes) for sizes in self.all)
                if any(not a <= b <= c for a, b, c in zip(least, best, most, strict=True)):
                    raise ConfigError(
                        f"the shapes of {name!r} are {(least, best, most)}; expected min <= opt <= max throughout"
                    )
                found[name] = least, best, most
        return found


def size_ranges(
    dims: Dims, model: OnnxMetadata | None, profiles: Sequence[ShapeRange], example: Sizes
) -> tuple[SizeRange, ...]:
    """One range for each profile that is asked for.

    A size that no shape names has the range that the model was exported with; without one it is what it was in the
    example call. Where nothing is asked for, there is one profile of such sizes.

    Args:
        dims: shapes of all inputs.
        model: the description of the file; None if ``export_onnx`` did not write it.
        profiles: what is asked for; shapes of the model's own inputs are enough.
        example: the free sizes of the example call, as far as the file says them.

    Raises:
        ConfigError: a shape belongs to no input, contradicts its sizes, or the model does not hold for it.
    """
    if not any(isinstance(size, str) for shape in dims.values() for size in shape):
        for asked in profiles:  # only to be refused where it does not fit
            for shapes in asked.complete:
                _bound(dims, shapes)
        return ()
    known = () if model is None else model.sizes
    least = {**example, **{size.name: size.least for size in known if size.least}}
    most = {**example, **{size.name: size.most for size in known if size.most}}
    found = []
    for asked in profiles or (ShapeRange(),):
        small, good, large = (_bound(dims, shapes) for shapes in asked.complete)
        best = {**example, **good}
        sizes = SizeRange({**least, **small}, best, {**most, **large})
        if model is not None:
            _require_conditions(model, sizes)
        found.append(sizes)
    return tuple(found)


def fixed_sizes(ranges: Sequence[SizeRange]) -> dict[str, int]:
    """The free sizes of a model that are the same in all profiles, and so fixed in its engine."""
    seen = [sizes for each in ranges for sizes in each.all]
    return {name: size for name, size in (seen[0] if seen else {}).items() if {each[name] for each in seen} == {size}}


def free_sizes(ranges: Sequence[SizeRange]) -> set[str]:
    """The names of all others."""
    return {name for each in ranges for name in each.least} - set(fixed_sizes(ranges))


def spelled_ranges(ranges: Sequence[SizeRange]) -> str:
    """``batch=1..8, height=32``; profiles are separated by ``;``"""
    return "; ".join(
        ", ".join(
            f"{name}={size}" if size == each.most[name] else f"{name}={size}..{each.most[name]}"
            for name, size in each.least.items()
        )
        for each in ranges
    )


def _bound(dims: Dims, shapes: Mapping[str, Shape]) -> dict[str, int]:
    if unknown := sorted(shapes.keys() - dims.keys()):
        raise ConfigError(f"there is no input {unknown[0]!r}; the inputs are {', '.join(dims)}")
    return bound_sizes(dims, shapes)


def _require_conditions(model: OnnxMetadata, ranges: SizeRange) -> None:
    for which, sizes in zip(("min", "opt", "max"), ranges.all, strict=True):
        for condition in model.conditions:
            if not holds(condition, sizes):
                raise ConfigError(
                    f"the {which} shapes give {spelled_sizes(sizes)}, and the model holds where {condition}: give "
                    "shapes for which it does"
                )


def _require_known(name: str, shape: Sequence[Size], sizes: Sizes) -> None:
    for size in shape:
        if isinstance(size, str) and not names_in(size) <= sizes.keys():
            raise ConfigError(f"size {size!r} of {name!r} is free: give its range with min, opt and max shapes")
