"""`shoal` started for real: processes of their own, torchrun, bad input, and what a worker listens on."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from laws.launches import (
    BATCH,
    is_alive,
    ledger_of,
    losses_of,
    shoal,
    shoal_evaluate,
    shoal_train,
    steps_of,
    weights_of,
    workers_of,
)
from laws.pool import HANG, Pool
from laws.worlds import first_difference

from shoal import cli
from shoal.checkpoint import candidates
from shoal.config import load_config
from shoal.engines import local
from shoal.engines.environment import is_worker, placement
from shoal.engines.worker import ERRORS, JOB
from shoal.errors import BAD_INPUT, DONE, PREEMPTED, UserError

COMMON = [*BATCH, "--save-steps", "5", "--ledger"]
RESUME = ["--resume-from-checkpoint", "latest"]


def start(*command: str) -> subprocess.Popen[str]:
    env = os.environ | {"OMP_NUM_THREADS": "1", "SHOAL_DEVICE": "cpu"}
    return subprocess.Popen(
        [sys.executable, "-m", *command], env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def end(process: subprocess.Popen[str]) -> tuple[int, str]:
    """The exit code and everything that was printed."""
    output, _ = process.communicate(timeout=2 * HANG)
    return process.returncode, output


def wait_for_steps(process: subprocess.Popen[str], run: Path, steps: int) -> None:
    deadline = time.monotonic() + 2 * HANG
    while len(losses_of(run)) < steps:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_run_killed_at_a_random_step_goes_on_with_other_workers(data: list[str], tmp_path: Path) -> None:
    words = ["shoal", "train", *data, *COMMON, "--exact", "--output-dir", str(tmp_path), "--max-steps"]
    killed = start(*words, "100000", "--nproc-per-node", "2", "--lr-scheduler-type", "constant")
    wait_for_steps(killed, tmp_path, random.randrange(6, 40))
    workers = workers_of(killed.pid)
    assert len(workers) == 2
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    deadline = time.monotonic() + HANG
    while any(map(is_alive, workers)):
        assert time.monotonic() < deadline, "an orphan is left"
        time.sleep(0.02)
    before = losses_of(tmp_path)
    steps = str(len(before) + 5)
    code, output = end(
        start(*words, steps, "--nproc-per-node", "1", "--lr-scheduler-type", "constant", *RESUME)
    )
    assert code == DONE, output
    assert "resumed from" in output
    assert losses_of(tmp_path)[: len(before)] == before
    assert list(ledger_of(tmp_path)) == list(range(int(steps)))
    code, output = end(start("shoal", "audit", str(tmp_path)))
    assert code == DONE, output
    assert "exactly once" in output


def test_torchrun_starts_the_same_run(pool: Pool, data: list[str], tmp_path: Path) -> None:
    words = ["train", *data, *BATCH, "--max-steps", "4", "--output-dir"]
    torchrun = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m")
    code, output = end(start(*torchrun, "shoal", *words, str(tmp_path / "torchrun")))
    assert code == DONE, output
    ours = pool.alone(shoal, [*words, str(tmp_path / "ours"), "--nproc-per-node", "2"])
    assert ours.code == DONE, ours.output
    assert losses_of(tmp_path / "torchrun") == losses_of(tmp_path / "ours")
    assert first_difference([weights_of(tmp_path / "torchrun")], [weights_of(tmp_path / "ours")]) is None


@pytest.mark.parametrize("verb", ["train", "evaluate"])
def test_a_stop_before_there_are_workers_is_a_stop(
    verb: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setitem(cli.VERBS, verb, lambda words: os.kill(os.getpid(), signal.SIGTERM) or DONE)
    assert cli.main([verb]) == PREEMPTED
    assert capsys.readouterr().err.startswith("shoal: stopped with nothing to save yet")
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_stop_before_python_is_up_is_a_stop(data: list[str], tmp_path: Path) -> None:
    started = start("shoal", "train", *data, *COMMON, "--nproc-per-node", "2", "--output-dir", str(tmp_path))
    deadline = time.monotonic() + HANG
    while len(workers := workers_of(started.pid)) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(0.3)  # the launcher listens; the workers import torch
    started.send_signal(signal.SIGTERM)
    code, output = end(started)
    assert code == PREEMPTED, output
    assert not any(map(is_alive, workers))
    assert "Traceback" not in output


SHADOWS = ("random", "json", "signal", "tempfile", "transformers", "yaml")
FROM_A_THREAD = """
import json, sys, threading
import shoal

def go():
    summary = shoal.train(max_steps=2, nproc_per_node=1, **json.loads(sys.argv[1]))
    print("steps", summary["steps"])

if __name__ == "__main__":
    thread = threading.Thread(target=go)
    thread.start()
    thread.join()
