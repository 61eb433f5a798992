"""Several hosts, each a network namespace: a run says on every host what is wrong, ends as asked, and leaves nothing.

The commands are real ones, forked from the pool, with the variables that torchrun or Slurm set. A wait is said after
SOON seconds here, of ten elsewhere.
"""

import signal
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from laws.hosts import Host, network, set_link, shoal_on
from laws.launches import BATCH, flags
from laws.pool import HANG, Pool, Started

from shoal.errors import BAD_INPUT, DONE, FAILED, INTERRUPTED, PREEMPTED

SOON = 3.0
ENDLESS = ["--max-steps", "100000", "--save-steps", "20", "--eval-steps", "0"]
NAMES = ["10.77.0.1 host0\n10.77.0.2 host1"] * 2
STRATEGIES = ["allreduce", "diloco", "gossip", "async"]
EACH_WAITS = ["allreduce", "diloco", "gossip"]  # in async those who compute on servers of their own do not


@pytest.fixture(scope="module")
def hosts() -> Iterator[list[Host]]:
    with network(2) as made:
        yield made


class Launch:
    """One command a host."""

    def __init__(self, pool: Pool, hosts: list[Host], data: list[str], run: Path) -> None:
        self.pool, self.hosts, self.run = pool, hosts, run
        self.words = ["train", *data, *BATCH, "--output-dir", str(run)]
        self.started: list[Started] = []

    def start(
        self,
        *words: str,
        on: int,
        names: list[str] = NAMES,
        patches: dict[str, object] | None = None,
        **environ: str,
    ) -> Started:
        patched = {"shoal.wire.pulse.LONG": SOON, **(patches or {})}
        args = (self.hosts, on, names[on], [*self.words, *words], environ, patched)
        self.started += self.pool.start(shoal_on, *args)
        return self.started[-1]

    def both(self, *words: str, **environ: str) -> list[Started]:
        return [self.start(*words, on=number, **environ) for number in range(2)]

    def steps(self) -> int:
        file = self.run / "metrics.jsonl"
        return file.read_text().count("\n") if file.exists() else 0

    def wait_for_steps(self, more: int) -> None:
        wanted = self.steps() + more
        until(lambda: self.steps() >= wanted, self.outputs)

    def wait_for(self, text: str, on: int) -> None:
        until(lambda: text in self.started[on].output(), self.outputs)

    def outputs(self) -> str:
        return "\n".join(each.output()[-2000:] for each in self.started)


def until(done: Callable[[], bool], outputs: Callable[[], str]) -> None:
    end = time.monotonic() + HANG
    while not done():
        assert time.monotonic() < end, outputs()
        time.sleep(0.05)


@pytest.fixture
def launch(pool: Pool, hosts: list[Host], data: list[str], tmp_path: Path) -> Iterator[Launch]:
    made = Launch(pool, hosts, data, tmp_path / "run")
    yield made
    for host in hosts:
        set_link(host, up=True)
    for each in made.started:
        for number in (signal.SIGKILL, signal.SIGCONT):
            try:
                each.send(number)
            except ProcessLookupError:
                break


def last_line(text: str) -> str:
    assert "Traceback" not in text, text
    return text.splitlines()[-1]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["--learning-rate", "0.1"],
            "--learning-rate: worker 1 on host1 has 0.1, worker 0 on host0 has 0.01;",
        ),
        (
            ["--strategy", "diloco"],
            "--strategy: worker 1 on host1 has diloco, worker 0 on host0 has allreduce;",
        ),
        (
            ["--model.hidden-size", "32"],
            "model.hidden_size: worker 1 on host1 has 32, worker 0 on host0 has 16;",
        ),
    ],
)
def test_a_setting_that_differs_is_named_with_its_values_and_hosts(
    launch: Launch, words: list[str], said: str
) -> None:
    first, second = launch.start(on=0), launch.start(*words, on=1)
    for ended in (first.wait(), second.wait()):
        assert ended.code == BAD_INPUT, ended.output
        assert said in last_line(ended.output)


def test_other_data_is_named(launch: Launch, tmp_path: Path) -> None:
    (tmp_path / "more.txt").write_text("the moon comes up")
    first, second = launch.start(on=0), launch.start("--data", str(tmp_path / "more.txt"), on=1)
    for ended in (first.wait(), second.wait()):
        assert ended.code == BAD_INPUT, ended.output
        assert "the prepared data: worker 1 on host1 has " in last_line(ended.output)


def test_another_shoal_is_named(launch: Launch) -> None:
    first, second = launch.start(on=0), launch.start(on=1, patches={"shoal.wire.cards.__version__": "0.0"})
    for ended in (first.wait(), second.wait()):
        assert ended.code == BAD_INPUT, ended.output
        assert "shoal's version: worker 1 on host1 has 0.0, worker 0 on host0 has" in last_line(ended.output)


