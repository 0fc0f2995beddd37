"""Damaged recipes, images and tars, as in `mutations`."""

from __future__ import annotations

import io
import random
import struct
import tarfile
import zlib
from collections.abc import Callable
from typing import Any

import yaml
from mutations import MARK, Mutation, Mutations, something_else
from PIL import Image

# Recipes


def recipe(text: str | bytes) -> Mutation:
    return something_else(text if isinstance(text, bytes) else text.encode())


def values(*path: str, value: Any) -> Mutation:
    """A key of a good recipe with another value."""

    def change(content: bytes) -> bytes:
        whole = yaml.safe_load(content)
        part = whole
        for key in path[:-1]:
            part = part[key]
        part[path[-1]] = value
        return yaml.safe_dump(whole, allow_unicode=True).encode()

    return change


def _laughs(merge: str = "") -> str:
    lines = ["a0: &a0 [lol, lol, lol, lol]"]
    for n in range(30):
        lines.append(f"a{n + 1}: &a{n + 1} [" + ", ".join([f"{merge}*a{n}"] * 9) + "]")
    return "\n".join(lines)


RECIPES: Mutations = {
    "too large": recipe("# " + "x" * 2_000_000),
    "a billion laughs": recipe(_laughs()),
    "a merge of an alias": recipe("a: &a {b: 1}\nmodel: {<<: *a}"),
    "merges of merges": recipe("model: " + "{<<: " * 3000 + "{}" + "}" * 3000),
    "an alias of itself": recipe("a: &a [*a]"),
    "lists nested deeply": recipe("[" * 900_000),
    "mappings nested deeply": recipe("{a: " * 200_000),
    "blocks nested deeply": recipe("\n".join(" " * n + "a:" for n in range(1300))),
    "a call": recipe(f"seed: !!python/object/apply:builtins.open [{MARK}, w]"),
    "a name of Python's": recipe("seed: !!python/name:os.system"),
    "an object of Python's": recipe("model: !!python/object:ricciq.recipe.Recipe {}"),
    "a module of Python's": recipe("seed: !!python/module:antigravity"),
    "a tag of its own": recipe("seed: !run ls"),
    "bytes that are none": recipe("model: {name: !!binary é}"),
    "pairs": recipe("model: !!omap [name: x]"),
    "a date": recipe("seed: 2001-01-01"),
    "a date that is none": recipe("seed: 2001-99-99"),
    "a timestamp that is none": recipe("seed: !!timestamp x"),
    "a number of 5,000 digits": recipe("seed: " + "9" * 5000),
    "a number of 500,000 hexadecimal digits": recipe("seed: 0x" + "f" * 500_000),
    "a number of 900,000 bits": recipe("seed: 0b" + "1" * 900_000),
    "a number of many sixties": recipe("seed: 1" + ":59" * 300_000),
    "a fraction of many sixties": recipe("training: {lr: 1" + ":59" * 300_000 + ".5}"),
    "a key of 5,000 digits": recipe("9" * 4000 + ": 1"),
    "a key of 500,000 hexadecimal digits": recipe("0x" + "f" * 500_000 + ": 1"),
    "NaN": recipe("training: {lr: .nan}"),
    "infinity": recipe("training: {lr: .inf}"),
    "a key twice": recipe("seed: 1\nseed: 2"),
    "a key twice, further in": recipe("model: {name: a}\ntraining: {lr: 0.1, lr: 0.2}"),
    "a list as a key": recipe("? [a, b]\n: 1"),
    "a mapping as a key": recipe("? {a: b}\n: 1"),
    "no key": recipe("~: 1"),
    "NUL": recipe(b"seed: 1\0"),
    "no UTF-8": recipe(b"seed: \xff\xfe\xfd"),
    "UTF-16": recipe("seed: 1".encode("utf-16")),
    "Latin-1": recipe("# é\nseed: 1".encode("latin-1")),
    "two documents": recipe("seed: 1\n---\nseed: 2"),
    "a list": recipe("- 1\n- 2"),
    "a number": recipe("7"),
    "nothing": recipe("# nothing"),
    "tabs": recipe("model:\n\tname: x"),
    "an open quotation": recipe('seed: "1'),
    "an unknown directive": recipe("%TAG ! tag:x\n%FOO\nseed: 1"),
    "a section that is a list": recipe("training: [1, 2]"),
    "a section that is a number": recipe("model: 7"),
    "an unknown key": recipe("training: {learning_rate: 1}"),
    "a key of 900 kB": recipe("x" * 900_000 + ": 1"),
    "a data set of 900 kB": recipe("data: {name: " + "x" * 900_000 + "}"),
    "a model of 900 kB": recipe("model: {checkpoint: " + "x" * 900_000 + "}"),
    "an optimizer of 900 kB": recipe("training: {opt: " + "x" * 900_000 + "}"),
    "images of a gigapixel": values("data", "input_size", value=100_000),
    "a seed beyond 64 bits": values("seed", value=2**64),
    "a seed that is text": values("seed", value="one"),
    "widths that are a list": values("quantization", "weight_bits", value=[2, 2]),
    "a width of 10^30": values("quantization", "weight_bits", value=10**30),
    "a device that is a path": values("device", value="../../dev/null"),
    "a share above one": values("data", "holdout", value=3.0),
    "a batch of none": values("data", "batch_size", value=0),
    "truth for a number": values("training", "epochs", value="yes please"),
}

