"""Workers are GPUs where there are GPUs; elsewhere workers x threads fill the cores. (Counts are simulated.)"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from laws.pool import Pool

from shoal.config import RunConfig, idle_gpus, load_config, resolve_threads, resolve_workers, wanted_device
from shoal.diagnose import doctor
from shoal.engines import environment, local
from shoal.engines.environment import placement, threads_of
from shoal.errors import UserError
from shoal.system import devices
from shoal.system.devices import Machine, device_of
from shoal.wire.mesh import Mesh, check_own


def config(*flags: str) -> RunConfig:
    return load_config(None, list(flags), {}).config


@pytest.fixture
def sees(monkeypatch: pytest.MonkeyPatch):
    """Have torch see so many GPUs, in the one place that counts them."""

    def see(count: int) -> None:
        for user in (devices, environment):
            monkeypatch.setattr(user, "gpus", lambda: count)

    return see


@pytest.mark.parametrize("asked", [[], ["--nproc-per-node", "gpu"], ["--device", "cuda"]], ids=str)
@pytest.mark.parametrize(("gpus", "workers"), [(1, 1), (2, 2), (3, 3), (4, 4), (8, 4)])
def test_workers_are_gpus_as_far_as_the_batch_has_micro_batches(
    asked: list[str], gpus: int, workers: int
) -> None:
    machine = Machine(64, gpus)
    assert resolve_workers(config(*asked), machine) == workers
    said = idle_gpus(config(*asked), workers, machine)
    assert ("4 micro-batches, fewer than workers" in said) == (workers < gpus)
    assert resolve_workers(config(*asked, "--global-batch-size", "32"), machine) == gpus


@pytest.mark.parametrize("gpus", [1, 2, 4, 8])
def test_a_number_of_workers_has_a_gpu_each_or_is_refused(gpus: int) -> None:
    run = ("--global-batch-size", "64", "--nproc-per-node")
    for asked in range(1, gpus + 1):
        assert resolve_workers(config(*run, str(asked)), Machine(64, gpus)) == asked
        assert not idle_gpus(config(*run, str(asked)), asked, Machine(64, gpus))
    with pytest.raises(UserError, match=f"--nproc-per-node {gpus + 1}: {gpus} GPU.*--device cpu"):
        resolve_workers(config(*run, str(gpus + 1)), Machine(64, gpus))


def test_gpus_that_a_layout_cannot_use_are_idle_and_too_few_are_refused() -> None:
    assert resolve_workers(config("--tp", "2"), Machine(64, 3)) == 2
    assert "3 workers" in idle_gpus(config("--tp", "2"), 2, Machine(64, 3))
    with pytest.raises(UserError, match="--tp 4"):
        resolve_workers(config("--tp", "4"), Machine(64, 2))


@pytest.mark.parametrize("asked", [["--nproc-per-node", "gpu"], ["--device", "gpu", "--nproc-per-node", "2"]])
def test_a_gpu_where_there_is_none_is_refused(asked: list[str]) -> None:
    with pytest.raises(UserError, match="torch sees no GPU here"):
        resolve_workers(config(*asked), Machine(4))


@pytest.mark.parametrize("asked", [["--nproc-per-node", "cpu"], ["--device", "cpu"], ["--use-cpu"]])
def test_workers_on_the_cores_of_a_machine_with_gpus(asked: list[str], sees) -> None:
    sees(1)
    run = config(*asked)
    machine = environment.machine(run, {})
    assert machine.gpus == 0
    assert resolve_workers(run, Machine(16)) == 4
    assert device_of(wanted_device(run), 3, 4) == "cpu"
    with pytest.raises(UserError, match="--device is gpu"):
        wanted_device(config("--nproc-per-node", "cpu", "--device", "gpu"))


@pytest.mark.parametrize(
    ("flags", "machine", "workers", "threads"),
    [
        ([], Machine(2), 2, 1),
        ([], Machine(3), 3, 1),
        ([], Machine(16), 4, 4),
        ([], Machine(7), 4, 1),
        (["--global-batch-size", "64"], Machine(16), 16, 1),
        (["--exact"], Machine(16), 4, 1),
        (["--exact", "--threads", "2"], Machine(4), 2, 2),
        (["--threads", "8"], Machine(16), 2, 8),
        (["--threads", "8"], Machine(2), 1, 8),
        ([], Machine(16, threads=8), 2, 8),
        (["--exact"], Machine(16, threads=8), 4, 1),
        (["--nproc-per-node", "3"], Machine(1), 3, 1),
        (["--nproc-per-node", "cpu", "--threads", "2"], Machine(2), 1, 2),
        (["--tp", "4"], Machine(2), 4, 1),
        (
            ["--global-batch-size", "32", "--batch-size", "8", "--gradient-accumulation-steps", "2"],
            Machine(3),
            2,
            1,
        ),
        ([], Machine(64, 4), 4, 8),
        ([], Machine(8, 4), 4, 2),
        ([], Machine(2, 4), 4, 1),
        ([], Machine(64, 4, threads=3), 4, 3),
        (["--threads", "16"], Machine(64, 2), 2, 16),
    ],
)
def test_workers_times_threads_fill_the_machine(
    flags: list[str], machine: Machine, workers: int, threads: int
) -> None:
    assert resolve_workers(config(*flags), machine) == workers
    assert resolve_threads(config(*flags), workers, machine) == threads


@pytest.mark.parametrize("count", ["0", "-1", "5"])
def test_impossible_worker_counts_are_refused(count: str) -> None:
    with pytest.raises(UserError):
        resolve_workers(config("--nproc-per-node", count), Machine(64))


ENGINES = {
    "torchrun": {"RANK": "{r}", "WORLD_SIZE": "8", "LOCAL_RANK": "{l}", "LOCAL_WORLD_SIZE": "4"},
    "Open MPI": {
        "OMPI_COMM_WORLD_RANK": "{r}",
        "OMPI_COMM_WORLD_SIZE": "8",
        "OMPI_COMM_WORLD_LOCAL_RANK": "{l}",
        "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
    },
    "another MPI": {"PMI_RANK": "{r}", "PMI_SIZE": "8", "MPI_LOCALRANKID": "{l}", "MPI_LOCALNRANKS": "4"},
    "Slurm": {
        "SLURM_PROCID": "{r}",
        "SLURM_NTASKS": "8",
        "SLURM_LOCALID": "{l}",
        "SLURM_NODEID": "1",
        "SLURM_TASKS_PER_NODE": "4(x2)",
    },
}


@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine_gives_each_worker_of_a_machine_its_device(engine: str, sees) -> None:
    environs = [
        {name: value.format(r=4 + at, l=at) for name, value in ENGINES[engine].items()} | {"MASTER_PORT": "1"}
        for at in range(4)
    ]
    places = [placement(environ) for environ in environs]
    assert [(each.local_rank, each.local_size) for each in places] == [(at, 4) for at in range(4)]

    def taken(gpus: int) -> list[str]:
        sees(gpus)
        return [device_of("auto", each.local_rank, each.local_size) for each in places]

    assert taken(0) == ["cpu"] * 4
    assert taken(4) == taken(8) == ["cuda:0", "cuda:1", "cuda:2", "cuda:3"]
    assert taken(1) == ["cuda:0"] * 4  # as `srun --gpus-per-task=1` shows them; `check_own` sees to the rest
    with pytest.raises(UserError, match="4 workers on this machine: 2 GPUs"):
        taken(2)
    sees(0)
    with pytest.raises(UserError, match="--device gpu: torch sees no GPU"):
        device_of("gpu", 0, 1)


@pytest.mark.parametrize(
    ("sizes", "node", "size"), [("4(x2),3", 2, 3), ("2,5", 1, 5), ("4", 0, 4), ("4", 3, 0), ("", 0, 0)]
)
def test_the_tasks_of_a_slurm_node(sizes: str, node: int, size: int) -> None:
    given = {"SLURM_PROCID": "0", "SLURM_NTASKS": "7", "MASTER_PORT": "1", "SLURM_NODEID": str(node)}
    assert placement(given | {"SLURM_TASKS_PER_NODE": sizes}).local_size == size


@pytest.mark.parametrize(
    ("environ", "threads"),
    [
        ({"RANK": "0", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}, 4),
        ({"RANK": "0", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4", "OMP_NUM_THREADS": "1"}, 1),
        ({"RANK": "0", "WORLD_SIZE": "8", "OMP_NUM_THREADS": "no"}, 2),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_CPUS_PER_TASK": "6"}, 6),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_CPUS_PER_TASK": "6", "OMP_NUM_THREADS": "3,1"}, 3),
    ],
)
def test_the_threads_of_a_worker_that_an_engine_started(
    environ: dict[str, str], threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "usable_cores", lambda: 16)
    place = placement({"MASTER_PORT": "1", **environ})
    assert threads_of(config(), place, environ) == threads
    assert threads_of(config("--exact"), place, environ) == 1


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"cpu.max": "200000 100000\n"}, 2),
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({}, None),
    ],
    ids=str,
)
def test_the_quota_of_a_container(files: dict[str, str], cores: int | None, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert devices._quota(tmp_path) == cores


def test_torch_is_asked_for_gpus_only_where_there_is_a_driver(tmp_path: Path) -> None:
    """The launcher of a machine without GPUs starts without torch's seconds."""
    code = "import sys; from shoal.system import devices; devices.DRIVERS = sys.argv[1:]; "
    code += "found = devices.gpus(); print('torch' in sys.modules)"
    for driver, asked in ((tmp_path / "none", "False"), (tmp_path, "True")):
        done = subprocess.run([sys.executable, "-c", code, str(driver)], capture_output=True, text=True)
        assert done.stdout.strip() == asked, done.stderr


