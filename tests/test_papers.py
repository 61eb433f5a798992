"""The papers tell the truth: file tree, loop, commands, links, and the names of the numbers."""

import re
import shlex
import subprocess
import textwrap
from pathlib import Path

import pytest

from shoal import cli
from shoal.config.flags import flag_settings

ROOT = Path(__file__).parents[1]
READMES = ["README.md", "README.zh-CN.md"]
TRANSLATED = {
    "README.md": "README.zh-CN.md",
    "docs/tutorial.md": "docs/zh/tutorial.md",
    "docs/how-to.md": "docs/zh/how-to.md",
}
PAPERS = sorted(str(path.relative_to(ROOT)) for path in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
CONFIGURED = {"train", "prepare", "evaluate"}  # verbs whose flags are the settings


def text(paper: str) -> str:
    return (ROOT / paper).read_text(encoding="utf-8")


def blocks(paper: str, language: str) -> list[str]:
    """What stands in the fenced blocks of a language, without their indentation."""
    fenced = re.findall(r"^( *)```(\w*)\n(.*?)^\1```$", text(paper), re.DOTALL | re.MULTILINE)
    return [textwrap.dedent(block) for _, spoken, block in fenced if spoken == language]


def tree(paper: str) -> list[str]:
    """The paths of the list of files: a name and its purpose a line, folders end in a slash."""
    (block,) = [block for block in blocks(paper, "") if block.startswith("shoal/\n")]
    folders: list[str] = []
    files = []
    for line in block.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        name, _, purpose = line.strip().partition(" ")
        del folders[depth:]
        if name.endswith("/"):
            folders.append(name)
        else:
            assert purpose.strip(), f"{paper} does not say what {name} is for"
            files.append("".join([*folders, name]))
    return files


@pytest.mark.parametrize("paper", ["docs/architecture.md", "docs/zh/architecture.md"])
def test_the_file_tree_is_that_of_the_repository(paper):
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "shoal"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert sorted(tree(paper)) == sorted(listed.stdout.split())


@pytest.mark.parametrize("paper", READMES)
def test_the_loop_is_the_one_that_runs(paper):
    (loop,) = [block for block in blocks(paper, "python") if block.startswith("for number in")]
    source = (ROOT / "shoal" / "training" / "loop.py").read_text(encoding="utf-8")
    assert textwrap.indent(loop, " " * 8) in source


@pytest.mark.parametrize("paper", READMES)
def test_the_session_is_that_of_the_example(paper):
    (session,) = [block for block in blocks(paper, "python") if block.startswith("with shoal.Session")]
    assert session in (ROOT / "examples" / "own_loop.py").read_text(encoding="utf-8")


@pytest.mark.parametrize("paper", PAPERS)
def test_links_lead_somewhere(paper):
    for target in re.findall(r"\]\(([^)\s]+)\)", text(paper)):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        linked = (ROOT / paper).parent / file if file else ROOT / paper
        assert linked.exists(), f"{paper} links to {target}"
        if anchor:
            assert anchor in anchors(linked), f"{paper} links to {target}"


def anchors(paper: Path) -> set[str]:
    """The names that headings of a page can be linked by."""
    headings = re.findall(r"^#+ (.+)$", paper.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands(paper: str) -> list[list[str]]:
    """The words of every `shoal VERB ...` in the shell blocks of a paper."""
    lines = "\n".join(blocks(paper, "bash")).splitlines()
    called = [re.search(r"\bshoal ((?:%s)\b.*)" % "|".join(cli.VERBS), line) for line in lines]  # noqa: UP031
    ended = [re.split(r" (?:\||&|>|2>|&&|\|\|)(?: |$)", match[1])[0] for match in called if match]
    return [shlex.split(command, comments=True) for command in ended]


@pytest.mark.parametrize("paper", PAPERS)
def test_every_flag_of_a_command_exists(paper):
    for verb, *words in commands(paper):
        flags = [word for word in words if word.startswith("--")]
        if verb in CONFIGURED:
            flag_settings(words[words.index(flags[0]) :] if flags else [])
        elif flags:
            assert set(flags) <= set(re.findall(r'"(--[a-z-]+)"', cli_source())), f"{paper}: {verb} {flags}"


def cli_source() -> str:
    return (ROOT / "shoal" / "cli.py").read_text(encoding="utf-8")


@pytest.mark.parametrize("english", TRANSLATED)
def test_a_translation_shows_the_same_commands(english):
    assert blocks(TRANSLATED[english], "bash") == blocks(english, "bash")


def test_every_number_in_the_metrics_is_explained():
    name = r"(?:train|eval|perf|mem|sync)/[a-z_]+"
    page = text("docs/explanation.md").partition("## The numbers")[2] + text("docs/strategies.md")
    rows = re.findall(r"^\| (`[a-z]+/[^|]+) \|", page, re.MULTILINE)
    explained = {found for row in rows for found in re.findall(f"`({name})`", row)}
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "shoal").rglob("*.py")]
    written = {found for source in sources for found in re.findall(rf'"({name})": ', source)}
    assert explained == written


def test_every_message_of_the_guide_is_one_of_the_code():
    """The longest part of each message that holds no placeholder stands in the source, as written."""
    source = " ".join(path.read_text(encoding="utf-8") for path in (ROOT / "shoal").rglob("*.py"))
    rows = text("docs/how-to.md").partition("## Error messages")[2].splitlines()[5:]
    messages = [message for row in rows if row for message in re.findall(r"`([^`]+)`", row.split("|")[1])]
    assert len(messages) > 30
    for message in messages:
        longest = max(re.split(r"\.\.\. ?|SIGKILL|\.txt", message), key=len).strip()
        assert longest in source, f"no error says {message!r}"
