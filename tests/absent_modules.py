"""Code that makes modules absent in a process of its own, as if they were not installed.

None in ``sys.modules`` makes imports fail too, but some libraries look there, or ask for a module's spec, to learn
whether it is installed.
"""

from collections.abc import Iterable

_CODE = """
import sys
class Hiding:
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in {names} else self.finder.find_spec(name, path, target)
sys.meta_path[:] = map(Hiding, sys.meta_path)
"""


def hide(names: Iterable[str]) -> str:
    """The beginning of a program to which the modules are not installed."""
    return _CODE.replace("{names}", repr(set(names)))
