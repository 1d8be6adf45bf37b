"""Read a weight file from a path, a URL or the Hugging Face hub without running anything that is in it."""

from __future__ import annotations

import argparse
import codecs
import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub
import safetensors.torch
import torch
from huggingface_hub.utils import EntryNotFoundError
from timm.models._hub import HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME, hf_split

from config.files import open_file
from models import checkpoints

from .download import download


class _Inert:
    """Stands for a NumPy scalar or its type: swallows what the file says about it and does nothing.

    Files of the EfficientTrain release hold NumPy scalars in their optimizer's groups, beside weights that hold none.
    So that these files can be read, the three names that NumPy scalars are pickled under are mapped to this class;
    NumPy itself is not called.
    """

    def __init__(self, *arguments):
        pass

    def __setstate__(self, state):
        pass


def _named(full_name: str) -> type:
    """An inert class under another name: the name is how torch finds what a file may ask for."""
    module, _, name = full_name.rpartition(".")
    return type(name, (_Inert,), {"__module__": module, "__qualname__": name})


# Beyond tensors and plain Python values a file may hold these, and nothing else.
_ALLOWED = [
    argparse.Namespace,
    *(set, codecs.encode),  # plain Python values, and how they hold bytes: not to torch 2.4
    _named("numpy.dtype"),
    _named("numpy.core.multiarray.scalar"),
    _named("numpy._core.multiarray.scalar"),
]


def read_weights(source: str | Path) -> dict[str, Any]:
    """Return the content of a weight file: tensors by name, or a dictionary that holds such, as its writer left it.

    Args:
        source: a path, a URL (kept in torch.hub's cache), `hf_hub:owner/name`, `hf_hub:owner/name/file` or
            `timm/name`. Whether it is a PyTorch or a safetensors file is seen from its first bytes.

    Raises:
        ValueError: it cannot be had, is damaged, is neither, or asks for more than tensors, plain Python values and an
            argparse.Namespace. Checkpoints of this project are verified by their checksum.
    """
    path = _fetch(str(source))
    try:
        with open_file(path) as file:
            start = file.read(9)
            if start[:2] == b"PK":
                checkpoints.check_archive(file)
    except OSError as error:
        raise ValueError(f"{source}: cannot be read ({error.strerror})") from None
    except checkpoints.BadCheckpoint as error:
        raise ValueError(f"{source}: {error}") from None
    except Exception as error:  # zipfile's own, where a directory of members is damaged
        raise ValueError(f"{source}: damaged or cut short ({_first_line(error)})") from None
    if start[:2] == b"PK" or start[:1] == b"\x80":
        content = _load_torch(path, str(source))
    elif start[8:] == b"{":
        content = _load_safetensors(path, str(source))
    else:
        raise ValueError(f"{source}: neither a PyTorch nor a safetensors file")
    if not isinstance(content, dict):
        raise ValueError(f"{source}: holds a {type(content).__name__}, not tensors by name")
    return checkpoints.load(path) if "format_version" in content else content


def class_names(content: dict[str, Any]) -> list[str] | None:
    """Names of a model's outputs as its weight file states them, in their order; None if it does not.

    Ours have them under ``classes``, mmdetection's and mmsegmentation's among what they say of the data set.
    """
    about = content.get("meta")
    about = about if isinstance(about, dict) else {}
    set_of = about.get("dataset_meta")
    set_of = set_of if isinstance(set_of, dict) else {}
    for names in (content.get("classes"), about.get("CLASSES"), set_of.get("classes"), set_of.get("CLASSES")):
        if isinstance(names, list | tuple) and names and all(isinstance(name, str) for name in names):
            return list(names)
    return None


def _fetch(source: str) -> Path:
    """The local path of a source, downloaded first where it is elsewhere."""
    try:
        if re.match(r"hf[_-]hub:", source):
            return Path(_fetch_from_hub(source.partition(":")[2]))
        if re.match(r"[a-z]{2,}://", source):
            return download(source)
        if source.startswith("timm/") and not Path(source).exists():
            return Path(_fetch_from_hub(source))
    except Exception as error:  # each library has its own for a lost connection, a wrong name, a bad hash
        raise ValueError(f"{source}: cannot be downloaded ({_first_line(error)})") from None
    return Path(source)


def _fetch_from_hub(name: str) -> str:
    name, revision = hf_split(name)
    owner, repository, *file = name.split("/", 2)
    for candidate in file or [HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME]:
        try:
            return huggingface_hub.hf_hub_download(f"{owner}/{repository}", candidate, revision=revision)
        except EntryNotFoundError as error:
            missing = error
    raise missing


def _load_torch(path: Path, source: str) -> Any:
    with _allowing(_ALLOWED), open_file(path) as file:  # by a path's suffix torch would choose another format
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            name = _unsafe_name(path, str(error)) or "something that no weight file needs"
            raise ValueError(
                f"{source}: refused, it asks for {name}; only tensors, plain Python values and argparse.Namespace "
                "are read, because anything else could run code"
            ) from None
        except Exception as error:  # what a damaged file raises depends on where it was hit
            raise ValueError(f"{source}: damaged or cut short ({_first_line(error)})") from None


def _unsafe_name(path: Path, message: str) -> str | None:
    """What the file asked for and must not have: read without loading, or from the unpickler's message."""
    if hasattr(torch.serialization, "get_unsafe_globals_in_checkpoint"):
        try:
            if names := torch.serialization.get_unsafe_globals_in_checkpoint(path):
                return ", ".join(sorted(names))
        except Exception:  # not an archive that can be listed
            pass
    match = re.search(r"GLOBAL (\S+)|unrecognized function (.+)|but got (.+)", message)
    return next(filter(None, match.groups())).rstrip(".") if match else None


def _load_safetensors(path: Path, source: str) -> dict[str, torch.Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except Exception as error:
        raise ValueError(f"{source}: damaged or cut short ({_first_line(error)})") from None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def _allowing(types: list[type]) -> Iterator[None]:
    """torch.serialization.safe_globals, which torch 2.4 does not have."""
    if hasattr(torch.serialization, "safe_globals"):
        with torch.serialization.safe_globals(types):
            yield
        return
    before = torch.serialization.get_safe_globals()
    torch.serialization.add_safe_globals(types)
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)