NAMES: Mutations = {
    "NUL in a name": recipe('data: {name: "digits\\0"}'),
    "half a surrogate": recipe('data: {name: "digits\\ud800"}'),
    "what steers the terminal": recipe('data: {name: "\\e]0;owned\\a\\e[2J"}'),
    "a schedule that is none": recipe("data: {name: digits}\ntraining: {sched: ../../etc}"),
    "a policy of augmentation that is none": recipe(
        "data: {name: digits, augmentation: {auto_augment: x}}"
    ),
    "bytes": recipe("data: {name: !!binary aGVsbG8=}"),
    "a folder that is no data set": recipe("data: {name: /etc}"),
    "a stream": recipe("data: {name: tfds/mnist}"),
    "NUL in a folder": recipe('data: {name: wds/x, dir: "/tmp/\\0"}'),
    "NUL in a set of torchvision": recipe('data: {name: torch/mnist, dir: "/tmp/\\0"}'),
    "NUL in a hub": recipe('data: {name: "hfds/./\\0"}'),
    "NUL in a checkpoint": recipe('model: {checkpoint: "/tmp/\\0.pth"}\ndata: {name: digits}'),
    "a checkpoint of 1,000 letters": recipe(
        f"model: {{checkpoint: {'x' * 1000}}}\ndata: {{name: digits}}"
    ),
    "a folder of 1,000 letters": recipe(f"data: {{name: {'x' * 1000}}}"),
    "a folder of shards of 1,000 letters": recipe(f"data: {{name: wds/x, dir: {'x' * 1000}}}"),
    "an optimizer of 1,000 letters": recipe(
        f"data: {{name: digits}}\ntraining: {{opt: {'x' * 1000}}}"
    ),
    "an optimizer that is none": recipe("data: {name: digits}\ntraining: {opt: ../../etc}"),
}
"""Valid YAML that names things that do not exist."""


# Images


def image(kind: str, mode: str = "L", size: tuple[int, int] = (8, 8), **options: Any) -> bytes:
    """An image written by PIL."""
    file = io.BytesIO()
    chance = random.Random(f"{kind} {mode} {size}")
    pixels = chance.randbytes(size[0] * size[1])
    Image.frombytes("L", size, pixels).convert(mode).save(file, kind, **options)
    return file.getvalue()


def chunk(name: bytes, content: bytes) -> bytes:
    """A chunk of a PNG."""
    checked = zlib.crc32(name + content)
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", checked)


