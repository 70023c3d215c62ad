"""Seeded damage to the files of a folder, by accident and on purpose."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import torch
from safetensors.torch import load_file, save_file

from lazy_compile.backends.onnx.metadata import KEY
from lazy_compile.backends.onnx.sealed_file import DIGEST_KEY, seal
from lazy_compile.digests import DIGEST, digest_of, with_digest
from lazy_compile.storage import save_tensors

VALUES: list[Any] = [
    None, True, -1, 0, 2**63, 10**30, 0.5, -3.0, 1e308, "", "x" * 5000, "<b>$", "'\";\n{}", [], {}, [[]], "../x",
    ["a"] * 2000, {"kind": "learned"},
]  # fmt: skip
TEXTS = ["NaN", "Infinity", "-Infinity", "1e999", "9" * 5000, "[" * 100_000, '{"a":' * 5_000, '"\ud83d"', "01", "'a'"]
NUMBERS = [float("nan"), float("inf"), -float("inf"), 1e38, -1e38]

FOREIGN = Path(__file__).parent
"""Where files that are no artefacts lie."""

Damage = Callable[[Path, Path, random.Random], None]


def mutate(folder: Path, other: Path, rng: random.Random) -> tuple[str, bool]:
    """Damage one file of ``folder``; ``other`` holds one of the same kind.

    Returns:
        What was done, and whether the file carries a digest that is true again, as an attacker would write it.
    """
    file = rng.choice(sorted(path for path in folder.rglob("*") if path.is_file()))
    kinds: list[Damage] = [flip_bits, truncate, extend, delete, cut_out, repeat, zeros, empty, special, stranger]
    if len(list(other.rglob("*"))) > 1:  # a lone file of another model is a good artefact
        kinds += [swap]
    kinds += 2 * AIMED.get(file.suffix, [])
    kind = rng.choice(kinds)
    kind(file, other / file.relative_to(folder), rng)
    return f"{kind.__name__} {file.name}", kind.__name__.startswith("sealed")


def flip_bits(file: Path, _: Path, rng: random.Random) -> None:
    content = bytearray(file.read_bytes())
    for _number in range(rng.choice((1, 1, 8))):
        if content:
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)


def truncate(file: Path, _: Path, rng: random.Random) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: rng.randrange(max(len(content), 1))])


def extend(file: Path, _: Path, rng: random.Random) -> None:
    file.write_bytes(file.read_bytes() + rng.randbytes(rng.randrange(1, 64)))


def cut_out(file: Path, _: Path, rng: random.Random) -> None:
    content, (start, end) = _span(file, rng)
    file.write_bytes(content[:start] + content[end:])


def repeat(file: Path, _: Path, rng: random.Random) -> None:
    content, (start, end) = _span(file, rng)
    file.write_bytes(content[:end] + content[start:])


def zeros(file: Path, _: Path, rng: random.Random) -> None:
    content, (start, end) = _span(file, rng)
    file.write_bytes(content[:start] + bytes(end - start) + content[end:])


def _span(file: Path, rng: random.Random) -> tuple[bytes, tuple[int, int]]:
    content = file.read_bytes()
    start = rng.randrange(max(len(content), 1))
    return content, (start, min(len(content), start + rng.choice((1, 4, 64, 1024))))


def empty(file: Path, _: Path, rng: random.Random) -> None:
    file.write_bytes(b"")


def swap(file: Path, other: Path, rng: random.Random) -> None:
    candidates = [other] if other.is_file() else sorted(other.parent.glob(f"*{file.suffix}"))
    if candidates:
        file.write_bytes(rng.choice(candidates).read_bytes())


def stranger(file: Path, other: Path, rng: random.Random) -> None:
    """A file of another kind."""
    found = sorted(path for path in FOREIGN.rglob("*") if path.is_file() and path.suffix != file.suffix)
    file.write_bytes(rng.choice(found).read_bytes())


def delete(file: Path, _: Path, rng: random.Random) -> None:
    file.unlink()


def special(file: Path, _: Path, rng: random.Random) -> None:
    """Something that is no plain file, or never ends."""
    file.unlink()
    kind = rng.randrange(5)
    if kind == 0:
        os.mkfifo(file)
    elif kind == 1:
        file.mkdir()
    else:
        file.symlink_to(("/dev/zero", file.name, "/proc/self/mem")[kind - 2])


def edit_json(file: Path, _: Path, rng: random.Random) -> None:
    file.write_text(json.dumps(_edited(json.loads(file.read_text()), rng)))


def sealed_edit_json(file: Path, other: Path, rng: random.Random) -> None:
    values = json.loads(file.read_text())
    if not isinstance(values, dict) or DIGEST not in values:
        return edit_json(file, other, rng)
    del values[DIGEST]
    edited = _edited(values, rng)
    file.write_text(json.dumps(with_digest(edited) if isinstance(edited, dict) else edited))
    return None


def odd_json(file: Path, _: Path, rng: random.Random) -> None:
    values = json.loads(file.read_text())
    place, key = rng.choice(list(_places(values)))
    place[key] = "@@"
    file.write_text(json.dumps(values).replace('"@@"', rng.choice(TEXTS)), errors="surrogatepass")


def twice_json(file: Path, _: Path, rng: random.Random) -> None:
    """A key that is there twice, the second time with another value."""
    text = file.read_text()
    key = rng.choice(re.findall(r'"[^"\n]+":', text) or ['"a":'])
    end = text.rindex("}")
    file.write_text(f"{text[:end]}, {key} {json.dumps(rng.choice(VALUES))}{text[end:]}")


def old_json(file: Path, _: Path, rng: random.Random) -> None:
    values = json.loads(file.read_text())
    if isinstance(values, dict):
        values["format"] = rng.choice((0, 1, 2, 3, 5, "4", None))
        if rng.random() < 0.5:
            values.pop(DIGEST, None)
    file.write_text(json.dumps(values))


def header(file: Path, _: Path, rng: random.Random) -> None:
    """The header of a safetensors file: its length, or what it says of a tensor."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    if rng.random() < 0.3:
        file.write_bytes(
            rng.choice((0, 1, length - 1, length + 1, 2**40, 2**64 - 1)).to_bytes(8, "little") + content[8:]
        )
        return
    edited = json.dumps(_edited(json.loads(content[8 : 8 + length]), rng)).encode()
    file.write_bytes(len(edited).to_bytes(8, "little") + edited + content[8 + length :])


