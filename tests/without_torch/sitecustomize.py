"""Hides torch from every process that has this folder on its path: no command needs it, and importing it takes seconds.

tensorboardX and transformers import torch where they find it.
"""

import sys
from importlib.machinery import ModuleSpec, PathFinder


class WithoutTorch(PathFinder):
    """Finds what lies on the path, but for torch."""

    @classmethod
    def find_spec(cls, fullname: str, path=None, target=None) -> ModuleSpec | None:
        """As in an environment that lacks it."""
        return None if fullname == "torch" else super().find_spec(fullname, path, target)


sys.meta_path[sys.meta_path.index(PathFinder)] = WithoutTorch