def png(
    width: int,
    height: int,
    *,
    rows: int = 72,
    depth: int = 8,
    colour: int = 0,
    more: Callable[[], bytes] = bytes,
) -> Mutation:
    """A PNG with this many bytes of pixels and any header."""

    def make(_: bytes) -> bytes:
        start = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
        data = chunk(b"IDAT", zlib.compress(bytes(rows), 1)) if rows else b""
        parts = [chunk(b"IHDR", start), more(), data, chunk(b"IEND", b"")]
        return b"\x89PNG\r\n\x1a\n" + b"".join(parts)

    return make


IMAGES: Mutations = {
    "a PNG of 10 gigapixels": png(100_000, 100_000),
    "a PNG of 100 megapixels, all there": png(10_000, 10_000, rows=10_001 * 10_000),
    "a PNG of 2^31 pixels a side": png(2**31 - 1, 2**31 - 1),
    "a PNG of no pixels": png(0, 0),
    "a PNG of no height": png(8, 0),
    "a PNG without data": png(8, 8, rows=0),
    "a PNG of 3 bits": png(8, 8, depth=3),
    "a PNG of an unknown kind": png(8, 8, colour=9),
    "a PNG with a text that swells to 200 MB": png(
        8, 8, more=lambda: chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(200 << 20), 1))
    ),
    "a PNG with a profile that swells to 200 MB": png(
        8, 8, more=lambda: chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(200 << 20), 1))
    ),
    "a PNG with a chunk of 4 GB": png(8, 8, more=lambda: b"\xff\xff\xff\xffeXIf"),
    "a PostScript program": something_else(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n"
        b"(pickled) (w) file closefile showpage\n%%EOF\n"
    ),
    "an SVG that names a file": something_else(
        b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'
    ),
    "a PDF": something_else(b"%PDF-1.4\n1 0 obj\n<<>>\nendobj\ntrailer\n<<>>\n"),
    "a BMP of 4 gigapixels": something_else(
        b"BM" + struct.pack("<IHHI", 1 << 20, 0, 0, 54)
        + struct.pack("<IiiHHIIiiII", 40, 65_535, 65_535, 1, 8, 0, 0, 0, 0, 0, 0) + bytes(1000)
    ),
    "a BMP of negative size": something_else(
        b"BM" + struct.pack("<IHHI", 1 << 20, 0, 0, 54)
        + struct.pack("<IiiHHIIiiII", 40, -8, -2**31, 1, 8, 0, 0, 0, 0, 0, 0) + bytes(1000)
    ),
    "a GIF of 4 gigapixels": something_else(
        image("GIF")[:6] + b"\xff\xff\xff\xff" + image("GIF")[10:]
    ),
    "a PPM of 10 gigapixels": something_else(b"P5 100000 100000 255\n" + bytes(100)),
    "a TIFF whose directory is itself": lambda _: b"II*\0\x08\0\0\0\0\0" + b"\x08\0\0\0",
}  # fmt: skip

IMAGES_ALL_THE_SAME: Mutations = {
    "a PNG with half of its data": png(8, 8, rows=36),
    "a PNG with an animation of a billion images": png(
        8, 8, more=lambda: chunk(b"acTL", struct.pack(">II", 2**30, 0))
    ),
    "a JPEG called PNG": something_else(image("JPEG")),
    "a WebP called PNG": something_else(image("WEBP", "RGB")),
    "an animation": something_else(
        image("GIF", save_all=True, append_images=[Image.new("L", (8, 8))] * 5)
    ),
    "an animated PNG": something_else(
        image("PNG", save_all=True, append_images=[Image.new("L", (8, 8))] * 5)
    ),
    "CMYK": something_else(image("JPEG", "CMYK")),
    "a palette": something_else(image("PNG", "P")),
    "black and white": something_else(image("PNG", "1")),
    "an alpha channel": something_else(image("PNG", "RGBA")),
    "grey with an alpha channel": something_else(image("PNG", "LA")),
    "32-bit numbers": something_else(image("TIFF", "I")),
    "floats": something_else(image("TIFF", "F")),
    "EXIF of 60 kB of noise": something_else(
        image("JPEG", exif=b"Exif\0\0" + random.Random(1).randbytes(60_000))
    ),
    "EXIF that turns it": something_else(image("JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01"
        b"\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0")),
    "one pixel": something_else(image("PNG", size=(1, 1))),
    "a line of 5,000 pixels": something_else(image("PNG", size=(5000, 1))),
    "more behind its end": lambda b: b + bytes(1000),
}  # fmt: skip


