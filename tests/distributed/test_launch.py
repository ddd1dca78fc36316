"""launch/: as many processes and nodes as asked for, signals that reach them, and manifests that say what they should."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from ltx2_train.train.checkpoint import complete_checkpoints
from tests.unit.cli.commands import SMALL, small_dataset

REPOSITORY = Path(__file__).resolve().parents[2]
LAUNCH = REPOSITORY / "launch"
TORCHRUN, SLURM, ENCODE = (LAUNCH / name for name in ("torchrun.sh", "slurm.sbatch", "encode.sbatch"))
SCRIPTS = (TORCHRUN, SLURM, ENCODE)
# That of the environment, or the machine's.
SHELLCHECK = shutil.which("shellcheck", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))

WORKER = """
import os, signal, sys, time
from pathlib import Path
import torch
from ltx2_train.distributed.world import close_world, init_world

folder = Path(sys.argv[1])
stopped = []
signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
world = init_world()
try:
    (folder / f"started-{world.rank}").write_text(f"{world.size} {world.local_rank} {os.environ['OMP_NUM_THREADS']}")
    while not world.all_sum(torch.tensor(len(stopped))):
        time.sleep(0.05)
    (folder / f"saved-{world.rank}").touch()
finally:
    close_world()
"""

# What SLURM does on two nodes, on one machine: a task per node, and signals that are passed on.
SRUN = """#!{python}
import os, signal, subprocess, sys
command = [a for a in sys.argv[1:] if not a.startswith("--kill-on-bad-exit")]
nodes = range(int(os.environ["SLURM_JOB_NUM_NODES"]))
tasks = [subprocess.Popen(command, env=os.environ | {{"SLURM_NODEID": str(i)}}) for i in nodes]
signal.signal(signal.SIGUSR1, lambda number, _: [task.send_signal(number) for task in tasks])
sys.exit(max(abs(task.wait()) for task in tasks))
"""
SCONTROL = """#!/bin/sh
case "$1" in
  show) echo 127.0.0.1; echo elsewhere ;;
  *) echo "$@" >> "$SCONTROL_LOG" ;;