def test_what_the_launcher_starts_follows_from_the_gpus(
    sees, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    started = []

    class Started:
        def __init__(self, command: list[str], env: dict[str, str], **_: object) -> None:
            started.append(
                {name: env[name] for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS")}
            )
            self.pid, self.returncode = 0, 0

        def poll(self) -> int:
            return 0

        def wait(self, timeout: float) -> int:
            return 0

    sees(8)
    monkeypatch.setattr(local.subprocess, "Popen", Started)
    monkeypatch.setattr(environment, "usable_cores", lambda: 12)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    resolved = load_config(None, ["--output-dir", str(tmp_path / "run")], {})
    local.launch(resolved)
    wanted = [{"LOCAL_RANK": str(at), "LOCAL_WORLD_SIZE": "4", "OMP_NUM_THREADS": "3"} for at in range(4)]
    assert started == wanted
    assert "4 of 8 GPUs work: 8 workers" in capsys.readouterr().err


def _shared(mesh: Mesh, identities: list[str]) -> str:
    try:
        check_own(identities[mesh.rank], mesh.world_size)
    except UserError as error:
        return str(error)
    return ""


def test_workers_that_see_the_same_gpu_are_refused_on_every_rank(pool: Pool) -> None:
    assert pool.world(3, _shared, ["a", "b", "c"]) == ["", "", ""]
    found = pool.world(3, _shared, ["a", "b", "a"])
    assert len(set(found)) == 1
    assert found[0].startswith("3 workers: they see 2 GPUs, and each takes one; ")


@pytest.mark.parametrize(
    ("count", "driver", "verdict", "found"),
    [
        (0, False, "ok", "none: workers compute on the cores"),
        (0, True, "warn", "a driver, but none that torch can use"),
        (1, True, "ok", "1, one a worker: G0"),
        (3, True, "ok", "3, one a worker: G0, G1, G2"),
    ],
)
def test_the_doctor_sees_the_gpus(
    count: int, driver: bool, verdict: str, found: str, sees, monkeypatch: pytest.MonkeyPatch
) -> None:
    sees(count)
    monkeypatch.setattr(devices, "has_driver", lambda: driver)
    monkeypatch.setattr(devices, "describe", lambda count: [f"G{at}" for at in range(count)])
    finding = doctor._gpus()
    assert (finding.verdict, finding.found) == (verdict, found)
    assert bool(finding.remedy) == (verdict != "ok")


def test_groups_exchange_by_the_device_that_was_chosen(pool: Pool, sees) -> None:
    """On a machine with GPUs, workers on the cores do not start NCCL."""
    assert pool.world(1, _backend) == ["gloo"]


def _backend(mesh: Mesh) -> str:
    assert mesh.device == torch.device("cpu")
    return str(dist.get_backend(mesh.group))