def sealed_tensors(file: Path, _: Path, rng: random.Random) -> None:
    """Other tensors, with all that vouches for them."""
    tensors = load_file(file)
    name = rng.choice(sorted(tensors))
    kind, tensor = rng.randrange(5), tensors[name]
    if kind == 0:
        tensors[name] = torch.full_like(tensor.float(), rng.choice(NUMBERS))
    elif kind == 1:
        tensors[name] = tensor.flatten()[:1].clone()
    elif kind == 2:
        tensors[name] = tensor.to(rng.choice((torch.int8, torch.bool, torch.float64, torch.complex64)))
    elif kind == 3:
        del tensors[name]
    else:
        tensors[rng.choice(("extra", "bias", "weight", "knots", "slope"))] = tensor.clone()
    manifest = file.with_name("lazy.json")
    if not manifest.exists():
        save_tensors(file, tensors, {"kind": "test"})
        return
    save_file(tensors, file)
    values = json.loads(manifest.read_text())
    values["policy"]["gates"] = f"gates.{digest_of(file.read_bytes())[:16]}.safetensors"
    file.rename(file.with_name(values["policy"]["gates"]))
    manifest.write_text(json.dumps(with_digest({key: item for key, item in values.items() if key != DIGEST})))


def sealed_metadata(file: Path, _: Path, rng: random.Random) -> None:
    """What an ONNX file says about itself, with a digest that is true again."""
    proto = onnx.load(str(file), load_external_data=False)
    for entry in list(proto.metadata_props):
        if entry.key == KEY:
            edited = _edited(json.loads(entry.value), rng)
            entry.value = json.dumps(edited).encode(errors="replace").decode()
        elif entry.key == DIGEST_KEY:
            proto.metadata_props.remove(entry)
    file.write_bytes(proto.SerializeToString())
    seal(file)