esac
"""


def start(command: list[str], folder: Path, **variables: str) -> subprocess.Popen:
    """A launch script in a process of its own; what it says goes to folder/log."""
    kept = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    environment = kept | {"PYTHONPATH": str(REPOSITORY), "PYTHON": sys.executable, "NPROC": "1"} | variables
    with (folder / "log").open("a") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=REPOSITORY)


def wait_until(
    processes: list[subprocess.Popen], folder: Path, is_done: Callable[[], bool], *, may_end: bool = False
) -> None:
    deadline = time.monotonic() + 120
    while not is_done():
        ended = any(process.poll() is not None for process in processes)
        assert may_end or not ended, (folder / "log").read_text()
        assert time.monotonic() < deadline, (folder / "log").read_text()
        time.sleep(0.1)


def end(processes: list[subprocess.Popen]) -> None:
    for process in processes:
        if process.poll() is None:
            process.terminate()
    for process in processes:
        process.wait(60)


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def loopback() -> dict[str, str]:
    """Two nodes that are this machine twice."""
    port = {"MASTER_PORT": free_port()}
    return port | {"MASTER_ADDR": "127.0.0.1", "LOCAL_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo", "NNODES": "2"}


def both(folder: Path, name: str) -> Callable[[], bool]:
    return lambda: all((folder / f"{name}-{rank}").exists() for rank in (0, 1))


def test_processes_start_and_save_when_the_launcher_is_told_to_stop(tmp_path):
    (tmp_path / "worker.py").write_text(WORKER)
    process = start([str(TORCHRUN), str(tmp_path / "worker.py"), str(tmp_path)], tmp_path, NPROC="2")
    try:
        wait_until([process], tmp_path, both(tmp_path, "started"))
        size, _, threads = (tmp_path / "started-1").read_text().split()
        assert size == "2"
        assert int(threads) == max(1, len(os.sched_getaffinity(0)) // 2)
        process.send_signal(signal.SIGTERM)
        wait_until([process], tmp_path, both(tmp_path, "saved"), may_end=True)
        process.wait(60)
    finally:
        end([process])


def test_two_nodes_find_each_other_and_save_together(tmp_path):
    (tmp_path / "worker.py").write_text(WORKER)
    nodes, shared = [], loopback()
    try:
        for node in ("1", "0"):  # the one that keeps the rendezvous comes last
            command = [str(TORCHRUN), str(tmp_path / "worker.py"), str(tmp_path)]
            nodes.append(start(command, tmp_path, NODE_RANK=node, **shared))
        wait_until(nodes, tmp_path, both(tmp_path, "started"))
        told = [(tmp_path / f"started-{rank}").read_text().split()[:2] for rank in (0, 1)]
        assert told == [["2", "0"], ["2", "0"]], "two processes, each the first on its node"
        for node in nodes:
            node.send_signal(signal.SIGTERM)
        wait_until(nodes, tmp_path, both(tmp_path, "saved"), may_end=True)
    finally:
        end(nodes)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_without_a_program_it_says_how_it_is_used(script):
    answer = subprocess.run([str(script)], capture_output=True, text=True)
    assert answer.returncode == 64
    assert "usage:" in answer.stderr


def test_several_nodes_without_a_meeting_place_are_refused():
    environment = os.environ | {"NNODES": "2", "NODE_RANK": "0"}
    answer = subprocess.run([str(TORCHRUN), "x.py"], capture_output=True, text=True, env=environment)
    assert answer.returncode == 64
    assert "NNODES=2 needs MASTER_ADDR" in answer.stderr


@pytest.mark.parametrize(
    ("given", "processes", "nodes"),
    [
        ({"PET_NPROC_PER_NODE": "3", "PET_NNODES": "1"}, "3", "--standalone"),
        ({"PET_NPROC_PER_NODE": "auto", "PET_NNODES": "4", "PET_NODE_RANK": "2", "PET_MASTER_ADDR": "a"}, "1", "a:29500"),
        ({"NPROC": "2", "NNODES": "2:4", "SLURM_NODEID": "0", "MASTER_ADDR": "n1", "MASTER_PORT": "7"}, "2", "n1:7"),
    ],
    ids=["kubeflow one node", "kubeflow four nodes", "slurm elastic"],
)  # fmt: skip
def test_what_schedulers_set_is_understood(tmp_path, given, processes, nodes):
    said = echoed(TORCHRUN, tmp_path, given, "train.py", "a=1")
    assert said[said.index("--nproc-per-node") + 1] == processes
    assert nodes in said
    assert said[-2:] == ["train.py", "a=1"]
    if "is_host" in " ".join(said):
        is_first = given.get("PET_NODE_RANK", given.get("SLURM_NODEID")) == "0"
        assert any(f"is_host={str(is_first).lower()}" in word for word in said)


def echoed(script: Path, folder: Path, variables: dict[str, str], *arguments: str) -> list[str]:
    """What the script would start: its interpreter is one that only repeats its arguments. There are no GPUs here."""
    for name, body in (("echo", 'printf "%s\\n" "$@"'), ("nvidia-smi", "exit 1")):
        (folder / name).write_text(f"#!/bin/sh\n{body}\n")
        (folder / name).chmod(0o755)
    environment = {"PATH": f"{folder}:{os.environ['PATH']}", "PYTHON": str(folder / "echo")} | variables
    answer = subprocess.run([str(script), *arguments], capture_output=True, text=True, env=environment)
    assert answer.returncode == 0, answer.stderr
    return answer.stdout.splitlines()


def slurm(folder: Path, *settings: str) -> subprocess.Popen:
    """The batch script as SLURM would run it, on two nodes."""
    for name, text in (("srun", SRUN.format(python=sys.executable)), ("scontrol", SCONTROL)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_NUM_NODES": "2"}
    shared = {k: v for k, v in loopback().items() if k != "MASTER_ADDR"}  # the script asks scontrol
    place = {"SLURM_SUBMIT_DIR": str(REPOSITORY), "PATH": f"{folder}:{os.environ['PATH']}"}
    log = {"SCONTROL_LOG": str(folder / "scontrol.log")}
    return start([str(SLURM), *settings], folder, **shared, **job, **place, **log, OMP_NUM_THREADS="1")


def settings(folder: Path, *more: str) -> tuple[str, ...]:
    data = folder / "latents"
    if not data.exists():
        small_dataset(data)
    return (
        *SMALL,
        f"data.datasets.0.path={data}",
        f"train.run_dir={folder / 'run'}",
        "data.plan.micro_batches_per_step=2",
        *more,
    )


def steps(folder: Path) -> list[int]:
    path = folder / "run" / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [line["step"] for line in lines if "event" not in line]


def test_a_slurm_job_saves_before_its_time_is_over_and_goes_back_into_the_queue(tmp_path):
    job = slurm(tmp_path, *settings(tmp_path, "train.max_steps=100000", "train.save_every=0"))
    try:
        wait_until([job], tmp_path, lambda: len(steps(tmp_path)) >= 2)
        job.send_signal(signal.SIGUSR1)
        assert job.wait(120) != 0
    finally:
        end([job])
    assert (tmp_path / "scontrol.log").read_text().split() == ["requeue", "7"]
    (saved,) = complete_checkpoints(tmp_path / "run")
    assert saved.name == f"step-{steps(tmp_path)[-1]:08d}"


@pytest.mark.slow
def test_two_nodes_finish_a_run_and_a_finished_slurm_job_stays_out_of_the_queue(tmp_path):
    job = slurm(tmp_path, *settings(tmp_path))
    try:
        assert job.wait(180) == 0, (tmp_path / "log").read_text()
    finally:
        end([job])
    assert steps(tmp_path) == [1, 2, 3, 4, 5, 6]
    assert not (tmp_path / "scontrol.log").exists()


@pytest.mark.slow
def test_a_killed_worker_is_started_again_with_all_others_from_the_last_checkpoint(tmp_path):
    """torchrun's restart: one of two processes dies of SIGKILL; the run still ends with every step, once."""
    long = ("train.max_steps=12", "train.save_every=2")
    command = [str(TORCHRUN), "-m", "ltx2_train.cli.train", *settings(tmp_path, *long)]
    run = start(command, tmp_path, NPROC="2", MAX_RESTARTS="1", OMP_NUM_THREADS="1")
    try:
        wait_until([run], tmp_path, lambda: bool(complete_checkpoints(tmp_path / "run")))
        os.kill(children(run.pid)[-1], signal.SIGKILL)
        assert run.wait(180) == 0, (tmp_path / "log").read_text()
    finally:
        end([run])
    assert "going on from" in (tmp_path / "log").read_text()
    assert steps(tmp_path) == list(range(1, 13))