"""


def test_a_run_starts_from_any_thread_and_from_any_folder(data: list[str], tmp_path: Path) -> None:
    """Where Python lets nobody handle signals; among files that are called like modules."""
    folder = tmp_path / "here"
    folder.mkdir()
    for name in SHADOWS:
        (folder / f"{name}.py").write_text("raise RuntimeError('the wrong module')")
    (tmp_path / "script.py").write_text(FROM_A_THREAD)
    flags = dict(zip(data[::2], data[1::2], strict=True)) | {"--output-dir": str(tmp_path / "run")}
    settings = {name.removeprefix("--").replace("-", "_"): value for name, value in flags.items()}
    for words, said in (
        ([str(tmp_path / "script.py"), json.dumps(settings)], "steps 2"),
        (["-m", "shoal", "config", "show"], "train:"),
    ):
        env = os.environ | {"OMP_NUM_THREADS": "1", "SHOAL_DEVICE": "cpu"}
        command = [sys.executable, *words]
        done = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, timeout=2 * HANG)
        assert said in done.stdout, done.stdout + done.stderr


class Launched:
    """Stands for `subprocess.Popen`: the second one cannot be started, the first runs until it is killed."""

    all: ClassVar[list["Launched"]] = []

    def __init__(self, command: list[str], env: dict[str, str], **_: object) -> None:
        if self.all:
            raise OSError(errno.EAGAIN, "Resource temporarily unavailable")
        self.env, self.pid, self.returncode = env, 0, None
        job = Path(env[ERRORS], JOB)
        self.job, self.mode = job.read_text(), job.parent.stat().st_mode & 0o777
        self.all.append(self)

    def poll(self) -> int | None:
        return self.returncode

    def kill(self) -> None:
        self.returncode = -signal.SIGKILL

    def wait(self, timeout: float = 0) -> int:
        if self.returncode is None:
            raise subprocess.TimeoutExpired("worker", timeout)
        return self.returncode


def test_no_worker_is_left_where_the_next_cannot_be_started_and_none_carries_the_configuration(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Of thousands of paths it would not fit into a variable."""
    monkeypatch.setattr(
        local, "subprocess", SimpleNamespace(Popen=Launched, **{"TimeoutExpired": subprocess.TimeoutExpired})
    )
    monkeypatch.setattr(Launched, "all", [])
    paths = [f"corpus/page-{number}-with-a-long-name.txt" for number in range(5000)]
    resolved = load_config(
        None, ["--output-dir", str(tmp_path / "run"), "--nproc-per-node", "2"], {}, data=paths
    )
    with pytest.raises(OSError, match="temporarily unavailable"):
        local.launch(resolved)
    (first,) = Launched.all
    assert first.returncode == -signal.SIGKILL
    assert json.loads(first.job)["config"] == resolved.config.model_dump()
    assert first.mode == 0o700
    assert max(len(f"{name}={value}") for name, value in first.env.items()) < 64 << 10


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


