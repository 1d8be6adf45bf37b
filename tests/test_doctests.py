"""The examples in the docstrings of curriculum/: each public name has one, and all of them run."""

import doctest
import importlib
import pkgutil

import pytest

import curriculum

# Made by others that are shown: build_plan gives Plan, Pass and Stage; Curriculum is made of Segments.
SHOWN_ELSEWHERE = {"PRESETS", "Plan", "Pass", "Stage", "Segment"}
MODULES = [f"curriculum.{module.name}" for module in pkgutil.iter_modules(curriculum.__path__)]


@pytest.mark.parametrize("name", [name for name in MODULES if name != "curriculum.integrations"])
def test_examples_run(name):
    assert doctest.testmod(importlib.import_module(name), verbose=False).failed == 0


@pytest.mark.parametrize("name", sorted(set(curriculum.__all__) - SHOWN_ELSEWHERE))
def test_every_public_name_has_an_example(name):
    assert doctest.DocTestParser().get_examples(getattr(curriculum, name).__doc__), name
