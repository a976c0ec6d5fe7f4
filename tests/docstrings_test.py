"""What ruff cannot see of public docstrings: examples of losses and metrics, and the errors that a function raises."""

import ast
import doctest
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "mmei_jax"
MODULES = [path for path in sorted(PACKAGE.rglob("*.py")) if path.name != "__init__.py"]
# Modules of losses and metrics by another name.
OTHER_MEASURES = {"mergeable", "aigc_int_figures"}
MEASURES = [path for path in MODULES if path.stem.endswith(("losses", "metrics")) or path.stem in OTHER_MEASURES]


def _name(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def _public(body: list[ast.stmt]) -> list[ast.FunctionDef | ast.ClassDef]:
    return [node for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")]


def _lacking_examples(tree: ast.Module) -> list[str]:
    """Public functions and classes whose docstring has no statement with an expected result."""
    parser = doctest.DocTestParser()
    return [
        node.name
        for node in _public(tree.body)
        if not any(example.want for example in parser.get_examples(ast.get_docstring(node) or ""))
    ]


def _raised(node: ast.AST) -> list[str]:
    """Names of the exceptions that a function raises itself; not those of functions within it."""
    names = []
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Raise) and child.exc is not None:
            error = child.exc.func if isinstance(child.exc, ast.Call) else child.exc
            names.append(ast.unparse(error))
        if not isinstance(child, ast.FunctionDef | ast.Lambda):
            names += _raised(child)
    return names


def _untold_errors(tree: ast.Module) -> list[str]:
    """Public functions and methods that raise what their docstring does not name.

    A docstring that begins with "See" says that it is told elsewhere.
    """
    classes = [node for node in _public(tree.body) if isinstance(node, ast.ClassDef)]
    found = []
    for node in [*_public(tree.body), *(method for owner in classes for method in _public(owner.body))]:
        text = ast.get_docstring(node) or ""
        if isinstance(node, ast.FunctionDef) and not text.startswith("See "):
            found += [f"{node.name}: {name}" for name in _raised(node) if name not in text]
    return found


def test_losses_and_metrics_are_found():
    assert {"losses.py", "ranking_losses.py", "recognition_losses.py", "metrics.py", "recognition_metrics.py"} <= {
        _name(path) for path in MEASURES
    }


@pytest.mark.parametrize("path", MEASURES, ids=_name)
def test_every_public_loss_and_metric_has_a_runnable_example(path):
    assert not _lacking_examples(_tree(path))


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_docstrings_name_the_errors_that_are_raised(path):
    assert not _untold_errors(_tree(path))


def test_a_missing_example_and_an_untold_error_are_noticed():
    tree = ast.parse(
        'def loss(x):\n    """A loss.\n\n    >>> y = 1\n    """\n    raise ValueError("no")\n'
        'def other(x):\n    """Raises ValueError always.\n\n    >>> 1\n    1\n    """\n    raise ValueError("no")\n'
    )
    assert _lacking_examples(tree) == ["loss"]
    assert _untold_errors(tree) == ["loss: ValueError"]
