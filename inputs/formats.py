"""What is an image: by its content, whatever its name says; and which formats this machine's Pillow reads."""

import fnmatch
import importlib
import os
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from functools import cache

from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS

# Files so named are taken for images unseen: of 13 million none need be opened. What is none shows when it is read.
ENDINGS = frozenset(IMG_EXTENSIONS) | {".gif", ".jfif", ".jpe"}
HEAD = 32  # bytes that tell a format

_MAGIC = (
    ("JPEG", 0, b"\xff\xd8\xff"),
    ("PNG", 0, b"\x89PNG\r\n\x1a\n"),
    ("GIF", 0, b"GIF87a"),
    ("GIF", 0, b"GIF89a"),
    ("WEBP", 8, b"WEBP"),
    ("TIFF", 0, b"II*\0"),
    ("TIFF", 0, b"MM\0*"),
    ("TIFF", 0, b"II+\0"),
    ("JPEG2000", 0, b"\0\0\0\x0cjP  \r\n\x87\n"),
    ("JPEG2000", 0, b"\xff\x4f\xff\x51"),
    ("AVIF", 4, b"ftypavif"),
    ("AVIF", 4, b"ftypavis"),
    ("HEIF", 4, b"ftyphei"),
    ("HEIF", 4, b"ftypmif1"),
    ("JXL", 0, b"\xff\x0a"),
    ("JXL", 0, b"\0\0\0\x0cJXL \r\n\x87\n"),
    ("PSD", 0, b"8BPS\0\x01"),
    ("QOI", 0, b"qoif"),
)
# Formats that need a package of their own: module, function that registers it (None: importing does), package.
_PLUGINS = {
    "JXL": ("pillow_jxl", None, "pillow-jxl-plugin"),
    "HEIF": ("pillow_heif", "register_heif_opener", "pillow-heif"),
}
_TITLES = {"JXL": "JPEG XL", "JPEG2000": "JPEG 2000"}


def image_format(head: bytes) -> str | None:
    """Pillow's name of an image's format, by its first `HEAD` bytes; None for what is no image."""
    for name, place, magic in _MAGIC:
        if head[place : place + len(magic)] == magic:
            return name if name != "WEBP" or head[:4] == b"RIFF" else None
    if head[:2] == b"BM" and int.from_bytes(head[14:18], "little") in (12, 40, 52, 56, 64, 108, 124):
        return "BMP"
    if (
        len(head) > 3
        and head[:1] == b"P"
        and head[1:2] in b"123456"
        and head[2:3] in b" \t\r\n"
        and head[3:4].isalnum()
    ):
        return "PPM"
    return None


@cache
def readable() -> frozenset[str]:
    """The formats that can be read here. Registers those that packages beside Pillow read."""
    for module, register, _ in _PLUGINS.values():
        with suppress(ImportError):
            imported = importlib.import_module(module)
            if register:
                getattr(imported, register)()
    Image.init()
    return frozenset(Image.OPEN)


def sniff(path: str) -> str | None:
    """Format of the file at ``path``, None if it is no image or cannot be read."""
    try:
        with open(path, "rb", buffering=0) as file:
            return image_format(file.read(HEAD))
    except OSError:
        return None


def ending(name: str) -> str:
    """``.jpg`` of ``photo.JPG``; ``no ending`` of a name without one."""
    place = name.rfind(".")
    return name[place:].lower() if place > name.rfind(os.sep) + 1 else "no ending"


def hidden(name: str) -> bool:
    """Whether a file or folder of this name is no part of a data set: .name, and what macOS adds to archives."""
    return name.startswith(".") or name == "__MACOSX"


def listed(counts: dict[str, int]) -> str:
    """``25 .jfif, 3 .txt`` of counts by kind, most first."""
    return ", ".join(f"{count:,} {kind}" for kind, count in sorted(counts.items(), key=lambda item: -item[1]))


def why_left_out(kind: str, format: str | None) -> str:
    """What a summary calls a file that is not read: its ending, and what would read it."""
    if format is None:
        return kind
    package = _PLUGINS.get(format, (None, None, None))[2]
    return f"{kind} ({_TITLES.get(format, format)}: " + (f"pip install {package})" if package else "not readable here)")


def unread(names: Iterable[str], pattern: str) -> Counter:
    """Files beside shards, which are not read, by kind: those of another ending than the pattern's."""
    like = "*" + os.path.splitext(pattern)[1]
    others = (name for name in names if not fnmatch.fnmatchcase(name, like) and not hidden(name))
    return Counter(f"{ending(name)} beside the shards" for name in others)
