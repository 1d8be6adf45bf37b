"""URLs among the settings: what is one, that none carries credentials, and that none reaches a message."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import urlsplit

from config.usage import UsageError


def is_url(path: str | Path | None) -> bool:
    return isinstance(path, str) and re.match(r"[A-Za-z][A-Za-z0-9+.:-]*://", path) is not None


def check_url(url: str, setting: str) -> None:
    """Raises UsageError for a URL that carries credentials (they would be kept in config.yaml and checkpoints)."""
    parts = urlsplit(url)
    if "@" in parts.netloc or "?" in url or "#" in url:
        raise UsageError(
            f"--{setting} {redact(url)}: a URL with a user's name, a password, a query or a fragment would be kept in "
            "config.yaml and checkpoints; leave them out and give credentials where the file system looks for them "
            "(for s3 the AWS_* variables or ~/.aws, for gs gcloud's, for hf HF_TOKEN)"
        )
    if "::" in url:
        raise UsageError(f"--{setting} {url}: chained URLs are not read; name the file system that holds the shards")


def redact(text: str) -> str:
    """A text without what could be credentials in its URLs: user:password@, a query and a fragment."""
    text = re.sub(r"([A-Za-z][A-Za-z0-9+.-]*://)[^\s/'\"]*@", r"\1***@", text)
    return re.sub(r"([A-Za-z][A-Za-z0-9+.-]*://[^\s?#'\"]*)([?#])[^\s'\"]+", r"\1\2***", text)
