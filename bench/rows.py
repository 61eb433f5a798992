"""What is promised of shoal's speed: each row names the jobs it needs and judges what they showed."""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

from bench import export, held, server, startup, tokenizing
from bench.jobs import Corpus, Job, Turn

PEERS = ("handwritten_ddp", "accelerate_loop", "hf_trainer", "fabric_loop")
HAND = "handwritten_ddp"
PRECISIONS = ("float32", "bf16")
# Of each layout the script that has it from torch.
LAYOUTS = {
    "zero2": "handwritten_fsdp",
    "zero3": "handwritten_fsdp",
    "tp": "handwritten_tp",
    "pp": "handwritten_pp",
}

Turns = dict[Job, list[Turn]]
Quantity = Callable[[Turn], float]


@dataclass(frozen=True)
class Verdict:
    """One line of the table."""

    what: str
    measured: str
    required: str
    reached: bool


@dataclass(frozen=True)
class Measured:
    """All there is to judge by."""

    turns: Turns
    corpus: Corpus
    repeats: int

    def median(self, job: Job, quantity: Quantity) -> float:
        """The median over the turns of a job."""
        return median(quantity(turn) for turn in self.turns[job])


@dataclass(frozen=True)
class Row:
    """A promise: the jobs that show it, and how it is read from them."""

    jobs: tuple[Job, ...]
    judge: Callable[[Measured], list[Verdict]]


def _speed(turn: Turn) -> float:
    return turn.tokens_per_second


def _step(turn: Turn) -> float:
    return turn.step_seconds


def _memory(turn: Turn) -> float:
    return turn.peak_gib


def _against_peers(measured: Measured) -> list[Verdict]:
    return [_against_peers_in(measured, precision) for precision in PRECISIONS]


def _against_peers_in(measured: Measured, precision: str) -> Verdict:
    ours = measured.median(Job("shoal", precision), _speed)
    peers = {peer: measured.median(Job(peer, precision), _speed) for peer in PEERS}
    fastest = max(peers, key=lambda peer: peers[peer])
    return _at_least(f"tokens/s against the fastest peer, {precision}", ours, fastest, peers[fastest], 1.0)


def _compiled(measured: Measured) -> list[Verdict]:
    job = Job("shoal", compile=True)
    ours = measured.median(job, _speed)
    seconds = measured.turns[job][0].compile_seconds
    what = f"tokens/s with --compile ({seconds:.0f} s to compile), bf16"
    eager, compiled = (measured.median(Job(HAND, compile=c), _speed) for c in (False, True))
    return [
        _at_least(f"{what}, against eager", ours, HAND, eager, 1.4),
        _at_least(f"{what}, against compiled", ours, HAND, compiled, 1.0),
    ]


def _peaks(measured: Measured) -> list[Verdict]:
    verdicts = []
    for precision in PRECISIONS:
        ours, theirs = (measured.median(Job(tool, precision), _memory) for tool in ("shoal", HAND))
        verdicts.append(
            Verdict(
                f"peak memory of a worker, {precision}",
                f"{ours * 1024:,.0f} MiB, {HAND} {theirs * 1024:,.0f} MiB",
                "no more",
                ours <= theirs,
            )
        )
    return verdicts


OURS_BY_DEFAULT = Job("shoal", precision="default", defaults="shoal train")
TRAINER_BY_DEFAULT = tuple(
    Job("hf_trainer", precision="default", defaults=how) for how in ("python", "torchrun")
)


def _by_default(measured: Measured) -> list[Verdict]:
    ours = measured.median(OURS_BY_DEFAULT, _speed)
    speeds = {job: measured.median(job, _speed) for job in TRAINER_BY_DEFAULT}
    what = "tokens/s, every tool's defaults"
    return [_at_least(what, ours, str(job), speed, 2.0) for job, speed in speeds.items()]


def _exact(measured: Measured) -> list[Verdict]:
    fast, exact = (measured.median(Job("shoal", exact=exact), _step) for exact in (False, True))
    ratio = exact / fast
    shown = f"{ratio:.3f} x ({exact * 1000:,.0f} against {fast * 1000:,.0f} ms)"
    return [Verdict("step time, exact mode against fast mode, bf16", shown, "<= 1.15 x", ratio <= 1.15)]


def _first_step(measured: Measured) -> list[Verdict]:
    seconds = measured.median(OURS_BY_DEFAULT, lambda turn: turn.first_step)
    what = "from `shoal train` to the first step, data prepared, 2 workers"
    return [Verdict(what, f"{seconds:.2f} s", "< 10 s", seconds < 10)]


def _data_wait(measured: Measured) -> list[Verdict]:
    percent = measured.median(Job("shoal"), lambda turn: turn.data_wait_percent)
    return [Verdict("share of a step waiting for data, bf16", f"{percent:.2f} %", "< 1 %", percent < 1)]


