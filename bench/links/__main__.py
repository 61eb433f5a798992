"""`python -m bench.links [cell ...]`: strategies, codecs and peers on links of several speeds, as tables."""

import argparse
import json
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from bench import corpus, links, machine
from bench.jobs import WINDOW, Corpus
from bench.links import report, runs
from bench.links.cells import BASELINE, CELLS, ROUND, Settings
from bench.links.report import Link, Results, Run
from shoal.config.batch import GLOBAL
from shoal.data.shards import TokenStream
from shoal.errors import DONE, INTERRUPTED

EPOCHS = 0.5  # of the built-in corpus, as the main job takes


def main() -> None:
    """Run every cell on every link in turn, so that what else the machine does meets all of them."""
    options = _options()
    _refuse_without_root()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does
    about = machine.describe()
    with TemporaryDirectory(prefix="shoal-links-") as work:
        data = corpus.prepare(Path(work))
        settings = Settings(Path(work), data.cache, options.steps or _recipe_steps(data))
        results = Results(options.hosts, settings.steps, options.loss)
        interrupted = False
        try:
            for link, cell, run in _runs(options, settings):
                results.add(link, cell, run)
                if options.json:
                    options.json.write_text(json.dumps(report.as_json(about, results), indent=1))
        except KeyboardInterrupt:
            interrupted = True
    if results.runs:
        print(report.markdown(about, results), end="")
    sys.exit(INTERRUPTED if interrupted else DONE)


def _runs(options: argparse.Namespace, settings: Settings) -> Iterator[tuple[Link, str, Run]]:
    for turn in range(options.turns):
        for link in options.links:
            for cell in options.cells:
                run = _try(cell, settings, options.hosts, link)
                _say(f"turn {turn + 1} of {options.turns}, {link}: {cell}: {report.one_line(run)}")
                yield link, cell, run


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.links",
        description=links.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("cells", nargs="*", metavar="cell", help=f"of {', '.join(CELLS)}; none = all")
    parser.add_argument(
        "--links", type=_links, default=_links("20,100,unlimited"), help="Mbit/s of each (20,100,unlimited)"
    )
    parser.add_argument("--hosts", type=int, default=2, help="one worker each (2)")
    parser.add_argument("--turns", type=int, default=3, help="how often each is measured (3)")
    parser.add_argument("--steps", type=int, help=f"of the schedule (the recipe's, in rounds of {ROUND})")
    parser.add_argument("--loss", type=float, help="validation loss to reach (2 %% above the end of DDP)")
    parser.add_argument("--json", type=Path, help="where every record of every run is written")
    options = parser.parse_args()
    unknown = set(options.cells) - set(CELLS)
    if unknown:
        parser.error(f"there is no cell {', '.join(sorted(unknown))}; cells are {', '.join(CELLS)}")
    asked = options.cells or list(CELLS)
    options.cells = [BASELINE, *(cell for cell in asked if cell != BASELINE)]
    return options


def _links(text: str) -> list[Link]:
    """`20,100,unlimited`"""
    return [Link(None if word == "unlimited" else float(word)) for word in text.split(",")]


def _refuse_without_root() -> None:
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if missing:
        sys.exit(f"bench.links: {' and '.join(missing)} not found: apt-get install iproute2")
    if os.geteuid() != 0:
        sys.exit("bench.links: network namespaces need root: run it with sudo")


def _recipe_steps(data: Corpus) -> int:
    """The steps of the main job's recipe, in whole rounds of the strategies that have rounds."""
    stream = TokenStream(data.tokenizer.parent, "train")
    return round(EPOCHS * stream.tokens / WINDOW / GLOBAL) // ROUND * ROUND


def _try(cell: str, settings: Settings, hosts: int, link: Link) -> Run:
    """A cell that fails says why and leaves the others their turn."""
    try:
        return runs.run(CELLS[cell], settings, hosts, link.mbit)
    except RuntimeError as error:
        return str(error)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
