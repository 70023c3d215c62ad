"""Layer lists of builders, written out."""

from __future__ import annotations

SOUND = """
kgen  norm                     x          -> z
copy  copy_d2h_c               c          -> c_host
cjmp  branch                   c_host     ->           [If_0]  then qkv else move
gemm  qkv                      z          -> q         [q]
kgen  _gemm_mha_v2             q          -> a         [attention]
gemm  out                      a          -> o         [out]
jmp   end_of_then                         ->           goto add
kgen  move                     cache      -> o
jmp   end_of_else                         ->           goto add
kgen  add                      o x        -> y
gemm  final                    y          -> result    [final]
"""
"""``kind name reads -> writes [ONNX nodes] jump targets``"""


def spelled(table: str) -> str:
    """The table as a builder logs it."""
    return "Layers:\n" + "\n".join(_line(row) for row in table.strip().splitlines())


def _line(row: str) -> str:
    before, _, after = row.partition("->")
    kind, name, *reads = before.split()
    words = after.split()
    jumps = {"then": "JumpTargetThen", "else": "JumpTargetElse", "goto": "JumpTarget"}
    targets = "".join(f"{jumps[word]}: {words[at + 1]}, " for at, word in enumerate(words) if word in jumps)
    nodes = [word.strip("[]") for word in words if word.startswith("[")]
    writes = words[: 1 if words and not words[0].startswith("[") and words[0] not in jumps else 0]
    tensors = [
        "".join(f"{{ Name: {item}, Dimensions: [2,8], Datatype: Float, Format: (Linear) Row major }}" for item in items)
        for items in (reads, writes)
    ]
    metadata = "".join(f"[ONNX Layer: {node} | compute_0 (then_branch) | If_0 (If)]" for node in nodes)
    return (
        f"Name: {name}, LayerType: {kind}, Inputs: [ {tensors[0]}], Constants: [ {{ Name: w, Dimensions: [8,8]}}], "
        f"Outputs: [ {tensors[1]}], TacticName: {name}_0x12, StreamId: 0, {targets}Metadata: {metadata}"
    )


def without(table: str, name: str) -> tuple[str, str]:
    """A table without one of its rows, and that row."""
    rows = table.strip().splitlines()
    (row,) = [row for row in rows if row.split()[1] == name]
    return "\n".join(item for item in rows if item != row), row


def moved(table: str, name: str, before: str) -> str:
    rest, row = without(table, name)
    rows = rest.splitlines()
    position = next(index for index, item in enumerate(rows) if item.split()[1] == before)
    return "\n".join([*rows[:position], row, *rows[position:]])
