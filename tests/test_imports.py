"""The directions of import: a file imports only from lower floors, or from one named before it on its own."""

import ast
import graphlib
import importlib
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "src" / "nextscale"

# From the ground up. "x.*" is the wing x with all that is in it, free inside but for circles. A new file at
# the root, or a new wing, has to be placed here, deliberately. CONTRIBUTING.md points here.
FLOORS = (
    ("base.*",),
    ("policy", "grpo", "models.*"),
    ("runs.*", "report.*"),
    ("prompts", "asked", "sampling", "drawing", "rescoring", "rewards.*", "pipeline"),
    (
        "reference",
        "losses",
        "objective",
        "advantages",
        "controllers",
        "tuning",
        "optimizer",
        "rollout",
        "contributions",
        "credit",
        "evaluation",
        "fid",
        "measured",
    ),
    ("toy.*", "options", "learner", "collector", "crediting", "evaluator", "callbacks", "saver", "trainer"),
    ("plan.*",),
    ("config.*", "recipes.*"),
    ("study.*",),
    ("__init__",),
    ("studio.*", "cli.*"),
    ("__main__",),
)
# The public names are gathered here, from wherever they are.
FREE = "__init__"
TYPES_ONLY = ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def place(module: str) -> tuple[int, int] | None:
    """(floor, position on it) of a module such as "models.var"; None when the table does not know it."""
    for floor, rooms in enumerate(FLOORS):
        for position, room in enumerate(rooms):
            if module == room or (room.endswith(".*") and module.startswith(room[:-1])):
                return floor, position
    return None


