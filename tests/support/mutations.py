"""Files of weights gone wrong, each made from one that is fine.

A mutation is a function from the bytes of a good file to those of a bad one, under a name that says
what is wrong. The same name always gives the same bytes.
"""

from __future__ import annotations

import io
import json
import pickle
import random
import struct
import zipfile
import zlib
from collections.abc import Callable
from typing import Any

import torch

Mutation = Callable[[bytes], bytes]
Mutations = dict[str, Mutation]


def truncations(*shares: float) -> Mutations:
    """The first part of a file."""
    return {f"first {share:.2%}": lambda b, s=share: b[: int(s * len(b))] for share in shares}


def flips(count: int, start: float = 0.0, end: float = 1.0, bits: int = 1) -> Mutations:
    """Bits turned over at random places between two shares of a file."""

    def flip(content: bytes, seed: int) -> bytes:
        chance = random.Random(f"{seed} {start} {end} {bits}")
        changed = bytearray(content)
        for _ in range(bits):
            at = chance.randrange(int(start * len(changed)), max(int(end * len(changed)), 1))
            changed[at] ^= 1 << chance.randrange(8)
        return bytes(changed)

    return {
        f"{bits} bits flipped from {start:.2%} to {end:.2%}, #{seed}": lambda b, s=seed: flip(b, s)
        for seed in range(count)
    }


def something_else(content: bytes) -> Mutation:
    return lambda _: content


def payload(mark: str) -> bytes:
    """A pickle that makes a file of this name when it is loaded without care."""

    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return open, (mark, "w")

    return pickle.dumps({"weight": Payload()})


MARK = "pickled"
"""What a payload writes, in the folder that a command is run in."""

NOTHING_OF_THE_KIND: Mutations = {
    "empty": something_else(b""),
    "zeros": something_else(bytes(5000)),
    "noise": something_else(random.Random(0).randbytes(5000)),
    "text": something_else("not at all what you want, ünï çødé\n".encode() * 50),
    "a pickle": something_else(payload(MARK)),
    "a zip": something_else(b"PK\x03\x04" + bytes(200)),
    "a gzip bomb": something_else(zlib.compress(bytes(10**7), wbits=31)),
}


# safetensors: eight bytes of length, a header in JSON, numbers


def header(edit: Callable[[dict[str, Any]], Any]) -> Mutation:
    """A header changed in place, or replaced by what the edit gives."""

    def change(content: bytes) -> bytes:
        (length,) = struct.unpack("<Q", content[:8])
        values = json.loads(content[8 : 8 + length])
        replaced = edit(values)
        written = replaced if isinstance(replaced, bytes) else json.dumps(values).encode()
        return struct.pack("<Q", len(written)) + written + content[8 + length :]

    return change


def tensor(**changes: Any) -> Mutation:
    """The entry of the first tensor of a header changed."""
    return header(lambda h: h[_first(h)].update(changes))


def _first(entries: dict[str, Any]) -> str:
    return next(name for name in sorted(entries) if name != "__metadata__")


