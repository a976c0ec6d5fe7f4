"""The processes of one training job: how they find each other, which one tells and writes, how they stop together.

Every process runs the same command; arrays are global, and JAX's distributed runtime carries what devices exchange.
Process 0 alone prints and writes what is not a checkpoint. A process that is lost ends the others within
:data:`HEARTBEAT_SECONDS` and some: the same command, with as many processes or another number, goes on from the last
checkpoint.
"""

import os
import sys
from typing import Any

import jax
from jax.experimental import multihost_utils

from mmei_jax.types import InputError

HEARTBEAT_SECONDS = 20
# What the manifest of an Indexed Job has to set; Kubernetes sets the last one itself.
_KUBERNETES = ("COORDINATOR_ADDRESS", "NUM_PROCESSES", "JOB_COMPLETION_INDEX")
# Set for every task that srun starts, and for no other.
_SLURM_TASKS = "SLURM_STEP_NUM_TASKS"


def join(
    launcher: str = "auto", address: str | None = None, count: int | None = None, index: int | None = None
) -> None:
    """Joins the job's other processes, if there are any; to be called before anything asks for devices.

    Args:
        launcher: who started the processes, of :data:`mmei_jax.command.LAUNCHERS`. "auto" finds out: what is given
            here, else SLURM's srun, else the variables of a Kubernetes Indexed Job, else the process is alone.
            "cloud_tpu" asks the machine's metadata.
        address: host and port of process 0.
        count: number of processes.
        index: of this process, from 0.

    Raises:
        InputError: of address, count and index some are given and some not, they are no job, or the launcher told less
            than is needed.
    """
    given = (address, count, index)
    if any(value is not None for value in given):
        _join_given(*given)
    elif launcher == "slurm" or (launcher == "auto" and int(os.environ.get(_SLURM_TASKS, "1")) > 1):
        if _SLURM_TASKS not in os.environ:
            raise InputError(f"--launcher=slurm: {_SLURM_TASKS} is not set: expected a task that srun started")
        _initialize(cluster_detection_method="slurm")
    elif launcher == "kubernetes" or (launcher == "auto" and all(name in os.environ for name in _KUBERNETES)):
        _join_kubernetes()
    elif launcher == "cloud_tpu":
        _initialize()
    # Nobody else is asked whether there are others: that would settle which devices there are.
    if jax.distributed.is_initialized() and not is_first():
        # One process tells what all do; what goes wrong in another one is told on standard error.
        sys.stdout.flush()
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def is_first() -> bool:
    """Whether this process prints and writes."""
    return jax.process_index() == 0


def agree_to_stop(step: int) -> bool:
    """Whether all processes stop after this update, because one of them got SIGTERM; the same answer in all of them.

    Args:
        step: completed updates; to be asked after every update.
    """
    return jax.process_count() > 1 and bool(multihost_utils.reached_preemption_sync_point(step))


def _join_given(address: str | None, count: int | None, index: int | None) -> None:
    told = f"--coordinator_address={address} --num_processes={count} --process_index={index}"
    if address is None or count is None or index is None:
        raise InputError(f"{told}: expected all three or none")
    if not 0 <= index < count:
        raise InputError(f"{told}: expected an index in [0, {count})")
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise InputError(f"{told}: expected an address such as node-0:12345")
    if count > 1:
        _initialize(coordinator_address=address, num_processes=count, process_id=index)


def _join_kubernetes() -> None:
    values = [os.environ.get(name, "") for name in _KUBERNETES]
    address, count, index = values
    if not address or not count.isdecimal() or not index.isdecimal():
        found = ", ".join(f"{name}={value}" for name, value in zip(_KUBERNETES, values, strict=True))
        raise InputError(f"--launcher=kubernetes: {found}: expected an address and two whole numbers")
    _join_given(address, int(count), int(index))


def _initialize(**options: Any) -> None:
    jax.distributed.initialize(heartbeat_timeout_seconds=HEARTBEAT_SECONDS, **options)