@pytest.mark.slow
def test_a_run_that_hangs_says_where_and_is_started_again(tmp_path):
    """One of two processes stands still (SIGSTOP), as on a machine that is about to die."""
    long = ("train.max_steps=30", "train.save_every=5", "train.hang_seconds=8")
    command = [str(TORCHRUN), "-m", "ltx2_train.cli.train", *settings(tmp_path, *long)]
    run = start(command, tmp_path, NPROC="2", MAX_RESTARTS="1", OMP_NUM_THREADS="1")
    try:
        wait_until([run], tmp_path, lambda: bool(complete_checkpoints(tmp_path / "run")))
        os.kill(children(run.pid)[-1], signal.SIGSTOP)
        assert run.wait(180) == 0, (tmp_path / "log").read_text()
    finally:
        end([run])
    log = (tmp_path / "log").read_text()
    assert "HUNG: no progress for 8 s" in log
    assert "says nothing any more" in log
    assert steps(tmp_path) == list(range(1, 31))
    told = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["after"] for line in told if line.get("event") == "resumed"] == ["a hang"]
    assert not (tmp_path / "run" / ".hung").exists(), "the note is taken away, so that it is told once"


def children(pid: int) -> list[int]:
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=True)
    return [int(child) for child in listed.stdout.split()]


def test_the_tasks_of_an_encoding_array_share_the_shards(tmp_path):
    raw = tmp_path / "raw"
    raw.mkdir()
    shards = [raw / f"raw-{i:03d}.tar" for i in range(5)]
    for shard in shards:
        shard.touch()
    task = {"RAW": str(raw), "OUT": "out", "SLURM_ARRAY_TASK_COUNT": "2", "SLURM_SUBMIT_DIR": str(REPOSITORY)}
    said = [
        echoed(ENCODE, tmp_path, task | {"SLURM_ARRAY_TASK_ID": str(i)}, "--buckets", "64x64x9", "--holdout", "0.1")
        for i in (0, 1)
    ]
    assert sorted(word for words in said for word in words if word.endswith(".tar")) == [str(s) for s in shards]
    assert [words[words.index("--out") + 1] for words in said] == ["out/part-000", "out/part-001"]
    assert all(words[-4:] == ["--buckets", "64x64x9", "--holdout", "0.1"] for words in said)


@pytest.mark.parametrize(
    ("task", "arguments", "message"),
    [
        ({"SLURM_ARRAY_TASK_ID": "7"}, ["--buckets", "b"], "task 7 of 2"),
        ({}, ["--holdout-count", "3"], "Take --holdout"),
        ({"SLURM_ARRAY_TASK_ID": "0", "RAW": "/nowhere"}, ["--buckets", "b"], "/nowhere holds 0 shards"),
    ],
)
def test_an_encoding_task_that_makes_no_sense_is_refused(tmp_path, task, arguments, message):
    base = {"RAW": str(tmp_path), "OUT": "out", "SLURM_ARRAY_TASK_COUNT": "2", "SLURM_SUBMIT_DIR": str(REPOSITORY)}
    answer = subprocess.run([str(ENCODE), *arguments], capture_output=True, text=True, env=os.environ | base | task)
    assert answer.returncode == 64
    assert message in answer.stderr