@pytest.fixture(scope="module")
def finished(pool: Pool, data: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run."""
    run = tmp_path_factory.mktemp("finished") / "run"
    assert (
        pool.alone(shoal, ["train", *data, *BATCH, "--max-steps", "2", "--output-dir", str(run)]).code == DONE
    )
    return run


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--output-dir", "{finished}"], "it holds a finished run"),
        (["--nproc-per-node", "0"], "--nproc-per-node 0"),
        (["--nproc-per-node", "5"], "fewer than workers"),
        (["--global-batch-size", "9"], "9 / 2 = 4.5"),
        (
            ["--gradient-accumulation-steps", "3", "--nproc-per-node", "2"],
            "2 per device * 3 accumulation * 2",
        ),
        (["--resume-from-checkpoint", "{finished}/nowhere"], "there is no such folder"),
        (["--balance", "3,2", "--nproc-per-node", "2"], "2 workers share 4 micro-batches"),
        (["--model", "{finished}"], "{finished}: the folder has no config.json"),
        (["--model", "gpt2-tiny", "--model.n_positions", "8"], "takes at most 8 positions"),
        (["--data", "{finished}/nothing.txt"], "nothing.txt"),
        (["--seed", "often"], "--seed"),
    ],
)
def test_bad_input_is_one_line_and_changes_nothing(
    pool: Pool, data: list[str], tmp_path: Path, finished: Path, words: list[str], said: str
) -> None:
    given = ["train", *data, *BATCH, "--max-steps", "2", "--output-dir", str(tmp_path / "new")]
    if "n_positions" in str(words):
        given = given[:1] + given[1:5] + given[given.index("--vocab-size") :]
    before = files_of(finished)
    refused = pool.alone(shoal, [*given, *(word.format(finished=finished) for word in words)])
    assert refused.code == BAD_INPUT, refused.output
    *before_it, line = refused.output.splitlines()
    assert before_it in ([], ["waiting for another process that prepares the same data"])
    assert line.startswith("shoal: error: ")
    assert said.format(finished=finished) in line
    assert files_of(finished) == before
    assert not (tmp_path / "new").exists()


def test_a_folder_is_replaced_only_if_asked_and_only_once_all_fits(
    pool: Pool, data: list[str], tmp_path: Path, finished: Path
) -> None:
    again = ["train", *data, *BATCH, "--output-dir", str(finished), "--overwrite-output-dir", "--max-steps"]
    before = files_of(finished)
    refused = pool.alone(shoal, [*again, "3", "--balance", "3,2", "--nproc-per-node", "2"])
    assert refused.code == BAD_INPUT
    assert files_of(finished) == before
    assert pool.alone(shoal, [*again, "3"]).code == DONE
    assert len(losses_of(finished)) == 3


def test_from_a_checkpoint_elsewhere_another_run_is_replaced_only_if_asked(
    pool: Pool, data: list[str], tmp_path: Path, finished: Path
) -> None:
    words = ["train", *data, *BATCH, "--output-dir", str(tmp_path), "--max-steps"]
    assert pool.alone(shoal, [*words, "3", "--seed", "7"]).code == DONE
    before = files_of(tmp_path)
    words += ["5", "--resume-from-checkpoint", str(finished)]
    refused = pool.alone(shoal, words)
    assert refused.code == BAD_INPUT
    assert "it holds a finished run" in refused.output
    assert files_of(tmp_path) == before
    taken_from = files_of(finished)
    replaced = pool.alone(shoal, [*words, "--overwrite-output-dir"])
    assert replaced.code == DONE, replaced.output
    done = len(losses_of(finished))
    assert [step["step"] for step in steps_of(tmp_path)] == list(range(done + 1, 6))
    assert {path.name for path in candidates(tmp_path)} == {"checkpoint-5"}
    assert files_of(finished) == taken_from


def test_a_second_run_in_the_same_folder_is_refused(pool: Pool, data: list[str], tmp_path: Path) -> None:
    """And the first is not disturbed."""
    words = ["train", *data, *COMMON, "--nproc-per-node", "1", "--output-dir", str(tmp_path), "--max-steps"]
    (started,) = pool.start(shoal, [*words, "100000"])
    deadline = time.monotonic() + HANG
    while not losses_of(tmp_path):
        assert time.monotonic() < deadline, started.output()
        time.sleep(0.02)
    for more in (RESUME, ["--overwrite-output-dir"]):
        refused = pool.alone(shoal, [*words, "5", *more])
        assert refused.code == BAD_INPUT, refused.output
        (line,) = refused.output.splitlines()
        assert "another run is writing there (process" in line
    started.send(signal.SIGTERM)
    assert started.wait().code == PREEMPTED, started.output()
    steps = [step["step"] for step in steps_of(tmp_path)]
    assert steps == list(range(1, len(steps) + 1))
    assert pool.alone(shoal, [*words, str(len(steps) + 1), *RESUME]).code == DONE


def unseen(words: list[str]) -> None:
    """`shoal` with an ASCII stdout whose reader is gone, and without a stderr."""
    reading, writing = os.pipe()
    os.close(reading)
    os.dup2(writing, 1)
    os.close(2)
    sys.stdout = os.fdopen(1, "w", encoding="ascii", closefd=False)
    shoal(words)


def test_training_does_not_depend_on_who_reads(pool: Pool, data: list[str], tmp_path: Path) -> None:
    ended = pool.alone(unseen, ["train", *data, *BATCH, "--max-steps", "4", "--output-dir", str(tmp_path)])
    assert ended.code == DONE
    assert len(losses_of(tmp_path)) == 4
    assert weights_of(tmp_path)
    assert (tmp_path / "summary.json").is_file()


@pytest.mark.parametrize(
    ("setting", "error"),
    [
        ({"data": "nowhere.txt"}, "UserError: --data nowhere.txt: no such file or folder; name a file"),
        ({"model.hidden_size": 15}, "UserError: --model llama-tiny"),
    ],
)
def test_what_a_worker_refuses_python_hears(
    pool: Pool, tmp_path: Path, setting: dict[str, Any], error: str
) -> None:
    refused = pool.alone(
        shoal_train, {"output_dir": str(tmp_path / "run"), "cache_dir": str(tmp_path), **setting}
    )
    assert refused.error.startswith(error)


def listening(pid: int) -> list[str]:
    """The addresses, as the kernel writes them, on which a process accepts TCP connections."""
    links = [entry.readlink().name for entry in Path(f"/proc/{pid}/fd").iterdir()]
    inodes = {link.removeprefix("socket:[").rstrip("]") for link in links if link.startswith("socket:")}
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                found.append(fields[1].rpartition(":")[0])
    return found


def test_workers_listen_on_loopback_alone(pool: Pool, data: list[str], tmp_path: Path) -> None:
    words = [
        "train",
        *data,
        *COMMON,
        "--max-steps",
        "100000",
        "--output-dir",
        str(tmp_path),
        "--nproc-per-node",
        "2",
    ]
    (started,) = pool.start(shoal, words)
    deadline = time.monotonic() + HANG
    while not losses_of(tmp_path):
        assert time.monotonic() < deadline, started.output()
        time.sleep(0.02)
    found = [address for pid in workers_of(started.pid) for address in listening(pid)]
    started.send(signal.SIGTERM)
    assert started.wait().code == PREEMPTED
    loopback = {"0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F"}
    assert len(found) >= 2
    assert set(found) <= loopback


@pytest.mark.parametrize(
    ("environ", "rank", "world_size", "local_rank"),
    [
        ({"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_PORT": "1"}, 1, 4, 1),
        ({"OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "3", "MASTER_PORT": "1"}, 2, 3, 0),
        ({"SLURM_PROCID": "3", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "MASTER_PORT": "1"}, 3, 8, 1),
        ({"RANK": "0", "WORLD_SIZE": "1"}, 0, 1, 0),
    ],
)
def test_who_a_worker_is_follows_from_what_the_engine_set(
    environ: dict[str, str], rank: int, world_size: int, local_rank: int
) -> None:
    assert is_worker(environ)
    place = placement(environ)
    assert (place.rank, place.world_size, place.local_rank) == (rank, world_size, local_rank)


@pytest.mark.parametrize(
    "environ",
    [
        {"RANK": "2", "WORLD_SIZE": "2", "MASTER_PORT": "1"},
        {"RANK": "-1", "WORLD_SIZE": "2", "MASTER_PORT": "1"},
        {"RANK": "0"},
        {"RANK": "0", "WORLD_SIZE": "2"},
        {"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "0"},
        {"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "tcp://10.96.0.1:23456"},
        {"RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": "70000"},
        {"RANK": "0", "WORLD_SIZE": ""},
        {"RANK": "", "WORLD_SIZE": "1"},
        {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "first"},
        {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2x", "MASTER_PORT": "1"},
        {"PMI_RANK": "0", "PMI_SIZE": "9" * 5000, "MASTER_PORT": "1"},
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_LOCALID": "1.0", "MASTER_PORT": "1"},
    ],
    ids=lambda environ: str(environ)[:90],
)
def test_an_environment_at_odds_with_itself_is_refused(environ: dict[str, str]) -> None:
    with pytest.raises(UserError, match="a worker's environment"):
        placement(environ)


def test_words_where_slurm_has_numbers_are_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_NTASKS", "x")
    monkeypatch.setattr(sys, "argv", ["shoal", "train", "--output-dir", "nowhere"])
    monkeypatch.setattr(cli.output, "forgive", lambda: None)  # the streams of this process stay
    with pytest.raises(SystemExit) as left:
        cli.command()
    assert left.value.code == BAD_INPUT
    said = (
        "shoal: error: a worker's environment: SLURM_NTASKS is 'x'; set it to a whole number, or unset it\n"
    )
    assert capsys.readouterr().err == said


def test_an_interface_that_is_not_there_is_refused() -> None:
    given = {"RANK": "0", "WORLD_SIZE": "1", "GLOO_SOCKET_IFNAME": "nonesuch0"}
    with pytest.raises(UserError, match=r"GLOO_SOCKET_IFNAME=nonesuch0: this machine has .*lo"):
        placement(given)
    assert placement(given | {"GLOO_SOCKET_IFNAME": "lo"}).rank == 0


def test_a_machine_without_loopback_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise OSError(errno.ENETUNREACH, "Network is unreachable")

    monkeypatch.setattr(local.socket, "create_connection", unreachable)
    with pytest.raises(UserError, match=r"cannot connect to another on 127.0.0.1 .*unreachable"):
        local.check_loopback()


def test_a_shell_within_a_slurm_job_is_no_worker() -> None:
    assert not is_worker({"SLURM_PROCID": "0", "SLURM_NTASKS": "1"})
    assert not is_worker({})


def test_python_evaluates_what_it_has_trained(pool: Pool, data: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert (
        pool.alone(shoal, ["train", *data, *BATCH, "--max-steps", "2", "--output-dir", str(run)]).code == DONE
    )
    ended = pool.alone(shoal_evaluate, str(run), {"nproc_per_node": 2})
    summary = json.loads((run / "summary.json").read_text())
    assert ended.value == pytest.approx({k: v for k, v in summary.items() if k.startswith("eval/")}), (
        ended.output
    )