def test_a_name_that_means_loopback_on_its_own_host_will_do(launch: Launch) -> None:
    """As Debian's installer writes /etc/hosts."""
    names = ["127.0.1.1 host0\n10.77.0.2 host1", "127.0.1.1 host1\n10.77.0.1 host0"]
    both = [launch.start("--max-steps", "3", on=n, names=names, MASTER_ADDR="host0") for n in range(2)]
    for ended in [each.wait() for each in both]:
        assert ended.code == DONE, ended.output
    assert "Network = eth0 (10.77.0.1), 2 hosts: host0, host1" in both[0].output()


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({"MASTER_PORT": "29501"}, "waiting for worker 0 at 10.77.0.1:29501 (connection refused)"),
        ({"MASTER_ADDR": "10.77.0.9"}, "waiting for worker 0 at 10.77.0.9:29500 ("),
        ({}, "waiting for worker 0 at 10.77.0.1:29500 (connection refused)"),  # it has not come
    ],
)
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, PREEMPTED), (signal.SIGINT, INTERRUPTED)])
def test_who_waits_for_the_first_says_so_and_ends_when_asked(
    launch: Launch, environ: dict[str, str], said: str, number: signal.Signals, code: int
) -> None:
    soon = {"shoal.wire.meeting.WORD": timedelta(seconds=1)}
    alone = launch.start(on=1, patches=soon, **environ)
    launch.wait_for(f"shoal: {said}", on=0)
    alone.send(number)
    ended = alone.wait()
    assert ended.code == code, ended.output
    assert last_line(ended.output).startswith("shoal: ")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, PREEMPTED), (signal.SIGINT, INTERRUPTED)])
def test_the_first_says_who_is_missing(launch: Launch, number: signal.Signals, code: int) -> None:
    alone = launch.start(on=0, patches={"shoal.wire.meeting.WORD": timedelta(seconds=1)})
    launch.wait_for("shoal: waiting for 1 of 2 workers (worker 1) at 10.77.0.1:29500, for ", on=0)
    alone.send(number)
    assert alone.wait().code == code


@pytest.mark.parametrize("strategy", EACH_WAITS)
def test_a_peer_that_is_stopped_is_named_and_goes_on_when_it_can(launch: Launch, strategy: str) -> None:
    first, second = launch.both(*ENDLESS, *flags(strategy))
    launch.wait_for_steps(20)
    second.send(signal.SIGSTOP)
    launch.wait_for("waiting for worker 1 on host1 (silent) in ", on=0)
    second.send(signal.SIGCONT)
    launch.wait_for_steps(20)
    for each in (first, second):
        each.send(signal.SIGTERM)
    for ended in (first.wait(), second.wait()):
        assert ended.code == PREEMPTED, ended.output
        assert "stopped at step" in last_line(ended.output)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, PREEMPTED), (signal.SIGINT, INTERRUPTED)])
def test_who_waits_for_a_peer_that_is_stopped_ends_when_asked(
    launch: Launch, strategy: str, number: signal.Signals, code: int
) -> None:
    first, second = launch.both(*ENDLESS, *flags(strategy))
    launch.wait_for_steps(20)
    second.send(signal.SIGSTOP)
    if strategy in EACH_WAITS:
        launch.wait_for("waiting for worker 1 on host1 (silent) in ", on=0)
    first.send(number)
    ended = first.wait()
    assert ended.code == code, ended.output
    last_line(ended.output)
    second.send(signal.SIGCONT)
    left = second.wait() if strategy != "gossip" else None  # it may go on alone
    assert left is None or left.code == FAILED, left.output


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_link_may_be_down_and_come_up_again(launch: Launch, hosts: list[Host], strategy: str) -> None:
    first, second = launch.both(*ENDLESS, *flags(strategy))
    launch.wait_for_steps(20)
    set_link(hosts[1], up=False)
    launch.wait_for("(silent) in ", on=1)
    set_link(hosts[1], up=True)
    launch.wait_for_steps(20)
    for each in (first, second):
        each.send(signal.SIGTERM)
    for ended in (first.wait(), second.wait()):
        assert ended.code == PREEMPTED, ended.output
        assert last_line(ended.output).startswith("shoal: stopped ")


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("dies", [0, 1])
def test_a_death_on_another_host_is_one_line_with_the_last_checkpoint(
    launch: Launch, strategy: str, dies: int
) -> None:
    both = launch.both(*ENDLESS, *flags(strategy))
    launch.wait_for_steps(30)
    both[dies].send(signal.SIGKILL)
    if dies == 1 and strategy in ("gossip", "async"):  # the other can do without it
        launch.wait_for_steps(10)
        both[0].send(signal.SIGTERM)
        assert both[0].wait().code == PREEMPTED
        return
    ended = both[1 - dies].wait()
    assert ended.code == FAILED, ended.output
    line = last_line(ended.output)
    assert f"worker {dies} on host{dies} is gone: its process has ended, in " in line
    assert f"; go on from {launch.run / 'checkpoint-'}" in line