@pytest.mark.skipif(SHELLCHECK is None, reason="shellcheck is not installed")
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(script):
    answer = subprocess.run([str(SHELLCHECK), str(script)], capture_output=True, text=True)
    assert answer.returncode == 0, answer.stdout


def manifests(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((LAUNCH / "kubernetes" / name).read_text()))


def environment(container: dict[str, Any]) -> dict[str, Any]:
    return {entry["name"]: entry.get("value", entry.get("valueFrom")) for entry in container["env"]}


def assert_pod_can_train(pod: dict[str, Any], name: str) -> dict[str, Any]:
    """The pod's container: it has time to save, shared memory for readers, and disks that exist."""
    (container,) = pod["containers"]
    assert container["name"] == name
    variables = environment(container)
    assert int(variables["GRACE_SECONDS"]) < pod["terminationGracePeriodSeconds"]
    assert variables["LOCAL_ADDR"] == {"fieldRef": {"fieldPath": "status.podIP"}}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == set(volumes)
    assert volumes["shm"]["emptyDir"]["medium"] == "Memory"
    return container


def test_the_pytorchjob_says_as_many_nodes_as_it_has_pods():
    (job,) = manifests("pytorchjob.yaml")
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    replicas = job["spec"]["pytorchReplicaSpecs"]
    assert replicas["Master"]["replicas"] == 1
    for replica in replicas.values():
        assert replica["restartPolicy"] == "OnFailure"
        container = assert_pod_can_train(replica["template"]["spec"], "pytorch")
        assert environment(container)["NNODES"] == str(sum(r["replicas"] for r in replicas.values()))
        assert container["args"][:2] == ["-m", "ltx2_train.cli.train"]
        assert {"name": "pytorchjob-port", "containerPort": 23456} in container["ports"]


def test_the_pytorchjob_s_command_gives_the_pod_s_number_to_the_script(tmp_path):
    (job,) = manifests("pytorchjob.yaml")
    container = job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"][0]
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "torchrun.sh").write_text('#!/bin/sh\necho "$NODE_RANK $*"\n')
    (tmp_path / "launch" / "torchrun.sh").chmod(0o755)
    command = [*container["command"], "-m", "program"]
    said = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"RANK": "1"})
    assert said.stdout.split() == ["1", "-m", "program"]


def test_the_trainjob_runs_on_its_runtime():
    runtime, job = manifests("trainjob.yaml")
    assert {runtime["apiVersion"], job["apiVersion"]} == {"trainer.kubeflow.org/v1alpha1"}
    assert job["spec"]["runtimeRef"]["name"] == runtime["metadata"]["name"]
    assert job["spec"]["runtimeRef"]["kind"] == runtime["kind"] == "TrainingRuntime"
    (node,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    assert node["template"]["metadata"]["labels"]["trainer.kubeflow.org/trainjob-ancestor-step"] == "trainer"
    pod = node["template"]["spec"]["template"]["spec"]
    container = assert_pod_can_train(pod, "node")
    assert pod["restartPolicy"] == "Never"
    assert container["command"] == ["launch/torchrun.sh"]
    assert not [name for name in environment(container) if name.startswith("PET_")], "Kubeflow sets and reserves them"
    assert job["spec"]["trainer"]["args"][:2] == ["-m", "ltx2_train.cli.train"]


@pytest.mark.parametrize("name", ["pytorchjob.yaml", "trainjob.yaml"])
def test_the_settings_in_a_manifest_are_settings(name):
    from tests.unit.cli.commands import composed

    spec = manifests(name)[-1]["spec"]
    if "trainer" in spec:
        arguments = spec["trainer"]["args"]
    else:
        arguments = spec["pytorchReplicaSpecs"]["Master"]["template"]["spec"]["containers"][0]["args"]
    assert composed(*arguments[2:]).train.run_dir == "/runs/pretrain"


def test_the_page_names_every_variable_that_a_script_reads():
    page = (LAUNCH / "README.md").read_text()
    read = {name for script in SCRIPTS for name in re.findall(r"\$\{?([A-Z][A-Z0-9_]+)", script.read_text())}
    assert not {name for name in read - {"BASH_SOURCE"} if f"`{name}`" not in page}
