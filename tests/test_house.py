"""The house: which room may import which, how long a file may be, and where the settings object stops."""

import ast
import subprocess
import sys

import pytest
from conftest import ROOT

# From the top down; a room imports rooms of lower floors, and those of its own floor without a circle.
FLOORS = (
    ("main", "scripts"),
    ("commands", "studies"),
    ("training", "dense"),
    ("engine", "datasets"),
    ("inputs", "models"),
    ("config", "utils"),
    ("curriculum",),
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
APART = {("models", "datasets"), ("datasets", "models")}
LONGEST = 350


def room_of(path):
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def source_files():
    listed = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    paths = [ROOT / name for name in listed] or list(ROOT.rglob("*.py"))
    return [path for path in paths if path.exists() and room_of(path) in FLOOR]


def imported_rooms(text, room):
    """Rooms that a module imports, wherever in it: (room, line)."""
    for node in ast.walk(ast.parse(text)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module] if node.level == 0 else [room]
        for name in names:
            if (found := name.split(".")[0]) in FLOOR:
                yield found, node.lineno


def wrong_arrows(files):
    """Lines of ``files`` (path -> text) that import a room above, and rooms of one floor that import each other."""
    wrong, level = [], set()
    for path, text in files.items():
        room = room_of(path)
        for other, line in imported_rooms(text, room):
            if FLOOR[other] < FLOOR[room] or (room, other) in APART:
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {other}")
            elif other != room and FLOOR[other] == FLOOR[room]:
                level.add((room, other))
    return wrong + [f"{a} and {b} import each other" for a, b in level if a < b and (b, a) in level]


@pytest.fixture(scope="module")
def files():
    return {path: path.read_text() for path in source_files()}


def test_arrows_point_down(files):
    assert len(files) > 50
    assert wrong_arrows(files) == []


@pytest.mark.parametrize(
    "place, line",
    [
        ("engine.py", "from training.tasks import Classification"),
        ("curriculum/plan.py", "import utils"),
        ("inputs/folder.py", "from datasets import Source"),
        ("models/reading.py", "def f():\n    from training import resume"),
        ("training/build.py", "import main"),
    ],
)
def test_an_arrow_that_points_up_is_found(files, place, line):
    path = ROOT / place
    assert wrong_arrows({**files, path: files[path] + "\n" + line + "\n"}) != []


def test_nothing_imports_the_command_line(files):
    """main.py is a program, and scripts/ are programs."""
    for path, text in files.items():
        found = {room for room, _ in imported_rooms(text, room_of(path))}
        assert not found & {"main", "scripts"}, path


def test_modules_of_a_room_do_not_import_in_circles(files):
    """Each module alone, in a fresh interpreter per room, in an order in which a circle would show."""
    for room in ("curriculum", "config", "inputs", "models", "training", "commands", "studies"):
        names = [
            ".".join(path.relative_to(ROOT).with_suffix("").parts)
            for path in files
            if room_of(path) == room and path.name != "__init__.py" and "integrations" not in path.parts
        ]
        graph = {name: set() for name in names}
        for name in names:
            tree = ast.parse((ROOT / (name.replace(".", "/") + ".py")).read_text())
            for node in tree.body:
                if isinstance(node, ast.ImportFrom):
                    base = node.module or ""
                    base = f"{room}.{base}" if node.level else base
                    graph[name] |= {base, *(f"{base}.{alias.name}" for alias in node.names)} & graph.keys()
        done = set()
        while graph.keys() - done:
            free = {name for name in graph.keys() - done if graph[name] <= done}
            assert free, f"circle among {sorted(graph.keys() - done)}"
            done |= free


def test_files_are_short(files):
    """But for model definitions, which may be longer."""
    long = {str(path.relative_to(ROOT)): len(text.splitlines()) for path, text in files.items()}
    models = {"models/cswin.py", "models/pvt.py", "models/mae.py"}
    assert {name: lines for name, lines in long.items() if lines > LONGEST and name not in models} == {}


def test_the_engine_knows_no_settings():
    """It does not name Config, and importing it loads no parser."""
    assert "config" not in {room for room, _ in imported_rooms((ROOT / "engine.py").read_text(), "engine")}
    code = "import sys, engine; print([name for name in sys.modules if name.split('.')[0] == 'jsonargparse'])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
