"""What an archive holds: its images, and the label that each has by its side files, its folder or nothing.

In WebDataset's convention files belong together whose names are equal up to the first dot of the base name: the image
``0001.input.jpg`` has the side files ``0001.cls`` and ``0001.json``.
"""

import json
import posixpath
import tarfile
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from inputs.archive import LIMIT, open_archive
from inputs.formats import ENDINGS, HEAD, ending, hidden, image_format, readable, why_left_out
from inputs.shards import Shards

LABEL_SIDES = (".cls", ".json", ".txt")  # side files that may hold a label, the surest first
LONGEST = 200  # characters of a label in a .cls or .txt: more is a caption


@dataclass
class Member:
    """An image of an archive: where it lies, its name, and its label as its side files state it (None: they do not)."""

    offset: int
    size: int
    name: str
    stated: str | list[str] | None = None
    by_text: bool = False  # whether a .txt states it, which may be a caption
    sides: tuple[str, ...] = ()

    @property
    def folder(self) -> str:
        """The folder that it lies in, inside the archive."""
        return posixpath.basename(posixpath.dirname(self.name))


@dataclass
class Scan:
    """The images of one archive in order, what was skipped by kind, and the keys of .json side files."""

    members: list[Member] = field(default_factory=list)
    left_out: Counter = field(default_factory=Counter)
    json_keys: set[str] = field(default_factory=set)


def key_of(name: str) -> str:
    """What the files of one sample have in common: the path up to the first dot of the base name."""
    folder, base = posixpath.split(name)
    return posixpath.join(folder, base.split(".", 1)[0])


def scan(source: Shards, k: int, label_key: str = "label", flat: bool = False) -> Scan:
    """Lists archive ``k`` as far as it can be read.

    Hard and symbolic links to members of the archive are those members under another name.

    Args:
        label_key: of the label in a .json side file.
        flat: labels are written elsewhere: side files are not looked at.

    Raises:
        ValueError: it is no tar archive, or a side file is no text or JSON. Unreachable: at a URL that does not answer.
    """
    result, texts, links, path = Scan(), {}, [], source.name(k)
    try:
        with source.open(k) as file, open_archive(file) as archive:
            try:
                for member in archive:
                    _sort_in(archive, member, result, texts, links)
                    archive.members = []  # else it keeps an object per member
            except tarfile.ReadError:
                pass  # cut short: what lies beyond is missing, and the last image is found bad when it is read
    except (tarfile.TarError, OSError) as error:
        raise ValueError(f"--data_path: {path} cannot be read as a tar archive: {error}") from error
    if links:
        _follow(links, result, texts)
    if flat:
        result.left_out.update(map(ending, texts))
        return result
    sides: dict[str, dict[str, bytes]] = {}
    for name, content in texts.items():
        key = key_of(name)
        sides.setdefault(key, {})[name[len(key) :].lower()] = content
    with_image = {key_of(member.name) for member in result.members} if sides else set()
    for member in result.members:
        own = sides.get(key_of(member.name), {})
        member.sides = tuple(sorted(own))
        if own:
            member.stated, member.by_text = _stated(path, own, label_key, result)
    for name in texts:
        if key_of(name) not in with_image or not name.lower().endswith(LABEL_SIDES):
            result.left_out[ending(name)] += 1
    return result


def _sort_in(archive: tarfile.TarFile, member: tarfile.TarInfo, result: Scan, texts: dict, links: list) -> None:
    name = member.name = posixpath.normpath(member.name)
    if member.isdir() or any(hidden(part) for part in name.split("/")):
        return
    if member.islnk() or member.issym():
        links.append(member)
        return
    kind = ending(name)
    if not member.isreg() or member.issparse():
        result.left_out["special file"] += 1
        return
    format = None
    if kind not in ENDINGS:
        format = image_format(archive.extractfile(member).read(HEAD))
    if kind in ENDINGS or format in readable():
        result.members.append(Member(member.offset_data, member.size, name))
    elif format is None:
        # Only what may state a label is kept; of the others that they are there.
        stated = kind in LABEL_SIDES and member.size <= LIMIT
        texts[name] = archive.extractfile(member).read() if stated else b""
    else:
        result.left_out[why_left_out(kind, format)] += 1


def _follow(links: list[tarfile.TarInfo], result: Scan, texts: dict[str, bytes]) -> None:
    """Adds the links to images and side files of this archive, whichever of the two comes first in it."""
    images = {member.name: member for member in result.members}
    waiting = links
    while waiting:
        later = []
        for link in waiting:
            target = posixpath.join(posixpath.dirname(link.name), link.linkname) if link.issym() else link.linkname
            target = posixpath.normpath(target)
            if target in images:
                images[link.name] = Member(images[target].offset, images[target].size, link.name)
                result.members.append(images[link.name])
            elif target in texts:
                texts[link.name] = texts[target]
            else:
                later.append(link)
        if len(later) == len(waiting):
            result.left_out["broken link"] += len(later)
            return
        waiting = later


def _stated(path: str, own: dict[str, bytes], label_key: str, result: Scan) -> tuple[str | list[str] | None, bool]:
    """The label that the side files of one image state (None: none does), and whether a .txt does."""
    for kind in LABEL_SIDES:
        match = next((side for side in own if side == kind or side.endswith(kind)), None)
        if match is None:
            continue
        try:
            text = own[match].decode().strip()
            if kind == ".json":
                content = json.loads(text)
                content = content if isinstance(content, dict) else {}
                result.json_keys.update(content)
                if label_key in content and (label := label_text(content[label_key])) is not None:
                    return label, False
            elif kind == ".cls" or ".json" not in own:  # beside a .json, a .txt is img2dataset's caption
                return (text if text and len(text) <= LONGEST and "\n" not in text else None), kind == ".txt"
        except (ValueError, RecursionError) as error:
            raise ValueError(f"--data_path: {path}: a side file {match} cannot be read: {error}") from None
    return None, False


def label_text(value: Any) -> str | list[str] | None:
    """A label of JSON or a table as text, or several as a list; None for what is no label: null, a fraction, a mapping.

    Whole numbers are written alike whatever their type: 3 and 3.0 are the class "3".
    """
    if isinstance(value, list | tuple):
        texts = [label_text(item) for item in value]
        return None if any(not isinstance(text, str) for text in texts) else texts
    if isinstance(value, bool) or value is None:
        return None if value is None else str(int(value))
    if isinstance(value, float):
        return str(int(value)) if value == value and abs(value) < 2**53 and value == int(value) else None
    if isinstance(value, int):
        return str(value)
    return (value.strip() or None) if isinstance(value, str) else None
