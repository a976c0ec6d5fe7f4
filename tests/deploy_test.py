"""Launch files: what can be held of them without a cluster. Nothing here starts one."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from mmei_jax import processes as job

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
# Stand-ins for SLURM's commands: they write down how they were called.
STAND_IN = '#!/bin/bash\necho "$(basename "$0") $*" >> "$CALLS"\n'


@pytest.fixture
def cluster(tmp_path):
    """Runs the SLURM script where srun ends with a code; gives its own code, and how commands were called."""

    def run(code, *arguments):
        for name, end in (("srun", f"exit {code}\n"), ("scontrol", "")):
            (tmp_path / name).write_text(STAND_IN + end)
            (tmp_path / name).chmod(0o755)
        calls = tmp_path / "calls"
        calls.unlink(missing_ok=True)
        environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
        script = ["bash", str(DEPLOY / "slurm.sbatch"), *arguments]
        done = subprocess.run(script, env={**environment, "CALLS": str(calls)}, check=False)
        return done.returncode, calls.read_text().splitlines()

    return run


@pytest.mark.parametrize(("code", "is_queued"), [(0, False), (2, False), (143, True), (134, True)])
def test_slurm_script_starts_the_command_and_queues_what_may_go_on(code, is_queued, cluster):
    found, calls = cluster(code, "--config=configs/quickstart.py", "--workdir=/shared/a run")
    assert found == code
    started = "srun --kill-on-bad-exit=1 python train.py --config=configs/quickstart.py --workdir=/shared/a run"
    assert calls == [started, *(["scontrol requeue 7"] if is_queued else [])]


def test_slurm_script_asks_for_a_task_for_each_gpu():
    lines = (DEPLOY / "slurm.sbatch").read_text().splitlines()
    options = dict(line.removeprefix("#SBATCH --").partition("=")[::2] for line in lines if line.startswith("#SBATCH"))
    # JAX gives each of SLURM's tasks the one device of its place on the node.
    assert options["ntasks-per-node"] == options["gpus-per-node"]
    assert options["signal"] == "TERM@120"
    # SLURM reads no further options once a command has been met.
    assert max(i for i, line in enumerate(lines) if line.startswith("#SBATCH")) < lines.index("set -uo pipefail")


@pytest.fixture
def pod_template():
    manifest = yaml.safe_load((DEPLOY / "jobset.yaml").read_text())
    assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (workers,) = manifest["spec"]["replicatedJobs"]
    return manifest, workers


def test_jobsets_pods_find_each_other(pod_template, monkeypatch):
    manifest, workers = pod_template
    spec = workers["template"]["spec"]
    assert spec["completionMode"] == "Indexed"
    (container,) = spec["template"]["spec"]["containers"]
    variables = {each["name"]: each["value"] for each in container["env"]}
    assert int(variables["NUM_PROCESSES"]) == spec["parallelism"] == spec["completions"]
    host, _, port = variables["COORDINATOR_ADDRESS"].partition(":")
    name, subdomain = manifest["metadata"]["name"], manifest["spec"]["network"]["subdomain"]
    # https://jobset.sigs.k8s.io: <jobset>-<replicated job>-<job>-<pod>.<subdomain>
    assert host == f"{name}-{workers['name']}-0-0.{subdomain}"
    assert int(port) in [each["containerPort"] for each in container["ports"]]
    found = []
    monkeypatch.setattr(job.jax.distributed, "initialize", lambda **options: found.append(options))
    monkeypatch.delenv("SLURM_STEP_NUM_TASKS", raising=False)
    for index in range(spec["completions"]):
        for key, value in {**variables, "JOB_COMPLETION_INDEX": str(index)}.items():
            monkeypatch.setenv(key, value)
        job.join()
    assert [each["process_id"] for each in found] == [0, 1]
    assert {each["coordinator_address"] for each in found} == {variables["COORDINATOR_ADDRESS"]}


def test_jobset_mounts_what_it_names_and_ends_at_wrong_input(pod_template):
    _, workers = pod_template
    spec = workers["template"]["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    assert {each["name"] for each in container["volumeMounts"]} == {each["name"] for each in pod["volumes"]}
    (rule,) = spec["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"] == {"containerName": container["name"], "operator": "In", "values": [2]}
    assert pod["restartPolicy"] == "Never"
    assert (ROOT / container["command"][1]).is_file()
    assert (ROOT / container["args"][0].removeprefix("--config=")).is_file()


@pytest.mark.parametrize("name", ["Dockerfile.cuda", "Dockerfile.tpu"])
def test_images_copy_what_is_there_and_what_the_commands_need(name):
    text = re.sub(r"\\\n", " ", (DEPLOY / name).read_text())
    steps = [line.split(maxsplit=1) for line in text.splitlines() if line and not line.startswith("#")]
    assert {step for step, _ in steps} <= {"FROM", "WORKDIR", "COPY", "RUN", "ENTRYPOINT", "CMD"}
    assert steps[0][0] == "FROM"
    copied = {source for step, rest in steps if step == "COPY" for source in shlex.split(rest)[:-1]}
    missing = [source for source in copied if not (ROOT / source).exists()]
    assert not missing
    assert {"train.py", "eval.py", "configs", "mmei_jax", "pyproject.toml"} <= copied
    (install,) = [rest for step, rest in steps if step == "RUN"]
    constraints = re.search(r"--constraint (\S+)", install)
    python = steps[0][1].removeprefix("python:").removesuffix("-slim")
    assert constraints
    assert constraints[1] == f"constraints/python{python}.txt"
    assert (ROOT / constraints[1]).is_file()
