"""The site's pages: the repository's Markdown at its own paths, so that links hold there as they do on GitHub."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("README.md", "TRAINING.md", "EVAL.md", "CONTRIBUTING.md", "CHANGELOG.md")
LIBRARY = "# The library\n\n::: curriculum\n"


def github_anchor(heading, separator="-"):
    """The anchor that GitHub gives a heading: "8. Labels, in a table" -> "8-labels-in-a-table"."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", separator)


def on_config(config):
    config.mdx_configs["toc"]["slugify"] = github_anchor


def on_files(files, config):
    """``files`` are those of docs/, named relative to it: here they get their paths in the repository."""
    from mkdocs.structure.files import File, Files

    docs = [file.src_uri for file in files if (ROOT / "docs" / file.src_uri).is_file()]
    paths = [*PAGES, *(f"docs/{path}" for path in docs if not path.startswith("site/"))]
    pages = [File(path, str(ROOT), config.site_dir, config.use_directory_urls) for path in paths]
    library = File.generated(config, "docs/library.md", content=LIBRARY)
    return Files([*pages, library, *(file for file in files if file.src_uri not in docs)])
