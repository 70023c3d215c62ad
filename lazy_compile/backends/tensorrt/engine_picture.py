"""A picture of an engine: every kernel a square, one line for each branch, in the order in which they run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from xml.sax.saxutils import escape

from lazy_compile.backends.tensorrt.check import EngineStructure
from lazy_compile.backends.tensorrt.layers import EngineLayer, LayerRole

COLORS: Mapping[LayerRole, str] = {
    "product": "#c2410c", "attention": "#7c3aed", "host copy": "#2563a8", "other": "#9aa1ad"
}  # fmt: skip
LEGEND: Mapping[LayerRole, str] = {
    "product": "matrix product or convolution", "attention": "fused attention", "host copy": "value read by the host",
    "other": "other kernel",
}  # fmt: skip
SIDE, STEP, LINE, LEFT, TOP = 9, 11, 17, 190, 62
_STYLE = (
    "text{font:11px system-ui,sans-serif;fill:#22262e} .dim{fill:#5b6472}"
    "@media(prefers-color-scheme:dark){text{fill:#dfe3ea} .dim{fill:#9aa1ad}}"
)


def draw(structure: EngineStructure, title: str) -> str:
    """SVG. Three columns: what a branch computes, what it does when it reuses, what runs at every step before it."""
    lines = list(structure.segments())
    rows = [((), (), always) if item is None else (item.compute, item.reuse, always) for always, item in lines]
    widths = [max(14, *(len(row[at]) for row in rows)) * STEP + 24 for at in range(3)]
    starts = [LEFT, LEFT + widths[0], LEFT + widths[0] + widths[1]]
    height, width = TOP + LINE * len(lines) + 8, starts[2] + widths[2]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">',
        f"<style>{_STYLE}</style>",
        _text(8, 18, title),
        *_legend(),
    ]
    for start, head in zip(
        starts, ("only where it computes", "only where it reuses", "before it, at every step"), strict=True
    ):
        parts.append(_text(start, TOP - 8, head, "dim"))
    for index, ((_, branch), row) in enumerate(zip(lines, rows, strict=True)):
        top = TOP + LINE * index
        parts.append(_text(8, top + SIDE, "after the last branch" if branch is None else branch.name))
        parts += [square for start, layers in zip(starts, row, strict=True) for square in _squares(start, top, layers)]
    return "\n".join([*parts, "</svg>"])


def _squares(start: int, top: int, layers: Sequence[EngineLayer]) -> Iterator[str]:
    for position, layer in enumerate(layers):
        yield (
            f'<rect x="{start + position * STEP}" y="{top}" width="{SIDE}" height="{SIDE}" rx="2" '
            f'fill="{COLORS[layer.role]}"><title>{escape(layer.kind)} {escape(layer.name)}</title></rect>'
        )


def _legend() -> Iterator[str]:
    left = 8
    for role, name in LEGEND.items():
        color = COLORS[role]
        yield f'<rect x="{left}" y="28" width="{SIDE}" height="{SIDE}" rx="2" fill="{color}"/>'
        yield _text(left + 14, 37, name, "dim")
        left += 30 + 6 * len(name)


def _text(x: int, y: int, text: str, kind: str = "") -> str:
    return f'<text x="{x}" y="{y}" class="{kind}">{escape(text)}</text>'
