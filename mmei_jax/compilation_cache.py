"""Keeps compiled programs from one run to the next: JAX's persistent compilation cache, in the user's cache folder.

Only the commands switch it on. JAX's own settings come first: ``JAX_COMPILATION_CACHE_DIR`` names another folder,
``JAX_ENABLE_COMPILATION_CACHE=false`` switches it off. An entry that is damaged (its writer was killed, the disk was
full) costs a warning by JAX and a compilation in every run. Nothing is ever removed: delete the folder to get rid of
such entries, and of its size.
"""

import hashlib
import os
import platform
import re
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

_MIN_COMPILE_SECONDS_KEY = "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"
# Lines of /proc/cpuinfo that say which machine code a processor runs ("Features" on ARM).
_CPU_KEYS = ("vendor_id", "cpu family", "model", "model name", "stepping", "flags", "Features", "CPU part")


def enable() -> Path | None:
    """Lets this process look its programs up, and put them down, in :func:`default_folder`.

    Does nothing where the user has named a folder or switched the cache off. Says in one line on standard error that a
    folder cannot be used; programs are then compiled as if there were none.

    Returns:
        The folder; None where nothing was done.
    """
    config: Any = jax.config  # whose stub lacks these names
    if not config.jax_enable_compilation_cache or config.jax_compilation_cache_dir is not None:
        return None
    folder = default_folder(os.environ)
    try:
        # Whoever can write here can make this user's runs execute what they like.
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        reason = "" if os.access(folder, os.W_OK | os.X_OK) else "not writable"
    except OSError as error:
        reason = error.strerror or str(error)
    if reason:
        advice = "compiled programs are not kept; JAX_COMPILATION_CACHE_DIR names another folder"
        print(f"warning: {folder}: {reason}: {advice}", file=sys.stderr, flush=True)
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    if _MIN_COMPILE_SECONDS_KEY not in os.environ:
        # JAX keeps only what took a second; a start compiles dozens of small programs besides.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    return folder


def default_folder(environment: Mapping[str, str]) -> Path:
    """``$XDG_CACHE_HOME/mmei_jax/xla/<key>``, with a key of its own for each jaxlib version and processor model.

    XLA compiles for the processor that it runs on. On another one, from a home folder that machines share, its code may
    end in an illegal instruction.

    Args:
        environment: variables; without ``XDG_CACHE_HOME`` it is ``~/.cache``.
    """
    return user_folder(environment) / "xla" / cache_key(metadata.version("jaxlib"), cpu_description())


def user_folder(environment: Mapping[str, str]) -> Path:
    """``$XDG_CACHE_HOME/mmei_jax``: for whatever one command keeps for the next.

    Args:
        environment: variables; without ``XDG_CACHE_HOME`` it is ``~/.cache``.
    """
    given = environment.get("XDG_CACHE_HOME", "")
    # The XDG specification: a relative path is to be ignored.
    base = Path(given) if given.startswith("/") else Path.home() / ".cache"
    return base / "mmei_jax"


def cache_key(jaxlib_version: str, cpu: Mapping[str, str]) -> str:
    """A folder's name that differs where the version, the processor's model or its instruction sets differ."""
    model = re.sub(r"[^a-z0-9]+", "-", cpu.get("model name", "cpu").lower()).strip("-")
    content = "\n".join(f"{name}={value}" for name, value in sorted(cpu.items()))
    return f"jaxlib-{jaxlib_version}-{model}-{hashlib.sha256(content.encode()).hexdigest()[:12]}"


def cpu_description(cpuinfo: Path = Path("/proc/cpuinfo")) -> dict[str, str]:
    """What identifies this processor, by name of the property; flags in alphabetical order."""
    found = {"machine": platform.machine()}
    try:
        first = cpuinfo.read_text(encoding="utf-8", errors="replace").split("\n\n")[0]
    except OSError:
        # Not Linux.
        return {**found, "model name": platform.processor() or "cpu"}
    for line in first.splitlines():
        name, _, value = (part.strip() for part in line.partition(":"))
        if name in _CPU_KEYS:
            found[name] = " ".join(sorted(value.split())) if name in ("flags", "Features") else value
    return found
