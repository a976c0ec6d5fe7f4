"""Which calls of the package's functions are checked against their annotations: the first of every test, then some.

A check costs more than many a function, and a nested function that is checked is compiled anew wherever it is defined.
"""

import dataclasses
import functools
import inspect
from collections import Counter
from typing import Any

import jaxtyping

# Of one function in one test: so many calls are checked, and after them every so manieth.
FIRST = 10
EVERY = 10

# By the identity of the code, which a nested function has in common with itself at each definition.
_num_calls: Counter[int] = Counter()
_jaxtyped = jaxtyping.jaxtyped


def begin_test() -> None:
    """Every function is checked from its next call on."""
    _num_calls.clear()


def _is_due(code: int) -> bool:
    _num_calls[code] += 1
    return _num_calls[code] <= FIRST or _num_calls[code] % EVERY == 0


def jaxtyped(function: Any = None, *, typechecker: Any) -> Any:
    """Stands in for ``jaxtyping.jaxtyped``, which the import hook puts on every function."""
    if function is None:
        return functools.partial(jaxtyped, typechecker=typechecker)
    if inspect.isclass(function) and "__init__" in vars(function) and dataclasses.is_dataclass(function):
        function.__init__ = jaxtyped(function.__init__, typechecker=typechecker)
        return function
    if not inspect.isfunction(function):
        return _jaxtyped(function, typechecker=typechecker)
    code, checked = id(function.__code__), None

    @functools.wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        __tracebackhide__ = True
        nonlocal checked
        if not _is_due(code):
            return function(*arguments, **named)
        if checked is None:
            checked = _jaxtyped(function, typechecker=typechecker)
        return checked(*arguments, **named)

    return call


def install() -> None:
    """Before the package is imported."""
    jaxtyping.jaxtyped = jaxtyped
