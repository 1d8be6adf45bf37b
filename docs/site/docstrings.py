"""Docstrings of curriculum/ as Markdown: roles become links, doctests code."""

import re

import griffe

EXAMPLE = re.compile(r"^( *)>>> .*(?:\n(?: *\S.*))*", re.M)
ROLE = re.compile(r":(?:class|func|meth):`~?([\w.]+)`")


class Docstrings(griffe.Extension):
    def on_object(self, *, obj, **_):
        if obj.docstring and not obj.is_alias:
            text = EXAMPLE.sub(lambda found: f"```pycon\n{found[0]}\n```", obj.docstring.value)
            obj.docstring.value = ROLE.sub(lambda found: f"[`{found[1]}`][{found[1]}]", text)