def retyped(dtype: str, item: int) -> Mutation:
    """The numbers of the first tensor under another type, as many as fill their place."""

    def edit(entries: dict[str, Any]) -> None:
        entry = entries[_first(entries)]
        begin, end = entry["data_offsets"]
        entry |= {"dtype": dtype, "shape": [(end - begin) // item]}

    return header(edit)


def length(claimed: int) -> Mutation:
    return lambda content: struct.pack("<Q", claimed) + content[8:]


def float32(number: float, key: str = "") -> Mutation:
    """A number in the place of the first of a float tensor, whose name may have to hold a key."""

    def change(content: bytes) -> bytes:
        (length,) = struct.unpack("<Q", content[:8])
        entries = json.loads(content[8 : 8 + length])
        begin = next(
            entry["data_offsets"][0]
            for name, entry in sorted(entries.items())
            if name != "__metadata__" and entry["dtype"] == "F32" and key in name
        )
        at = 8 + length + begin
        return content[:at] + struct.pack("<f", number) + content[at + 4 :]

    return change


HEADERS: Mutations = {
    "a header of 8 EB": length(2**63),
    "a header of 200 MB": length(200 << 20),
    "a header longer than the file": length(1 << 20),
    "a header of nothing": length(0),
    "a header one byte short": lambda b: length(struct.unpack("<Q", b[:8])[0] - 1)(b),
    "a header that is a list": header(lambda _: b"[1, 2]"),
    "a header that is a number": header(lambda _: b"7" * 4000),
    "a header nested deeply": header(lambda _: b'{"a":' * 50_000),
    "a header in UTF-16": header(lambda h: json.dumps(h).encode("utf-16")),
    "a header of NULs": header(lambda _: bytes(800)),
    "an unknown type": tensor(dtype="F31"),
    "a type that is a number": tensor(dtype=4),
    "a shape that is text": tensor(shape="all"),
    "a negative shape": tensor(shape=[-1, 3]),
    "a shape beyond all numbers": tensor(shape=[2**62, 2**62]),
    "a shape larger than its place": tensor(shape=[10**9]),
    "a shape of a million dimensions": tensor(shape=[1] * 10**6),
    "a shape of fractions": tensor(shape=[1.5]),
    "offsets behind the end": tensor(data_offsets=[10**9, 10**9 + 64]),
    "offsets that run backwards": tensor(data_offsets=[64, 0]),
    "offsets below zero": tensor(data_offsets=[-64, 0]),
    "offsets of another's": tensor(data_offsets=[4, 68]),
    "one offset": tensor(data_offsets=[0]),
    "a tensor that is text": header(lambda h: h.update({_first(h): "weights"})),
    "metadata that are a list": header(lambda h: h.update({"__metadata__": [1]})),
    "metadata that are no text": header(lambda h: h.update({"__metadata__": {"a": 1}})),
}

WEIGHTS: Mutations = {
    "a tensor left out": header(lambda h: h.pop(_first(h)) and None),
    "a tensor of another name": header(lambda h: h.update({"owned": h.pop(_first(h))})),
    "a name that steers the terminal": header(
        lambda h: h.update({"\x1b]0;owned\x07\x1b[2J": h.pop(_first(h))})
    ),
    "a name of 100 kB": header(lambda h: h.update({"x" * 100_000: h.pop(_first(h))})),
    "bytes for floats": retyped("U8", 1),
    "8-bit floats": retyped("F8_E4M3", 1),
    "8-bit exponents": retyped("F8_E8M0", 1),
    "complex numbers": retyped("C64", 8),
    "truths": retyped("BOOL", 1),
    "NaN": float32(float("nan")),
    "infinity": float32(float("inf")),
    "minus infinity": float32(float("-inf"), "running_mean"),
    "NaN in the head": float32(float("nan"), "fc."),
}

BEYOND: Mutations = {
    "a variance below zero": float32(-3e38, "running_var"),
    "weights beyond all sums": float32(3e38, "conv1."),
}


# .pth


def torch_file(make: Callable[[dict[str, Any]], Any], **options: Any) -> Mutation:
    """What torch writes of a state dict that was changed, or of something in its place."""

    def change(content: bytes) -> bytes:
        weights = torch.load(io.BytesIO(content), weights_only=True)
        made = make(weights)
        file = io.BytesIO()
        torch.save(weights if made is None else made, file, **options)
        return file.getvalue()

    return change


def archive(edit: Callable[[str, bytes], bytes], compression: int = zipfile.ZIP_STORED) -> Mutation:
    """The zip that torch writes, each member's content changed by its name."""

    def change(content: bytes) -> bytes:
        file = io.BytesIO()
        with (
            zipfile.ZipFile(io.BytesIO(content)) as old,
            zipfile.ZipFile(file, "w", compression) as new,
        ):
            for name in old.namelist():
                new.writestr(name, edit(name, old.read(name)))
        return file.getvalue()

    return change


def _set(make: Callable[[], torch.Tensor], key: str = "conv1.weight") -> Mutation:
    return torch_file(lambda w: w.update({key: make()}))


def _filled(number: float, key: str, **options: Any) -> Mutation:
    return torch_file(lambda w: w.update({key: torch.full_like(w[key], number)}), **options)


class _Foreign:
    """A class that no loader should look for."""


def inflated(content: bytes) -> bytes:
    """A storage of 1 GB that is zeros, packed to 1 MB; what names it claims as much."""
    weights = torch.load(io.BytesIO(content), weights_only=True)
    weights["conv1.weight"] = torch.zeros(1 << 20)
    file = io.BytesIO()
    torch.save(weights, file)
    small, large = struct.pack("<i", 1 << 20), struct.pack("<i", 1 << 28)
    packed = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(file.getvalue())) as old,
        zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED, allowZip64=True) as new,
    ):
        for name in old.namelist():
            part = old.read(name)
            if name.endswith("data.pkl"):
                part = part.replace(b"J" + small, b"J" + large)
            if len(part) != 4 << 20:
                new.writestr(name, part)
                continue
            with new.open(name, "w", force_zip64=True) as member:
                for _ in range(256):
                    member.write(part)
    return packed.getvalue()


