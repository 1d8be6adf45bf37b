"""Links of the documentation: files and anchors, as GitHub has them, and the site that mkdocs makes of it."""

import importlib.util
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT

PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
LINK = re.compile(r"\[[^\[\]]*\]\(([^()\s]+)\)")


def load_hooks():
    spec = importlib.util.spec_from_file_location("site_hooks", ROOT / "docs/site/hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


hooks = load_hooks()


def prose(text):
    """Without fenced and inline code."""
    return re.sub(r"`[^`\n]*`", "`code`", re.sub(r"^ *```.*?^ *```$", "", text, flags=re.S | re.M))


def anchors(text):
    """Of each heading; the second of one name ends in -1, as on GitHub."""
    found = []
    fenced = re.sub(r"^ *```.*?^ *```$", "", text, flags=re.S | re.M)
    for heading in re.findall(r"^#+ (.+)$", fenced, re.M):
        name = hooks.github_anchor(heading)
        found.append(name if name not in found else f"{name}-{found.count(name)}")
    return set(found)


def broken(page, text):
    """Links of ``text``, a page at the path ``page``, that lead nowhere in the repository."""
    wrong = []
    for target in LINK.findall(prose(text)):
        path, _, anchor = target.partition("#")
        if "://" in target:
            continue
        file = (page.parent / path).resolve() if path else page
        if (
            not file.is_relative_to(ROOT)
            or not file.exists()
            or (anchor and anchor not in anchors(text if file == page else file.read_text()))
        ):
            wrong.append(target)
    return wrong


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    assert broken(page, page.read_text()) == []


@pytest.mark.parametrize(
    "link",
    [
        "[a](nowhere.md)",
        "[a](#nowhere)",
        "[two\nlines](../nowhere.md)",
        "![a](figures/none.png)",
        "[a](../README.md#nowhere)",
        "[a](../../outside)",
        "[`code`](own_loop.md#nowhere)",
    ],
)
def test_a_link_to_nowhere_is_found(link):
    page = ROOT / "docs/method.md"
    assert len(broken(page, f"{page.read_text()}\n{link}\n")) == 1


def test_pages_link():
    """The pattern finds them: README leads to every page for readers."""
    linked = {target.partition("#")[0] for target in LINK.findall(prose((ROOT / "README.md").read_text()))}
    assert linked >= {"TRAINING.md", "EVAL.md", "CONTRIBUTING.md", "docs/tutorial.md", "docs/own_loop.md"}


@pytest.mark.parametrize(
    "heading, anchor",
    [
        ("What happens when ...", "what-happens-when-"),
        ("timm's train.py", "timms-trainpy"),
        ("Self-supervised: masked autoencoders", "self-supervised-masked-autoencoders"),
        ("A `--flag` of two_words", "a---flag-of-two_words"),
    ],
)
def test_anchors_are_github_s(heading, anchor):
    assert hooks.github_anchor(heading) == anchor


def build(target):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(target)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_the_site_builds_without_a_warning(tmp_path):
    """mkdocs looks at every link, anchor and page left out of the navigation; nothing is fetched from elsewhere."""
    for name in ("mkdocs", "material", "mkdocstrings_handlers.python"):
        pytest.importorskip(name)
    done = build(tmp_path / "site")
    assert done.returncode == 0, done.stderr
    import curriculum

    library = (tmp_path / "site/docs/library/index.html").read_text()
    missing = [name for name in curriculum.__all__ if f'id="curriculum.{name}"' not in library]
    assert set(missing) <= {"Epoch", "PRESETS"}, missing  # another name of Pass, and a mapping without a docstring
    assert ":func:" not in library and "&gt;&gt;&gt;" in library
    pages = {path.relative_to(ROOT).with_suffix("").as_posix() for path in PAGES}
    built = {path.parent.relative_to(tmp_path / "site").as_posix() for path in tmp_path.rglob("index.html")}
    assert built == pages - {"README"} | {".", "docs/library"}
    loaded = re.findall(r'<(?:script|link rel="stylesheet"|img)[^>]+(?:src|href)="(https?:[^"]+)', library)
    assert loaded == []
