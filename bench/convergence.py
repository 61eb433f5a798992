"""`python -m bench.convergence [case ...]`: the loss of every strategy and codec at equal tokens, on the main recipe.

All cases train the model of the main job on the same windows in the same order, as so many workers on this machine;
only how they agree differs. The number is the validation loss at the end, against that of synchronous training.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from bench import corpus, machine
from bench.jobs import SHOAL
from bench.report import table

BASELINE = "allreduce"
# Of each case the flags beside the recipe, and by how much its loss may be higher (None: not promised).
CASES: dict[str, tuple[str, float | None]] = {
    BASELINE: ("--strategy allreduce", None),
    **{
        f"allreduce-{codec}": (f"--strategy allreduce --codec {codec}", None if codec in ("bf16", "fp16") else 0.02)
        for codec in ("bf16", "fp16", "int8", "int4")
    },
    "allreduce-sign": ("--strategy allreduce --codec sign --codec-warmup 200", 0.02),
    "allreduce-topk": ("--strategy allreduce --codec topk --density 0.1 --codec-warmup 200", 0.02),
    "allreduce-randomk": ("--strategy allreduce --codec randomk --density 0.5 --codec-warmup 200", 0.02),
    **{f"allreduce-{codec}-at-once": (f"--strategy allreduce --codec {codec}", None)
       for codec in ("sign", "topk", "randomk")},
    "allreduce-powersgd": ("--strategy allreduce --codec powersgd --rank 16 --codec-warmup 100", 0.02),
    "allreduce-powersgd-4": ("--strategy allreduce --codec powersgd", None),
    "onebit-adam": (
        "--optim onebit-adam --codec sign --codec-momentum 0.9 --codec-warmup 100 --max-grad-norm 0", None
    ),
    "server": ("--strategy server", None),
    "async": ("--strategy async", 0.04),
    "async-after-300": ("--strategy async --guard 1 --guard-steps 300", None),
    "async-after-half": ("--strategy async --guard 1 --guard-steps 200", None),
    "local": ("--strategy local --local-after 300 --sync-every 4", 0.02),
    "diloco": ("--strategy diloco --local-after 300 --sync-every 10", 0.02),
    "local-after-half": ("--strategy local --local-after 200 --sync-every 4", None),
    "diloco-after-half": ("--strategy diloco --local-after 200 --sync-every 10", None),
    "local-from-the-start": ("--strategy local", None),
    "diloco-from-the-start": ("--strategy diloco", None),
    "diloco-int4": ("--strategy diloco --codec int4", None),
    "diloco-streaming": ("--strategy diloco --fragments 4 --overlap-steps 2", None),
    "sparseloco": ("--strategy diloco --codec topk --density 0.03 --two-bits --outer-lr 1 --outer-momentum 0", None),
    "noloco": ("--strategy noloco", None),
    "gossip": ("--strategy gossip", None),
    "demo": ("--strategy demo", None),
}  # fmt: skip


def main() -> None:
    """Run the cases one after the other."""
    parser = argparse.ArgumentParser(prog="python -m bench.convergence", description=__doc__)
    parser.add_argument("cases", nargs="*", metavar="case", help=f"of {', '.join(CASES)}; none = all")
    parser.add_argument("--workers", type=int, default=4, help="as many on this machine (4)")
    parser.add_argument("--flags", default="", help="more flags for all cases")
    options = parser.parse_args()
    unknown = set(options.cases) - set(CASES)
    if unknown:
        parser.error(f"there is no case {', '.join(sorted(unknown))}; cases are {', '.join(CASES)}")
    chosen = [BASELINE, *(case for case in options.cases or CASES if case != BASELINE)]
    with TemporaryDirectory(prefix="shoal-bench-") as work:
        cache = corpus.prepare(Path(work)).cache
        losses = {}
        for case in chosen:
            losses[case] = _loss(CASES[case][0], options, cache, Path(work) / case)
            print(f"{case}: {losses[case]:.4f}", file=sys.stderr, flush=True)
    print("\n".join(f"- {name}: {value}" for name, value in machine.describe().items()))
    print()
    rows = (_row(case, loss / losses[BASELINE] - 1, loss) for case, loss in losses.items())
    print(table(("case", "flags", "eval/loss", "against synchronous", "allowed", ""), rows))


def _loss(flags: str, options: argparse.Namespace, cache: Path, folder: Path) -> float:
    words = [SHOAL, "train", "--cache-dir", str(cache), "--output-dir", str(folder), *flags.split()]
    words += [
        "--nproc-per-node",
        str(options.workers),
        "--save-steps",
        "0",
        "--threads",
        "1",
        *options.flags.split(),
    ]
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    return float(last["eval/loss"])


def _row(case: str, above: float, loss: float) -> tuple[str, ...]:
    allowed = CASES[case][1]
    verdict = "" if allowed is None else "reached" if above <= allowed else "**short**"
    promised = "" if allowed is None else f"{allowed:.0%}"
    return case, f"`{CASES[case][0]}`", f"{loss:.4f}", f"{above:+.2%}", promised, verdict


if __name__ == "__main__":
    main()