def runtime_imports(node: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """All import statements below `node`, inside functions too, but not those for type checkers only."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child
        elif isinstance(child, ast.If) and ast.unparse(child.test) in TYPES_ONLY:
            for other in child.orelse:
                yield from runtime_imports(ast.Module([other], []))
        else:
            yield from runtime_imports(child)


def imported_names(module: str, source: str, package: str) -> Iterator[str]:
    """What a module imports from its own package, as paths below it: "models.var.VAR", or "" for the top."""
    for node in runtime_imports(ast.parse(source)):
        if isinstance(node, ast.Import):
            paths = [alias.name for alias in node.names]
        elif node.level == 0:
            paths = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            parents = [package, *module.split(".")[:-1]]
            base = [*parents[: len(parents) - node.level + 1], *filter(None, [node.module])]
            paths = [".".join([*base, alias.name]) for alias in node.names]
        for path in paths:
            if path == package or path.startswith(f"{package}."):
                yield path[len(package) + 1 :]


def resolve(name: str, modules: set[str]) -> str:
    """The module that holds an imported name: the longest beginning of it that is a file."""
    parts = name.split(".") if name else []
    for end in range(len(parts), -1, -1):
        for candidate in (".".join(parts[:end]), ".".join([*parts[:end], "__init__"])):
            if candidate in modules:
                return candidate
    return name


def read_imports(package: Path) -> dict[str, set[str]]:
    """Each module of the package with the modules of the package that it imports."""
    paths = package.rglob("*.py")
    files = {".".join(path.relative_to(package).with_suffix("").parts): path for path in paths}
    return {
        module: {resolve(name, set(files)) for name in imported_names(module, path.read_text(), package.name)}
        for module, path in files.items()
    }


def faults(package: Path) -> list[str]:
    """One line for each unplaced file, import that runs upward, and (the first) circle."""
    imports = read_imports(package)
    found = [f"{module} has no place in FLOORS" for module in sorted(imports) if place(module) is None]
    for module, targets in sorted(imports.items()):
        for target in sorted(targets):
            here, there = place(module), place(target)
            if target not in imports:
                found.append(f"{module} imports {target}, which does not exist")
            elif module != FREE and here and there and there > here:
                found.append(f"{module} imports {target}, which stands above it")
    try:
        graphlib.TopologicalSorter(imports).prepare()
    except graphlib.CycleError as error:
        found.append("circle: " + " imports ".join(reversed(error.args[1])))
    return found


def write_package(folder: Path, files: dict[str, str]) -> Path:
    """A tiny tree named nextscale, with an empty __init__ wherever none is given."""
    package = folder / "nextscale"
    for name, source in files.items():
        path = package / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    for inner in [package, *(path for path in package.rglob("*") if path.is_dir())]:
        (inner / "__init__.py").touch()
    return package


def test_no_import_runs_upward_or_in_a_circle():
    assert len(read_imports(PACKAGE)) > 10
    assert faults(PACKAGE) == []


def test_checker_accepts_downward_sideways_and_outside_imports(tmp_path):
    package = write_package(
        tmp_path,
        {
            "__init__.py": "from nextscale.trainer import T\nfrom nextscale import rewards",
            "base/errors.py": "import json\nimport nextscaled",
            "models/scales.py": "",
            "models/var.py": "from nextscale.models import scales\nfrom ..base.errors import E",
            "models/vqvae.py": "from . import scales",
            "rewards/clip.py": "import nextscale.models.var as var",
            "trainer.py": "def f():\n    from .rewards.clip import C",
            "cli/main.py": "from nextscale import __version__, trainer",
        },
    )
    assert faults(package) == []
    assert read_imports(package)["models.var"] == {"models.scales", "base.errors"}
    assert read_imports(package)["models.vqvae"] == {"models.scales"}
    assert read_imports(package)["cli.main"] == {"__init__", "trainer"}


def test_checker_finds_an_upward_import_however_it_is_written(tmp_path):
    package = write_package(
        tmp_path,
        {
            "trainer.py": "",
            "pipeline.py": "",
            "sampling.py": "from nextscale.pipeline import P",
            "policy.py": "def f():\n    if True:\n        import nextscale.trainer",
            "models/scales.py": "from .. import trainer",
            "base/records.py": "from nextscale import VARPipeline",
        },
    )
    assert faults(package) == [
        "base.records imports __init__, which stands above it",
        "models.scales imports trainer, which stands above it",
        "policy imports trainer, which stands above it",
        "sampling imports pipeline, which stands above it",
    ]


def test_checker_finds_a_circle_inside_a_room(tmp_path):
    files = {
        "rewards/a.py": "from nextscale.rewards.b import B",
        "rewards/b.py": "from nextscale.rewards import c",
        "rewards/c.py": "from .a import A",
    }
    (found,) = faults(write_package(tmp_path, files))
    assert found.startswith("circle: ")
    for edge in ("rewards.a imports rewards.b", "rewards.b imports rewards.c", "rewards.c imports rewards.a"):
        assert edge in found + found[found.index(" imports ") :]  # twice around, wherever the circle begins


def test_checker_finds_a_circle_through_the_top(tmp_path):
    package = write_package(
        tmp_path, {"__init__.py": "from nextscale.cli.main import M", "cli/main.py": "import nextscale"}
    )
    assert len(faults(package)) == 1
    assert "circle" in faults(package)[0]


def test_checker_exempts_imports_for_type_checkers_only(tmp_path):
    source = "if TYPE_CHECKING:\n    from nextscale.trainer import T\nelse:\n    {}"
    package = write_package(tmp_path, {"trainer.py": "", "policy.py": source.format("T = object")})
    assert faults(package) == []
    package = write_package(tmp_path, {"policy.py": source.format("import nextscale.trainer")})
    assert faults(package) == ["policy imports trainer, which stands above it"]


def test_checker_wants_every_file_placed_and_every_import_to_exist(tmp_path):
    package = write_package(tmp_path, {"novelty.py": "", "trainer.py": "from nextscale.gone import G"})
    (package / "__init__.py").unlink()
    assert faults(package) == [
        "novelty has no place in FLOORS",
        "trainer imports gone.G, which does not exist",
    ]
    package = write_package(tmp_path, {"wing/novelty.py": ""})
    assert "wing.novelty has no place in FLOORS" in faults(package)


def test_scripts_beside_the_package_import_what_is_there() -> None:
    """Nothing else runs most of them, for hours as they take."""
    root = PACKAGE.parents[1]
    folders = ("benchmarks", "drills", "examples")
    scripts = sorted(path for each in folders for path in (root / each).rglob("*.py"))
    missing = []
    for path in scripts:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("nextscale"):
                module = importlib.import_module(str(node.module))
                names = [alias.name for alias in node.names if not hasattr(module, alias.name)]
                missing += [f"{path.relative_to(root)}: {node.module}.{name}" for name in names]
    assert len(scripts) > 15 and not missing
