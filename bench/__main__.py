"""`python -m bench [row ...]`: measure what is promised, and print the tables of docs/benchmarks.md."""

import argparse
import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from bench import corpus, jobs, machine, report
from bench.rows import ROWS, Measured, Turns


def main() -> None:
    """Run the jobs of the rows asked for in turn, so that what else the machine does meets all of them."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("rows", nargs="*", metavar="row", help=f"of {', '.join(ROWS)}; none = all")
    parser.add_argument("--turns", type=int, default=5, help="how often each is measured (5)")
    parser.add_argument("--json", type=Path, help="where every step of every run is written")
    options = parser.parse_args()
    unknown = set(options.rows) - set(ROWS)
    if unknown:
        parser.error(f"there is no row {', '.join(sorted(unknown))}; rows are {', '.join(ROWS)}")

    rows = [ROWS[name] for name in options.rows or ROWS]
    about = machine.describe()
    with TemporaryDirectory(prefix="shoal-bench-") as work:
        data = corpus.prepare(Path(work))
        turns: Turns = {job: [] for row in rows for job in row.jobs}
        for turn in range(options.turns):
            for job, done in turns.items():
                done.append(jobs.run(job, data))
                _say(f"turn {turn + 1} of {options.turns}: {job} {done[-1].tokens_per_second:,.0f} tokens/s")
        measured = Measured(turns, data, options.turns)
        verdicts = [verdict for row in rows for verdict in row.judge(measured)]
    if options.json:
        options.json.write_text(json.dumps(report.as_json(about, verdicts, turns), indent=1))
    print(report.markdown(about, verdicts, turns, options.turns), end="")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