# Tars


def tar(*members: tuple[tarfile.TarInfo, bytes], kind: int = tarfile.GNU_FORMAT) -> Mutation:
    """A valid tar with more members."""

    def change(content: bytes) -> bytes:
        file = io.BytesIO(content)
        with tarfile.open(fileobj=file, mode="a", format=kind) as archive:
            for info, data in members:
                archive.addfile(info, io.BytesIO(data))
        return file.getvalue()

    return change


def member(name: str, data: bytes = b"", **fields: Any) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, data


def bare(name: str, size: int, kind: bytes = tarfile.REGTYPE, data: bytes = b"") -> Mutation:
    """A header of any type and size before a valid tar."""

    def change(content: bytes) -> bytes:
        info = tarfile.TarInfo(name)
        info.type, info.size = kind, size
        padded = data + bytes(-len(data) % tarfile.BLOCKSIZE)
        return info.tobuf(tarfile.GNU_FORMAT) + padded + content

    return change


PIXELS = image("PNG")
LEADING_OUT = ["../../owned/0.png", "/owned/0.png", "0/../../owned/0.png"]
TARS: Mutations = {
    **{f"a file called {name}": tar(member(name, PIXELS)) for name in LEADING_OUT},
    "a name with a newline": tar(member("own\ned/0.png", PIXELS)),
    "a name that steers the terminal": tar(member("\x1b]0;owned\x07/0.png", PIXELS)),
    "a name that is no UTF-8": tar(member("\udcff\udcfe/0.png", PIXELS)),
    "a name of 200 kB": tar(member("x" * 200_000 + "/0.png", PIXELS)),
    "a symbolic link out": tar(member("0/1.png", type=tarfile.SYMTYPE, linkname="/etc/passwd")),
    "a symbolic link up": tar(member("0/1.png", type=tarfile.SYMTYPE, linkname="../../../x")),
    "a hard link out": tar(member("0/1.png", type=tarfile.LNKTYPE, linkname="/etc/passwd")),
    "a hard link to itself": tar(member("0/1.png", type=tarfile.LNKTYPE, linkname="0/1.png")),
    "a folder that is a link": tar(
        member("owned", type=tarfile.SYMTYPE, linkname="/tmp"), member("owned/0.png", PIXELS)
    ),
    "a device": tar(member("0/1.png", type=tarfile.CHRTYPE, devmajor=1, devminor=5)),
    "a disk": tar(member("0/1.png", type=tarfile.BLKTYPE, devmajor=8, devminor=0)),
    "a pipe": tar(member("0/1.png", type=tarfile.FIFOTYPE)),
    "a file of an unknown type": tar(member("0/1.png", type=b"?")),
    "a file twice": tar(member("0/0.png", PIXELS), member("0/0.png", PIXELS)),
    "an image in no class": tar(member("1.png", PIXELS)),
    "an image of nothing": tar(member("0/1.png")),
    "an image of text": tar(member("0/1.png", b"text")),
    "another class": tar(member("owned/0.png", PIXELS)),
    "a tar within": tar(member("0.tar", b"text")),
    "a packed tar within": tar(member("0.tar.gz", b"text")),
    "a file of 8 GB": bare("0/1.png", 2**33 - 1),
    "a file of 8 EB": bare("0/1.png", 2**63 - 1),
    "a file of negative size": bare("0/1.png", -1024),
    "a long name of 8 GB": bare("././@LongLink", 2**33 - 1, tarfile.GNUTYPE_LONGNAME),
    "a long link of 8 EB": bare("././@LongLink", 2**63 - 1, tarfile.GNUTYPE_LONGLINK),
    "an extended header of 8 GB": bare("x", 2**33 - 1, tarfile.XHDTYPE),
    "a global header of 8 GB": bare("x", 2**33 - 1, tarfile.XGLTYPE),
    "an extended header of no length": bare("x", 9, tarfile.XHDTYPE, b"0 path=x\n"),
    "an extended header of a huge length": bare("x", 30, tarfile.XHDTYPE, b"9" * 20 + b" path=x\n"),
    "an extended size": bare("x", 22, tarfile.XHDTYPE, b"22 size=9999999999999\n"),
    "an extended size below zero": bare("x", 12, tarfile.XHDTYPE, b"12 size=-99\n"),
    "an extended size that is text": bare("x", 12, tarfile.XHDTYPE, b"12 size=big\n"),
    "an extended size that is no number": bare("x", 12, tarfile.XHDTYPE, b"12 size=nan\n"),
    "an extended map that is text": bare("x", 23, tarfile.XHDTYPE, b"23 GNU.sparse.map=1,a,\n"),
    "a sparse file": bare("0/1.png", 512, tarfile.GNUTYPE_SPARSE, bytes(512)),
    "a thousand long names in a row": lambda b: (
        bare("././@LongLink", 5, tarfile.GNUTYPE_LONGNAME, b"name")(b"") * 1000 + b
    ),
    "a checksum that is wrong": lambda b: b[:148] + b"0000000\0" + b[156:],
    "a size that is text": lambda b: b[:124] + b"a lot of it\0" + b[136:],
    "two in one": lambda b: b + b,
    "no end": lambda b: b.rstrip(b"\0"),
}

