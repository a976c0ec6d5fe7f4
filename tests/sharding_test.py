"""Which share of the work is a process's: what tells it, in which order, and what is refused; activations on a mesh."""

import jax
import jax.numpy as jnp
import pytest

from mmei_jax.activations import placed, placing
from mmei_jax.sharding import ProcessShare, mesh_over, place_activations, process_share
from mmei_jax.types import InputError

VARIABLES = ("SLURM_PROCID", "SLURM_NTASKS", "JOB_COMPLETION_INDEX", "NUM_PROCESSES")
SLURM = {"SLURM_PROCID": "2", "SLURM_NTASKS": "5"}
KUBERNETES = {"JOB_COMPLETION_INDEX": "3", "NUM_PROCESSES": "4"}


@pytest.fixture
def launcher(monkeypatch):
    """Sets the variables of a launcher, and no other's."""

    def tell(values):
        for name in VARIABLES:
            monkeypatch.delenv(name, raising=False)
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    tell({})
    return tell


def fake_runtime(monkeypatch, index, count):
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(jax, "process_index", lambda: index)
    monkeypatch.setattr(jax, "process_count", lambda: count)


def test_process_is_alone_where_nothing_tells_otherwise(launcher):
    assert process_share() == ProcessShare(0, 1)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        (SLURM, ProcessShare(2, 5)),
        (KUBERNETES, ProcessShare(3, 4)),
        ({**SLURM, **KUBERNETES}, ProcessShare(2, 5)),
        # Set for other purposes, without a launcher's index.
        ({"NUM_PROCESSES": "8"}, ProcessShare(0, 1)),
        ({"SLURM_NTASKS": "8"}, ProcessShare(0, 1)),
        ({"SLURM_NTASKS": "8", **KUBERNETES}, ProcessShare(3, 4)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, ProcessShare(0, 1)),
    ],
)
def test_launchers_variables_tell_index_and_number(launcher, variables, expected):
    launcher(variables)
    assert process_share() == expected


def test_distributed_runtime_counts_before_the_launcher(launcher, monkeypatch):
    launcher({**SLURM, **KUBERNETES})
    fake_runtime(monkeypatch, 1, 3)
    assert process_share() == ProcessShare(1, 3)


def test_arguments_count_before_everything(launcher, monkeypatch):
    # What is not looked at may be anything.
    launcher({"SLURM_PROCID": "none"})
    fake_runtime(monkeypatch, 1, 3)
    assert process_share(4, 6) == ProcessShare(4, 6)
    assert process_share(0, 1) == ProcessShare(0, 1)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"SLURM_PROCID": "2"}, "SLURM: SLURM_PROCID=2, SLURM_NTASKS=None: expected two whole numbers"),
        ({"JOB_COMPLETION_INDEX": "2"}, "Kubernetes: JOB_COMPLETION_INDEX=2, NUM_PROCESSES=None: expected two"),
        ({**SLURM, "SLURM_NTASKS": "many"}, "SLURM_NTASKS=many: expected two whole numbers"),
        ({**SLURM, "SLURM_PROCID": ""}, "SLURM_PROCID=, SLURM_NTASKS=5: expected two whole numbers"),
        ({**KUBERNETES, "JOB_COMPLETION_INDEX": "-1"}, "JOB_COMPLETION_INDEX=-1, NUM_PROCESSES=4: expected two"),
        ({**KUBERNETES, "NUM_PROCESSES": "4.0"}, "NUM_PROCESSES=4.0: expected two whole numbers"),
        # Half of one launcher's is not completed by the other's.
        ({"SLURM_PROCID": "2", **KUBERNETES}, "SLURM: SLURM_PROCID=2, SLURM_NTASKS=None"),
        ({**SLURM, "SLURM_PROCID": "5"}, r"process 5 of 5: expected an index in \[0, 5\)"),
        ({"JOB_COMPLETION_INDEX": "0", "NUM_PROCESSES": "0"}, r"process 0 of 0: expected an index in \[0, 0\)"),
    ],
)
def test_what_a_launcher_cannot_mean_is_refused(launcher, variables, message):
    launcher(variables)
    with pytest.raises(InputError, match=message):
        process_share()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((1, None), "process_index = 1, num_processes = None: expected both or neither"),
        ((None, 2), "process_index = None, num_processes = 2: expected both or neither"),
        ((2, 2), r"process 2 of 2: expected an index in \[0, 2\)"),
        ((-1, 2), r"process -1 of 2: expected an index in \[0, 2\)"),
        ((0, 0), r"process 0 of 0: expected an index in \[0, 0\)"),
    ],
)
def test_arguments_that_are_no_share_are_refused(launcher, given, message):
    launcher(SLURM)
    with pytest.raises(InputError, match=message):
        process_share(*given)


def test_one_device_traces_the_function_itself():
    def function(x):
        return placed(x, "no such name")

    assert place_activations(mesh_over(jax.devices()[:1]), function) is function
    assert "sharding" not in jax.jit(function).lower(jnp.zeros(3)).as_text()


def test_activations_carry_their_names_to_whoever_places_them_and_only_then():
    seen = []

    def note(activation, names):
        seen.append((activation.shape, names))
        return activation + 1.0

    x = jnp.zeros((2, 3))
    with placing(note):
        assert float(placed(x, "batch", None)[0, 0]) == 1.0
    assert placed(x, "batch", "mlp") is x
    assert seen == [((2, 3), ("batch", None))]


def test_placement_ends_where_the_traced_function_fails():
    with pytest.raises(ZeroDivisionError), placing(lambda activation, names: activation + 1.0):
        raise ZeroDivisionError
    x = jnp.zeros(2)
    assert placed(x, "batch") is x
