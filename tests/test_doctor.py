"""The doctor sees what is missing, and says what to do about it."""

import json
import os
import shutil
import socket
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata

import pytest
from laws.ports import free_port

from shoal import cli
from shoal.diagnose import doctor, link_probe, peer
from shoal.diagnose.doctor import GIB, Finding
from shoal.errors import ShoalError, UserError

VERDICTS = {"ok", "warn", "fail"}


@pytest.fixture(scope="module")
def findings():
    return doctor.examine(os.environ)


def test_every_area_is_examined_and_every_complaint_has_a_remedy(findings):
    assert {finding.area for finding in findings} == {"hardware", "software", "network"}
    for finding in findings:
        assert finding.verdict in VERDICTS
        assert bool(finding.remedy) == (finding.verdict != "ok"), finding


def test_two_workers_can_talk_on_this_machine(findings):
    names = {finding.name: finding.verdict for finding in findings}
    assert {"latency", "bandwidth"} <= set(names)


def test_text_and_json_say_the_same(findings):
    assert [Finding(**each) for each in json.loads(doctor.as_json(findings))] == findings
    text = doctor.as_text(findings)
    assert all(finding.found in text and finding.remedy in text for finding in findings)


def test_workers_that_cannot_meet_are_a_failure_not_a_hang():
    broken = {**os.environ, "GLOO_SOCKET_IFNAME": "nonesuch0"}
    with pytest.raises(ShoalError, match=r"nonesuch0|interface|device"):
        link_probe.measure_link(broken, timeout=30)


def test_workers_that_take_too_long_are_given_up():
    with pytest.raises(ShoalError, match="did not come to an end"):
        link_probe.measure_link(os.environ, timeout=0.1)


def test_a_failing_network_is_a_finding(monkeypatch):
    def unreachable(environ):
        raise ShoalError("nobody there")

    monkeypatch.setattr(link_probe, "measure_link", unreachable)
    worst = list(doctor._network(os.environ))[-1]
    assert (worst.verdict, worst.found) == ("fail", "nobody there")
    assert "127.0.0.1" in worst.remedy


@pytest.mark.parametrize(
    ("text", "verdict", "found"),
    [
        ("processor: 0\nflags\t\t: fpu avx512_bf16 amx_bf16\n", "ok", "AMX, AVX-512"),
        ("Features\t: fp asimd bf16\n", "ok", "Arm"),
        ("flags\t\t: fpu avx2\n", "warn", "no instructions"),
        (None, "warn", "no instructions"),
    ],
)
def test_bf16_is_read_off_the_processor(tmp_path, text, verdict, found):
    if text is not None:
        (tmp_path / "cpuinfo").write_text(text)
    finding = doctor._bf16(doctor._processor_flags(tmp_path / "cpuinfo"))
    assert finding.verdict == verdict
    assert found in finding.found


@pytest.mark.parametrize(("free", "verdict"), [(50.0, "ok"), (2.0, "warn"), (0.1, "fail")])
def test_a_full_disk(monkeypatch, tmp_path, free, verdict):
    monkeypatch.setattr(shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(0, 0, free * GIB))
    assert doctor._disk("disk", tmp_path / "not" / "there" / "yet").verdict == verdict


def test_packages_are_held_against_what_is_asked_for(monkeypatch):
    wanted = ["numpy", "numpy>=999", "nonesuch-package>=1", "left-out; extra == 'all'"]
    monkeypatch.setattr(metadata, "requires", lambda name: wanted)
    found = [(finding.name, finding.verdict, finding.remedy) for finding in doctor._packages()]
    assert found == [
        ("numpy", "ok", ""),
        ("numpy", "fail", "pip install 'numpy>=999'"),
        ("nonesuch-package", "fail", "pip install 'nonesuch-package>=1'"),
    ]


def test_a_missing_compiler(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    finding = doctor._compiler({})
    assert finding.verdict == "warn"
    assert "g++" in finding.remedy


@pytest.mark.parametrize(("verdict", "code"), [("ok", 0), ("warn", 0), ("fail", 1)])
def test_the_exit_code_says_whether_shoal_will_do(monkeypatch, capsys, verdict, code):
    monkeypatch.setattr(doctor, "examine", lambda environ: [Finding("software", "x", "y", verdict)])
    assert cli.main(["doctor", "--json"]) == code
    assert json.loads(capsys.readouterr().out)[0]["verdict"] == verdict


def both_ends() -> list[list[Finding]]:
    with ThreadPoolExecutor(2) as hosts:
        return list(hosts.map(peer.examine, [f"127.0.0.1:{free_port()}"] * 2))


def test_two_hosts_measure_each_direction_once(monkeypatch):
    monkeypatch.setattr(peer, "MOST", peer.FIRST)
    one, two = ({finding.name: finding for finding in found} for found in both_ends())
    assert one.keys() == two.keys() == {"hosts", "to it", "from it", "latency"}
    assert (one["to it"].found, one["from it"].found) == (two["from it"].found, two["to it"].found)
    assert one["latency"] == two["latency"]
    assert {finding.verdict for finding in (*one.values(), *two.values())} == {"ok"}


def test_a_direction_that_is_blocked_is_found_by_both(monkeypatch):
    monkeypatch.setattr(peer, "MOST", peer.FIRST)
    monkeypatch.setattr(peer, "PATIENCE", 1.0)
    connect, cut = peer._connected, {}

    def blocked(at, listener, outwards):
        """As if packets to the first port that is asked for were lost."""
        target = at[1] if outwards else listener.getsockname()[1]
        return None if target == cut.setdefault("port", target) else connect(at, listener, outwards)

    monkeypatch.setattr(peer, "_connected", blocked)
    found = [{finding.name: finding.verdict for finding in each} for each in both_ends()]
    assert sorted((each["to it"], each["from it"]) for each in found) == [("fail", "ok"), ("ok", "fail")]


def test_who_is_no_doctor_is_one_line():
    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as hosts:
        asked = hosts.submit(peer.examine, f"127.0.0.1:{listener.getsockname()[1]}")
        listener.accept()[0].close()
        with pytest.raises(ShoalError, match="the other host has left, or is no shoal doctor"):
            asked.result()


@pytest.mark.parametrize("place", ["", "here", "here:", ":1", "here:0", "here:x", "here:70000"])
def test_what_is_no_place_is_refused(place):
    with pytest.raises(UserError, match="as in --peer"):
        peer.examine(place or "x")
