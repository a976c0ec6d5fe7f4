"""What a run was started with and on: its command, the versions of what computes, and the devices."""

import os
import platform
from importlib import metadata
from typing import Any

import jax

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "pyarrow")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a result depends on, by name."""
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in _PACKAGES}}


def describe(command: str | None) -> dict[str, Any]:
    """A JSON-ready description of this process.

    Args:
        command: the command line that started the run; None when Python code did.

    Returns:
        ``command``, ``versions``, ``device_kind``, ``num_devices`` and ``num_cpu_cores`` (those this process may use).
    """
    devices = jax.devices()
    return {
        "command": command,
        "versions": versions(),
        "device_kind": devices[0].device_kind,
        "num_devices": len(devices),
        "num_cpu_cores": len(os.sched_getaffinity(0)),
    }
