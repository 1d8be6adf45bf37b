"""Weight files by URL: kept in torch.hub's folder, and fetched anew when they have changed at their source."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import urllib.error
import urllib.request
from email.message import Message
from pathlib import Path
from urllib.parse import urlparse

import torch

TIMEOUT = 30.0  # seconds that a server may stay silent
STAMPS = ("ETag", "Last-Modified", "Content-Length")  # by which a changed file is noticed


def download(url: str) -> Path:
    """The local copy of a file, downloaded unless there is one and the server's file is still the same.

    A copy is kept under the URL's digest, so that neither the name's form nor another file of that name matters. Where
    the server does not answer, the copy is used, with a warning.

    Raises:
        OSError: it cannot be had, or came incomplete.
    """
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    name = Path(urlparse(url).path).name or "weights"
    path = folder / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-{name[-100:]}"
    about = path.with_name(path.name + ".json")
    known = _known(about) if path.is_file() else None
    if known is not None:
        try:
            with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=TIMEOUT) as answer:
                now = _stamps(answer.headers)
        except urllib.error.HTTPError as error:
            if error.code not in (403, 405, 501):  # of a server that answers no such question
                raise
            return path
        except OSError as error:
            print(f"warning: {url} does not answer ({_reason(error)}); the copy of before is used", flush=True)
            return path
        if now == known:
            return path
        print(f"{url} has changed since it was downloaded: downloading it anew", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    with urllib.request.urlopen(url, timeout=TIMEOUT) as answer:
        stamps = _stamps(answer.headers)
        with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
            try:
                while block := answer.read(1 << 20):
                    file.write(block)
                length = stamps.get("Content-Length")
                if length is not None and file.tell() != int(length):
                    raise OSError(f"{file.tell()} of {length} bytes came")
                file.close()
                os.replace(file.name, path)
            except BaseException:
                os.unlink(file.name)
                raise
    temporary = about.with_name(f"{about.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(stamps), encoding="utf-8")
    os.replace(temporary, about)
    return path


def _stamps(headers: Message) -> dict[str, str]:
    return {name: headers[name] for name in STAMPS if headers[name] is not None}


def _known(about: Path) -> dict[str, str] | None:
    """The stamps of the copy; None: unknown, so it is not to be trusted."""
    try:
        return json.loads(about.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _reason(error: OSError) -> str:
    return str(getattr(error, "reason", error)).strip() or type(error).__name__
