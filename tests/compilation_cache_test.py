"""The commands keep compiled programs, in a folder of the user's, and never fail because of it."""

import collections
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import jaxlib
import pytest

from mmei_jax import compilation_cache
from tests import processes

# What a start does, in short: switch the cache on, compile, count what was found and what was put down.
PROGRAM = """
import collections, json, sys
import jax
from mmei_jax import compilation_cache
counts = collections.Counter()
jax.monitoring.register_event_listener(lambda event, **_: counts.update([event.rpartition("/")[2]]))
folder = compilation_cache.enable()
value = jax.jit(lambda x: jax.numpy.tanh(x @ x).sum())(jax.numpy.full((64, 64), 0.01))
found, kept = counts["cache_hits"], counts["cache_misses"]
print(json.dumps({"folder": folder and str(folder), "value": float(value).hex(), "found": found, "kept": kept}))
"""


def start(cache_home: Path, **variables: str) -> tuple[dict, str]:
    """Runs the program in a process of its own; what it printed, and its standard error."""
    # As a user's environment is, who has said nothing of caches; the tests' own has a folder for their session.
    own = ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")
    environment = {name: value for name, value in os.environ.items() if name not in own}
    environment |= {"JAX_ENABLE_COMPILATION_CACHE": "true", "XDG_CACHE_HOME": str(cache_home), **variables}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=processes.ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


def test_second_process_finds_every_program_and_computes_the_same_bits(tmp_path):
    first, _ = start(tmp_path)
    second, stderr = start(tmp_path)
    assert first["found"] == 0
    assert first["kept"] >= 1
    assert (second["found"], second["kept"]) == (first["kept"], 0)
    assert second["value"] == first["value"]
    assert (
        second["folder"] == first["folder"] == str(compilation_cache.default_folder({"XDG_CACHE_HOME": str(tmp_path)}))
    )
    assert os.stat(first["folder"]).st_mode & 0o077 == 0
    assert stderr == ""


def test_damaged_entry_is_warned_about_and_compiled_anew(tmp_path):
    first, _ = start(tmp_path)
    for entry in Path(first["folder"]).iterdir():
        entry.write_bytes(entry.read_bytes()[:100])
    second, stderr = start(tmp_path)
    assert second["value"] == first["value"]
    assert second["found"] == 0
    assert "Error reading persistent compilation cache entry" in stderr


def test_folder_that_cannot_be_made_costs_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    outcome, stderr = start(tmp_path / "file")
    assert outcome["folder"] is None
    assert (outcome["found"], outcome["kept"]) == (0, 0)
    assert len(stderr.splitlines()) == 1
    assert stderr.startswith(f"warning: {tmp_path / 'file'}")
    assert "Not a directory" in stderr
    assert "JAX_COMPILATION_CACHE_DIR" in stderr


class _NoCache:
    """jax.config of a user who has said nothing of caches; nothing may be set in it."""

    jax_enable_compilation_cache = True
    jax_compilation_cache_dir = None

    def update(self, name: str, value: object) -> None:
        raise AssertionError(f"{name} = {value}")


def test_folder_that_cannot_be_written_costs_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(compilation_cache.os, "access", lambda path, mode: False)
    monkeypatch.setattr(compilation_cache, "jax", types.SimpleNamespace(config=_NoCache()))
    assert compilation_cache.enable() is None
    assert "not writable" in capsys.readouterr().err


def test_users_own_folder_wins(tmp_path):
    chosen = tmp_path / "chosen"
    outcome, _ = start(
        tmp_path / "home", JAX_COMPILATION_CACHE_DIR=str(chosen), JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0"
    )
    assert outcome["folder"] is None
    assert outcome["kept"] == len(list(chosen.iterdir())) >= 1
    assert not (tmp_path / "home").exists()


def test_cache_can_be_switched_off(tmp_path):
    outcome, _ = start(tmp_path / "home", JAX_ENABLE_COMPILATION_CACHE="false")
    assert (outcome["folder"], outcome["found"], outcome["kept"]) == (None, 0, 0)
    assert not (tmp_path / "home").exists()


def test_users_least_compile_time_wins(tmp_path):
    outcome, _ = start(tmp_path, JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="3600")
    assert outcome["kept"] == 0


def test_folder_is_named_after_jaxlib_and_the_processor(tmp_path):
    folder = compilation_cache.default_folder({"XDG_CACHE_HOME": str(tmp_path)})
    assert folder.parent == tmp_path / "mmei_jax" / "xla"
    assert folder.name.startswith(f"jaxlib-{jaxlib.__version__}-")
    assert compilation_cache.default_folder({}).parent == Path.home() / ".cache" / "mmei_jax" / "xla"
    relative = compilation_cache.default_folder({"XDG_CACHE_HOME": "somewhere"})
    assert relative == compilation_cache.default_folder({})


def test_key_changes_with_version_model_and_instruction_sets():
    cpu = {"machine": "x86_64", "model name": "Intel(R) Xeon(R) Processor", "flags": "avx avx2", "stepping": "1"}
    others = [{**cpu, "model name": "AMD EPYC"}, {**cpu, "flags": "avx avx2 avx512f"}, {**cpu, "stepping": "2"}]
    keys = [compilation_cache.cache_key("0.10.2", description) for description in (cpu, *others)]
    keys.append(compilation_cache.cache_key("0.10.3", cpu))
    assert len(set(keys)) == 5
    assert keys[0] == compilation_cache.cache_key("0.10.2", dict(reversed(cpu.items())))
    assert keys[0].startswith("jaxlib-0.10.2-intel-r-xeon-r-processor-")


@pytest.mark.parametrize("flags", ["avx2 avx", "avx avx2"])
def test_processor_is_described_whatever_the_clock_and_the_order_of_flags(flags, tmp_path):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(
        f"processor : 0\nmodel name : One\ncpu MHz : 2600.123\nflags : {flags}\n\nprocessor : 1\nmodel name : Two\n"
    )
    found = compilation_cache.cpu_description(cpuinfo)
    assert found == {"machine": compilation_cache.platform.machine(), "model name": "One", "flags": "avx avx2"}


def test_processor_is_described_where_there_is_no_cpuinfo(tmp_path):
    assert compilation_cache.cpu_description(tmp_path / "none").keys() == {"machine", "model name"}


@pytest.mark.parametrize("script", ["train.py", "eval.py"])
def test_commands_switch_it_on(script):
    names = collections.Counter((processes.ROOT / script).read_text(encoding="utf-8").split())
    assert names["compilation_cache.enable()"] == 1


@pytest.mark.slow
def test_second_training_and_evaluation_compile_nothing(data, tmp_path):
    environment = {
        **processes.environment(tmp_path),
        "XDG_CACHE_HOME": str(tmp_path / "home"),
    }
    del environment["JAX_COMPILATION_CACHE_DIR"]
    folder = compilation_cache.default_folder(environment)
    entries = []
    for name in ("first", "second"):
        train = [
            "train.py",
            "--config=tests/tiny_config.py",
            f"--config.data.path={data}",
            "--config.train.num_epochs=2",
        ]
        for command in ([*train, f"--workdir={tmp_path / name}"], ["eval.py", f"--workdir={tmp_path / name}"]):
            code, output = processes.run(*command, env=environment)
            assert code == 0, output
            entries.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert any(name.startswith("jit_step-") for name in entries[0])
    assert len(entries[1]) > len(entries[0])
    assert entries[1] == entries[2] == entries[3]
    metrics = [(tmp_path / name / "eval" / "test.json").read_text() for name in ("first", "second")]
    assert json.loads(metrics[0])["metrics"] == json.loads(metrics[1])["metrics"]