TORCH: Mutations = {
    "a class of its own": torch_file(lambda w: {**w, "x": _Foreign()}),
    "a call": archive(lambda n, b: payload(MARK) if n.endswith("data.pkl") else b),
    "a call, in a legacy file": something_else(
        pickle.dumps(0x1950A86A20F9469CFC6C) + pickle.dumps(1001) + payload(MARK)
    ),
    "a pickle without an end": archive(lambda n, b: b[:-9] if n.endswith("data.pkl") else b),
    "a pickle nested deeply": archive(
        lambda n, b: b"\x80\x02" + b"]" * 10**5 + b"a" * 10**5 + b"." if "data.pkl" in n else b
    ),
    "storages cut short": archive(lambda n, b: b[:-8] if "/data/" in n else b),
    "storages of nothing": archive(lambda n, b: b"" if "/data/" in n else b),
    "a byte order that is none": archive(lambda n, b: b"middle" if "byteorder" in n else b),
    "a version that is none": archive(lambda n, b: b"x" if n.endswith("version") else b),
    "names that lead elsewhere": lambda b: b.replace(b"data.pkl", b"../a.pkl"),
    "a bomb": inflated,
    "a list": torch_file(list),
    "a number": torch_file(lambda _: 5),
    "numbers for tensors": torch_file(lambda w: dict.fromkeys(w, 1.0)),
    "names that are numbers": torch_file(lambda w: dict(enumerate(w.values()))),
    "one tensor": torch_file(lambda w: next(iter(w.values()))),
    "a tensor repeated to 4 TB": _set(lambda: torch.zeros(1).expand(2**40)),
    "a tensor repeated to 4 GB": _set(lambda: torch.zeros(1).expand(2**30)),
    "a sparse tensor": _set(lambda: torch.eye(3).to_sparse()),
    "a sparse tensor of 4 TB": _set(
        lambda: torch.sparse_coo_tensor(torch.zeros(2, 1, dtype=torch.long), [1.0], (2**20, 2**20))
    ),
    "a tensor without numbers": _set(lambda: torch.empty(2**40, device="meta")),
    "a quantized tensor": _set(
        lambda: torch.quantize_per_tensor(torch.ones(9), 0.1, 0, torch.qint8)
    ),
    "complex numbers": _set(lambda: torch.zeros(16, 1, 3, 3, dtype=torch.complex64)),
    "NaN in 8-bit floats": _set(
        lambda: torch.full((16, 1, 3, 3), float("nan")).to(torch.float8_e4m3fn)
    ),
    "a number without a shape": _set(lambda: torch.tensor(1.0), "fc.weight"),
    "no dimensions": _set(lambda: torch.zeros(0)),
    "a head of a billion classes": _set(lambda: torch.zeros(2**30, 0), "fc.weight"),
    "NaN": _filled(float("nan"), "conv1.weight"),
    "infinity": _filled(float("inf"), "fc.bias"),
    "NaN in half precision": _set(lambda: torch.full((16, 1, 3, 3), float("nan")).bfloat16()),
    "NaN in a legacy file": _filled(float("nan"), "fc.bias", _use_new_zipfile_serialization=False),
    "no weights at all": torch_file(lambda _: {}),
    "a state dict in a list": torch_file(lambda w: {"state_dict": [w]}),
    "an EMA copy that is none": torch_file(lambda w: {**w, "state_dict_ema": 3}),
}