def sealed_proto(file: Path, _: Path, rng: random.Random) -> None:
    """A graph or a weight that is another, where weights lie included; an unsealed one, as other tools write it."""
    proto = onnx.load(str(file), load_external_data=False)
    for entry in list(proto.metadata_props):
        if entry.key == DIGEST_KEY:
            proto.metadata_props.remove(entry)
    tensors, nodes = proto.graph.initializer, proto.graph.node
    kind = rng.randrange(6)
    outside = [entry for tensor in tensors for entry in tensor.external_data]
    if outside and kind < 3:
        rng.choice(outside).value = rng.choice(("/etc/passwd", "../x", "-1", "9" * 30, "", "a\0b", "/dev/zero", "1e3"))
    elif kind == 3 and tensors:
        rng.choice(tensors).dims[:] = [rng.choice((-1, 0, 2**62, 3))]
    elif kind == 4:
        rng.choice(nodes).op_type = rng.choice(("If", "Loop", "NoSuchOperator", ""))
    else:
        rng.choice(nodes).input[:] = [rng.choice(("", "x", "nothing"))]
    file.write_bytes(proto.SerializeToString())


def bomb(file: Path, _: Path, rng: random.Random) -> None:
    """A small archive of which one member is large."""
    larger = file.with_name("larger")
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(larger, "w", zipfile.ZIP_DEFLATED) as new:
        names = old.namelist()
        chosen = rng.choice(names)
        for name in names:
            content = old.read(name)
            new.writestr(name, content + bytes(2**27) if name == chosen else content)
    shutil.move(larger, file)


def archive(file: Path, _: Path, rng: random.Random) -> None:
    """An archive with a member that is missing, renamed, or holds something else."""
    other = file.with_name("other")
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(other, "w") as new:
        names = old.namelist()
        chosen, kind = rng.choice(names), rng.randrange(4)
        for name in names:
            if name != chosen:
                new.writestr(name, old.read(name))
            elif kind == 1:
                new.writestr(f"../{name}", old.read(name))
            elif kind == 2:
                new.writestr(name, rng.randbytes(64))
            elif kind == 3:
                text = old.read(name).replace(b"<f8", b"|O8").replace(b"(2,", b"(200000000000,")
                new.writestr(name, text)
    shutil.move(other, file)


AIMED: dict[str, list[Damage]] = {
    ".json": [edit_json, edit_json, odd_json, twice_json, old_json, sealed_edit_json, sealed_edit_json],
    ".safetensors": [header, header, sealed_tensors],
    ".onnx": [sealed_metadata, sealed_metadata, sealed_proto],
    ".npz": [bomb, archive],
    ".pt2": [bomb, archive, archive],
}


def _edited(values: Any, rng: random.Random) -> Any:
    places = list(_places(values))
    if not places or rng.random() < 0.02:
        return rng.choice(VALUES)
    place, key = rng.choice(places)
    action = rng.choice(("set", "set", "drop", "nudge", "type", "double"))
    value = place[key]
    if action == "drop":
        del place[key]
    elif action == "nudge" and isinstance(value, int | float):
        place[key] = 1 - value
    elif action == "type":
        place[key] = str(value) if not isinstance(value, str) else [value]
    elif action == "double" and isinstance(value, list):
        place[key] = value + value
    else:
        place[key] = rng.choice(VALUES)
    return values


def _places(values: Any) -> Any:
    items = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for key, value in items:
        yield values, key
        yield from _places(value)