TARS_ALL_THE_SAME: Mutations = {
    "a long name of nothing": bare("././@LongLink", 0, tarfile.GNUTYPE_LONGNAME),
    "no name": tar(member("", PIXELS)),
    "an extended header that is text": bare("x", 9, tarfile.XHDTYPE, b"not at all"),
    "a hidden folder": tar(member("..\\owned/x.png", PIXELS)),
    "hidden files": tar(member("0/._0.png", b"x"), member("__MACOSX/.x/._0.png", b"x")),
    "what is no image": tar(member("0/readme.txt", b"x"), member("../../owned.sh", b"x")),
    "a folder that leads out": tar(member("../../../owned", type=tarfile.DIRTYPE)),
    "names of an extended header": tar(member("0/ünï çødé.png", PIXELS), kind=tarfile.PAX_FORMAT),
    "owners of no system": tar(member("0/1.png", PIXELS, uid=2**31, uname="owned", mode=0o7777)),
    "a time before all times": tar(member("0/1.png", PIXELS, mtime=-(2**40))),
}


def tar_of(files: dict[str, bytes]) -> bytes:
    """A tar written by tarfile."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, content in files.items():
            archive.addfile(*_opened(*member(name, content)))
    return file.getvalue()


def _opened(info: tarfile.TarInfo, data: bytes) -> tuple[tarfile.TarInfo, io.BytesIO]:
    return info, io.BytesIO(data)


SHARDS: Mutations = {
    "a label that is text": tar(member("10.png", PIXELS), member("10.cls", b"cat")),
    "a label of 5,000 digits": tar(member("10.png", PIXELS), member("10.cls", b"9" * 5000)),
    "a label below zero": tar(member("10.png", PIXELS), member("10.cls", b"-1")),
    "a label of a million": tar(member("10.png", PIXELS), member("10.cls", b"999999")),
    "a label of a pickle": tar(member("10.png", PIXELS), member("10.pickle", b"x")),
    "no image": tar(member("10.cls", b"1")),
    "no label": tar(member("10.png", PIXELS)),
    "a sample twice": tar(member("1.png", PIXELS), member("1.cls", b"1")),
    "names that lead out": tar(member("../../owned.png", PIXELS), member("../../owned.cls", b"x")),
}
