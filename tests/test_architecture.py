"""Imports follow the flow of the data and never go back; modules stay small and well named.

Each rule is a function from source text to complaints, applied to hbmeta and to small sources.
"""

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest

import hbmeta

PACKAGE = Path(hbmeta.__file__).resolve().parent

# tasks → model → strategy → posterior → comparison, certificate, diagnosis → plots, command line.
# A module may import those before it, and the other files of its own package.
ORDER = [
    "errors",
    "files",
    "bounds",
    "tasks",
    "triangular",
    "normals",
    "stein",
    "drift",
    "densities",
    "structured",
    "families",
    "scores",
    "classification",
    "locations",
    "sites",
    "batches",
    "program",
    "encoders",
    "inspection",
    "rebuilding",
    "likelihoods",
    "functions",
    "enumeration",
    "products",
    "simplification",
    "rounding",
    "compilation",
    "staging",
    "problem",
    "bounded_loss",
    "simulation",
    "optimisation",
    "models",
    "derivatives",
    "conjugate_gradients",
    "newton",
    "curvature",
    "parametrisation",
    "effects",
    "native",
    "mixing",
    "joint_density",
    "curvatures",
    "damping",
    "modes",
    "nearness",
    "laplace_evidence",
    "crossed_evidence",
    "conditional",
    "mixtures",
    "predictive",
    "oracles",
    "components",
    "labelled",
    "inference_data",
    "posterior",
    "importance",
    "pathfinder",
    "starts",
    "feeding",
    "course",
    "resuming",
    "movement",
    "objective",
    "training",
    "evidence",
    "variational",
    "framing",
    "fitted",
    "chains",
    "inference",
    "loading",
    "standard_errors",
    "theory",
    "tables",
    "distances",
    "rows",
    "records",
    "memory",
    "accounts",
    "costs",
    "scoring",
    "comparison",
    "calibration",
    "certification",
    "diagnostics",
    "diagnosis",
    "styles",
    "drawing",
    "marginals",
    "plots",
    "calibration_plots",
    "certificate_plots",
    "predictive_plots",
    "diagnosis_plots",
    "panels",
    "study",
    "studies",
    "cli",
]

LONGEST = 400
REASON = f"# Over {LONGEST} lines: "