def _help(measured: Measured) -> list[Verdict]:
    seconds = median(startup.help_seconds() for _ in range(measured.repeats))
    loaded = startup.loaded_by_import()
    return [
        Verdict("`shoal --help`", f"{seconds:.3f} s", "< 0.3 s", seconds < 0.3),
        Verdict("`import shoal` brings in", ", ".join(loaded) or "nothing heavy", "no torch", not loaded),
    ]


def _tokenizing(measured: Measured) -> list[Verdict]:
    pairs = [tokenizing.both_seconds(measured.corpus) for _ in range(measured.repeats)]
    ours, alone = (median(column) for column in zip(*pairs, strict=True))
    ratio = alone / ours
    shown = f"{ratio:.2f} x ({ours:.2f} s, tokenizers alone {alone:.2f} s)"
    return [Verdict("tokenizing and writing the corpus, all cores", shown, ">= 0.9 x", ratio >= 0.9)]


def _server(measured: Measured) -> list[Verdict]:
    turns = [server.seconds() for _ in range(measured.repeats)]
    times = {way: median(turn[way] for turn in turns) for way in turns[0]}
    raw = times.pop("raw")
    return [
        Verdict(
            f"push and pull of 4 MB at a parameter server, {way}",
            f"{seconds / raw:.2f} x ({seconds * 1000:.1f} ms, gloo alone {raw * 1000:.1f} ms)",
            "<= 1.5 x",
            seconds <= 1.5 * raw,
        )
        for way, seconds in times.items()
    ]


def _layouts(measured: Measured) -> list[Verdict]:
    verdicts = []
    for layout, peer in LAYOUTS.items():
        ours, theirs = (measured.median(Job(tool, layout=layout), _speed) for tool in ("shoal", peer))
        verdicts.append(_at_least(f"tokens/s under {layout}, bf16", ours, peer, theirs, 1.0))
    return verdicts


def _export(measured: Measured) -> list[Verdict]:
    pairs = [export.peak_over_shard(measured.corpus) for _ in range(measured.repeats)]
    peak, shard = (median(column) for column in zip(*pairs, strict=True))
    ratio = peak / shard
    shown = f"{ratio:.2f} x ({peak / 1e6:,.0f} MB above the start, largest shard {shard / 1e6:,.0f} MB)"
    return [
        Verdict("peak memory of `shoal export`, 0.8 GB in pieces of 4 ranks", shown, "< 1.3 x", ratio < 1.3)
    ]


def _held(measured: Measured) -> list[Verdict]:
    """A part without a formula (activations) is no part of the sum."""
    verdicts = []
    for case in held.CASES:
        known = [part for part in held.parts(measured.corpus, case).values() if part["formula"]]
        found, formula = (sum(part[key] for part in known) for key in ("bytes", "formula"))
        shown = f"{found / formula:.3f} x ({found / 1e6:,.1f} MB, by formula {formula / 1e6:,.1f})"
        what = f"parameters, gradients, optimizer state and what is gathered, at the peak of a step, {case}"
        verdicts.append(Verdict(what, shown, "within 5 %", abs(found / formula - 1) <= 0.05))
    return verdicts


def _allowance(measured: Measured) -> list[Verdict]:
    limit, allowance, together, alone = held.within_a_limit(measured.corpus)
    shown = f"exit codes {together}, alone {alone} (allowance {allowance / 1e6:,.0f} MB, limit {limit / 1e6:,.0f} MB)"
    what = "a model of 3 allowances under ZeRO 3 on 4 workers, memory limited by the system"
    return [Verdict(what, shown, "trains; alone it does not", not any(together) and all(alone))]


def _at_least(what: str, ours: float, rival: str, theirs: float, required: float) -> Verdict:
    ratio = ours / theirs
    shown = f"{ratio:.2f} x ({ours:,.0f} against {theirs:,.0f} of {rival})"
    return Verdict(what, shown, f">= {required} x", ratio >= required)


ROWS = {
    "peers": Row(
        tuple(Job(tool, precision) for precision in PRECISIONS for tool in ("shoal", *PEERS)), _against_peers
    ),
    "compile": Row((Job("shoal", compile=True), Job(HAND), Job(HAND, compile=True)), _compiled),
    "memory": Row(tuple(Job(tool, p) for p in PRECISIONS for tool in ("shoal", HAND)), _peaks),
    "defaults": Row((OURS_BY_DEFAULT, *TRAINER_BY_DEFAULT), _by_default),
    "exact": Row((Job("shoal"), Job("shoal", exact=True)), _exact),
    "help": Row((), _help),
    "first-step": Row((OURS_BY_DEFAULT,), _first_step),
    "tokenizing": Row((), _tokenizing),
    "server": Row((), _server),
    "layouts": Row(
        tuple(Job(tool, layout=layout) for layout, peer in LAYOUTS.items() for tool in ("shoal", peer)),
        _layouts,
    ),
    "export": Row((), _export),
    "held": Row((), _held),
    "allowance": Row((), _allowance),
    "data-wait": Row((Job("shoal"),), _data_wait),
}
