"""Ranks meet only with those of their own run, and all learn what is not alike among them."""

import itertools
import json
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
from laws.ports import free_port

from shoal.engines.environment import use_interface
from shoal.errors import UserError
from shoal.wire import cards, hosts, meeting
from shoal.wire.hosts import Host, Interface
from shoal.wire.meeting import Met
from shoal.wire.rendezvous import Rendezvous

Came = list[Met | UserError]


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for a day."""
    monkeypatch.setattr(meeting, "JOIN", timedelta(seconds=20))


def come(place: Rendezvous, facts: dict[str, str]) -> Met | UserError:
    try:
        store = meeting.open_store(place)
        found = meeting.meet(store, place, facts)
    except UserError as refused:
        return refused
    meeting.part(store, place)
    return found


def meet(*places: Rendezvous, facts: tuple[dict[str, str], ...] = ()) -> Came:
    """How each fared that came to the same port."""
    with ThreadPoolExecutor(len(places)) as threads:
        said = facts or ({},) * len(places)
        return list(threads.map(come, places, said))


def world(size: int, **different: Any) -> list[Rendezvous]:
    port = free_port()
    return [Rendezvous(rank, size, port=port, token="fish", **different) for rank in range(size)]


def test_all_learn_the_same_of_what_is_not_alike() -> None:
    facts = (
        {"--lr": "1", "--seed": "7"},
        {"--lr": "1", "--seed": "8", "--new": "x"},
        {"--lr": "2", "--seed": "9"},
    )
    found = meet(*world(3), facts=facts)
    assert all(isinstance(each, Met) for each in found)
    assert found[0] == found[1] == found[2]
    assert isinstance(found[0], Met)
    told = {each.name: (each.rank, each.value, each.first_value) for each in found[0].differences}
    assert told == {"--seed": (1, "8", "7"), "--new": (1, "x", ""), "--lr": (2, "2", "1")}


def test_another_version_of_shoal_is_a_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    own = cards.own_card
    other: Callable[..., cards.Card] = lambda place, facts: replace(  # noqa: E731
        card := own(place, facts), facts=dict(card.facts) | ({"shoal's version": "0"} if place.rank else {})
    )
    monkeypatch.setattr(meeting, "own_card", other)
    found = meet(*world(2))[1]
    assert isinstance(found, Met)
    assert [each.name for each in found.differences] == ["shoal's version"]


@pytest.mark.parametrize(
    ("change", "said"),
    [({"token": "bait"}, "another SHOAL_TOKEN"), ({"world_size": 3}, "it expects 2 workers")],
)
def test_who_is_of_another_run_is_refused_and_the_run_goes_on(change: dict[str, Any], said: str) -> None:
    first, second = world(2)
    stranger = replace(second, **change)
    with ThreadPoolExecutor(1) as threads:
        kept = threads.submit(come, first, {})
        refused = come(stranger, {})
        assert isinstance(refused, UserError)
        assert said in str(refused)
        assert isinstance(come(second, {}), Met)
        assert isinstance(kept.result(), Met)


def test_a_stranger_who_does_not_look_is_turned_away_and_named(capsys: pytest.CaptureFixture[str]) -> None:
    """It writes its card though the meeting is not its own."""
    first, second = world(2)
    with ThreadPoolExecutor(1) as threads:
        kept = threads.submit(come, first, {})
        store = meeting.open_store(second)
        card = cards.own_card(replace(second, token="bait"), {})
        store.set("here/1", replace(card, host=Host("intruder", "x", "")).as_text())
        while store.check(["here/1"]):
            pass
        assert isinstance(come(second, {}), Met)
        assert isinstance(kept.result(), Met)
    assert "turned away: worker 1 on intruder does not have this run's SHOAL_TOKEN" in capsys.readouterr().err


def test_two_of_one_rank_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, third = world(3)
    pids = itertools.count()
    monkeypatch.setattr(cards, "os", SimpleNamespace(getpid=lambda: next(pids)))
    with ThreadPoolExecutor(2) as threads:
        others = [threads.submit(come, first, {}), threads.submit(come, second, {})]
        store = meeting.open_store(second)
        while not store.check(["here/1"]):
            pass
        refused = come(second, {})
        assert "has this rank" in str(refused)
        assert isinstance(come(third, {}), Met)
        assert all(isinstance(each.result(), Met) for each in others)


def test_a_port_that_is_taken_is_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        place = Rendezvous(0, 2, port=listener.getsockname()[1])
        with pytest.raises(UserError, match="another process has it"):
            meeting.open_store(place)


def test_what_listens_and_is_no_store_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes connections, and ends each."""
    monkeypatch.setattr(meeting, "ANSWER", meeting.WORD / 5)
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def hang_up() -> None:
            while True:
                try:
                    listener.accept()[0].close()
                except OSError:
                    return

        threading.Thread(target=hang_up, daemon=True).start()
        with pytest.raises(UserError, match="no store of torch"):
            meeting.open_store(Rendezvous(1, 2, port=listener.getsockname()[1]))
        listener.shutdown(socket.SHUT_RDWR)


def test_what_is_written_to_the_port_by_others_does_no_harm() -> None:
    first, second = world(2)
    with ThreadPoolExecutor(1) as threads:
        kept = threads.submit(come, first, {})
        meeting._await_store(second)
        with socket.create_connection((first.address, first.port)) as other:
            other.sendall(b"GET / HTTP/1.1\r\n\r\n" * 100)
        assert isinstance(come(second, {}), Met)
        assert isinstance(kept.result(), Met)


@pytest.mark.parametrize("text", ["", "{}", "[1]", json.dumps({"host": {}}), "\x00"])
def test_a_card_that_is_none_is_none(text: str) -> None:
    assert cards.read_card(text) is None


def test_the_interface_is_the_one_that_reaches_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host's own name may mean its loopback: rank 0 then takes the way to the first rank elsewhere."""
    ways = {"127.0.1.1": Interface("lo", "127.0.0.1"), "10.0.0.2": Interface("eth1", "10.0.0.1")}
    monkeypatch.setattr(hosts, "towards", ways.get)
    both = [Host("a", "A", ""), Host("b", "B", "10.0.0.2")]
    assert hosts.way_to_others(both, 0, "127.0.1.1") == ways["10.0.0.2"]
    assert hosts.way_to_others(both[:1] * 2, 0, "127.0.1.1") == ways["127.0.1.1"]


def test_an_interface_that_the_user_names_stays() -> None:
    environ = {"NCCL_SOCKET_IFNAME": "ib0"}
    use_interface("eth1", environ)
    assert environ == {"NCCL_SOCKET_IFNAME": "ib0", "GLOO_SOCKET_IFNAME": "eth1"}


def test_the_way_to_loopback_is_loopback() -> None:
    found = hosts.towards("127.0.0.1")
    assert found is not None
    assert found.is_loopback
    assert hosts.this_host("127.0.0.1", 1).address == ""