# Reading any of these can run code that a file brings along.
PICKLING_MODULES = {"pickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
PICKLING_CALLS = {"read_pickle", "to_pickle"}
TORCH_FILES = {"load", "save"}


def sources() -> Iterator[tuple[str, str]]:
    """Dotted module name and source of every file of hbmeta; a package by its own name."""
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        yield ".".join(parts), path.read_text(encoding="utf-8")


def runtime_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes, but for the bodies of `if TYPE_CHECKING`, whose imports never run."""
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            for other in child.orelse:
                yield other
                yield from runtime_nodes(other)
        else:
            yield child
            yield from runtime_nodes(child)


def imported(module: str, source: str) -> Iterator[tuple[int, str]]:
    """Line and absolute dotted name of everything that a module imports, also inside functions."""
    for node in runtime_nodes(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = module.split(".")[: -node.level] if node.level else []
            base = ".".join([*start, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def layer(dotted: str) -> str:
    """`hbmeta.tasks.batch.Tasks` → `tasks`; the package itself → ``."""
    parts = dotted.split(".")
    return parts[1] if len(parts) > 1 else ""


def backward_imports(module: str, source: str) -> list[str]:
    own = layer(module)
    if own == "__init__":
        return []
    if own not in ORDER:
        return [f"{module}: place {own!r} in ORDER of tests/test_architecture.py"]
    complaints = []
    for line, name in imported(module, source):
        if name.split(".")[0] != "hbmeta" or name == "hbmeta.__version__":
            continue
        target = layer(name)
        if target not in ORDER:
            reason = f"imports {name}, no module in ORDER of tests/test_architecture.py"
            if not target:
                reason = "imports the package itself, which imports everything"
        elif ORDER.index(target) > ORDER.index(own):
            reason = f"imports {name}, which comes later in the flow of the data"
        else:
            continue
        complaints.append(f"{module}, line {line}: {reason}")
    return complaints


def too_long(module: str, source: str) -> list[str]:
    lines = source.splitlines()
    if len(lines) <= LONGEST or lines[0].startswith(REASON):
        return []
    return [f"{module}: {len(lines)} lines; split it, or begin it with {REASON!r} and the reason"]


def pickling(module: str, source: str) -> list[str]:
    complaints = []
    tree = ast.parse(source)
    for line, name in imported(module, source):
        root, _, last = name.partition(".")
        if root in PICKLING_MODULES or (root == "torch" and last in TORCH_FILES):
            complaints.append(f"{module}, line {line}: imports {name}")
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            of_torch = isinstance(node.value, ast.Name) and node.value.id == "torch"
            if node.attr in PICKLING_CALLS or (of_torch and node.attr in TORCH_FILES):
                complaints.append(f"{module}, line {node.lineno}: uses {ast.unparse(node)}")
        elif isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            allowed = ast.unparse(node.value)
            if allowed != "False":
                complaints.append(f"{module}, line {node.value.lineno}: allow_pickle={allowed}")
    return complaints


# The rules on hbmeta


@pytest.mark.parametrize("rule", [backward_imports, too_long, pickling])
def test_every_module_keeps(rule):
    complaints = [text for module, source in sources() for text in rule(module, source)]
    assert not complaints, "\n" + "\n".join(complaints)


def test_bounds_is_a_leaf():
    """A theorem depends on numbers alone: of hbmeta it imports its own files and the errors."""
    found = {
        layer(name)
        for module, source in sources()
        if layer(module) == "bounds"
        for _, name in imported(module, source)
        if name.split(".")[0] == "hbmeta"
    }
    assert found == {"bounds", "errors"}


def test_no_module_has_the_name_of_a_public_function():
    """Else `import hbmeta.compare` would put a module where `hbmeta.compare(...)` was."""
    modules = {layer(module) for module, _ in sources()}
    public = getattr(hbmeta, "__all__", [])
    clashes = [name for name in public if name in modules and callable(getattr(hbmeta, name))]
    assert not clashes


def test_public_names_exist():
    for module, _ in sources():
        if module.endswith(("__init__", "__main__")):
            module = module.rpartition(".")[0]
        loaded = importlib.import_module(module)
        missing = [name for name in getattr(loaded, "__all__", []) if not hasattr(loaded, name)]
        assert not missing, f"{module}.__all__ names {missing}"


# The rules on small sources


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("hbmeta.tasks.batch", "from hbmeta.errors import DataError"),
        ("hbmeta.tasks.batch", "from hbmeta.tasks.checks import as_values"),
        ("hbmeta.tasks.batch", "from .checks import as_values"),
        ("hbmeta.tasks.__init__", "from hbmeta.tasks.batch import Tasks"),
        ("hbmeta.plots", "from hbmeta import comparison\nimport hbmeta.posterior"),
        ("hbmeta.files", "from hbmeta import __version__"),
        ("hbmeta.tasks.batch", "import torch\nimport hbmetalike.cli"),
        (
            "hbmeta.inference.maml",
            "import typing\nif typing.TYPE_CHECKING:\n    from hbmeta.fitted import Fitted",
        ),
        ("hbmeta.__init__", "from hbmeta.comparison import compare"),
    ],
)
def test_forward_imports_pass(module, source):
    assert backward_imports(module, source) == []


@pytest.mark.parametrize(
    ("module", "source", "complaint"),
    [
        ("hbmeta.tasks.batch", "from hbmeta.program import Sites", "later in the flow"),
        ("hbmeta.tasks.batch", "from ..program import Sites", "later in the flow"),
        ("hbmeta.tasks.batch", "import hbmeta.cli as cli", "later in the flow"),
        ("hbmeta.bounds", "def f():\n    from hbmeta import plots", "line 2"),
        ("hbmeta.bounds", "import hbmeta", "the package itself"),
        ("hbmeta.plots", "from hbmeta import compare", "no module in ORDER"),
        ("hbmeta.helpers", "", "place 'helpers' in ORDER"),
        ("hbmeta.tasks.__init__", "from ..models import Net", "later in the flow"),
        (
            "hbmeta.bounds",
            "if TYPE_CHECKING:\n    import torch\nelse:\n    import hbmeta.cli",
            "line 4",
        ),
    ],
)
def test_backward_imports_are_found(module, source, complaint):
    (found,) = backward_imports(module, source)
    assert complaint in found


def test_long_files_need_a_reason():
    assert too_long("m", "x = 1\n" * LONGEST) == []
    assert too_long("m", "x = 1\n" * (LONGEST + 1))
    assert too_long("m", REASON + "one table\n" + "x = 1\n" * LONGEST) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import torch\ntorch.load('x')",
        "from torch import save",
        "frame.to_pickle('x')",
        "np.load('x', allow_pickle=True)",
    ],
)
def test_pickle_is_found(source):
    assert len(pickling("m", source)) == 1


def test_ordinary_reading_passes():
    assert pickling("m", "import hbmeta\nhbmeta.load('x')\nnp.load('x', allow_pickle=False)") == []
