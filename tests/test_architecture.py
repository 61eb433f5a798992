"""The rules of the house that a machine can check, on the source text of every module."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from shoal.config.names import facts

PACKAGE = Path(__file__).parents[1] / "shoal"

# Import order is data order: a module imports only what stands above it (or beside it, in its own folder).
ORDER = """
    errors system config tensors data models tasks wire cost optim layouts codecs replica shares servers sync
    checkpoint observe training engines session serve api trainer diagnose cli __main__
""".split()  # noqa: SIM905

SPEAKS_TO_RANKS = {"wire", "layouts", "engines", "checkpoint"}
READS_ENVIRONMENT = {"engines", "cli", "config"}
SETS_ENVIRONMENT = "data/pool.py"  # for a library that has its setting from nowhere else

# The modules of shoal/config/ that hold and fill the record; reading a setting there is not using it.
RECORD = {
    "__init__",
    "record",
    "section",
    "strategy",
    "values",
    "names",
    "flags",
    "sources",
    "resolve",
    "reference",
    "options",
}

UNPICKLERS = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "joblib", "marshal"}
UNPICKLING_CALLS = {
    "torch.load",
    "torch.save",
    "pandas.read_pickle",
    "yaml.load",
    "yaml.unsafe_load",
    "yaml.full_load",
    "broadcast_object_list",
    "all_gather_object",
    "gather_object",
    "scatter_object_list",
    "send_object_list",
    "recv_object_list",
}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


each_module = pytest.mark.parametrize("path", modules(), ids=name_of)


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def part(path: Path) -> str:
    """The module or folder right below shoal/ that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[str]:
    """The dotted names a module imports, wherever in it."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}:{node.lineno} imports relatively"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def dotted(node: ast.AST) -> str:
    """`np.random.rand` of the expression that says so; empty for any other."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        base = dotted(node.value)
        return f"{base}.{node.attr}" if base else node.attr
    return ""


def place(name: str) -> int:
    """Where `observe.observer.Observer` stands in ORDER, by the nearest module or folder that does."""
    parts = name.split(".")
    known = [".".join(parts[:length]) for length in range(len(parts), 0, -1)]
    assert set(known) & set(ORDER), f"say in ORDER where {name} stands"
    return next(ORDER.index(each) for each in known if each in ORDER)


@each_module
def test_a_module_imports_only_what_stands_above_it(path):
    name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    if name == "__init__":
        return
    own = [each.removeprefix("shoal.") for each in imports(path) if each.startswith("shoal.")]
    below = [each for each in own if not each.startswith("__") and place(each) > place(name)]
    assert not below, f"shoal.{name} imports what stands below it: {', '.join(below)}"


@each_module
def test_only_a_few_speak_to_other_ranks(path):
    names = {*imports(path), *(dotted(node) for node in ast.walk(tree(path)))}
    speaks = any(name.startswith("torch.distributed") for name in names)
    assert not speaks or part(path) in SPEAKS_TO_RANKS


@each_module
def test_only_engines_and_the_command_line_read_the_environment(path):
    """Handing it on whole to a child process, `{**os.environ, ...}`, is not reading it."""
    if part(path) in READS_ENVIRONMENT or name_of(path) == SETS_ENVIRONMENT:
        return
    ways = {"os.environ", "os.getenv", "os.environb", "os.putenv"}
    nodes = list(ast.walk(tree(path)))
    spreads = [node for node in nodes if isinstance(node, ast.Dict)]
    handed_on = {
        value for node in spreads for key, value in zip(node.keys, node.values, strict=True) if key is None
    }
    read = [
        f"{name_of(path)}:{node.lineno}" for node in nodes if dotted(node) in ways and node not in handed_on
    ]
    assert not read, f"reads the environment at {', '.join(read)}"
    assert not ways & set(imports(path))


@each_module
def test_nothing_unpickles_or_runs_what_it_reads(path):
    assert not {name.split(".")[0] for name in imports(path)} & UNPICKLERS
    for node in ast.walk(tree(path)):
        if not isinstance(node, ast.Call):
            continue
        called = dotted(node.func)
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        where = f"{name_of(path)}:{node.lineno} {called}"
        assert called not in {"eval", "exec"}, where
        assert not any(called == call or called.endswith(f".{call}") for call in UNPICKLING_CALLS), where
        assert given.get("trust_remote_code", "False") == "False", where
        if called in {"np.load", "numpy.load"}:
            assert given.get("allow_pickle") == "False", where
        assert given.get("allow_pickle", "False") == "False", where


@each_module
def test_what_is_public_is_typed_and_documented(path):
    assert ast.get_docstring(tree(path)), "the module has no docstring"
    for node in public(tree(path)):
        where = f"{name_of(path)}:{node.lineno} {node.name}"
        assert ast.get_docstring(node) or node in overrides(), f"{where} has no docstring"
        if isinstance(node, ast.ClassDef):
            continue
        arguments = node.args
        every = [
            *arguments.posonlyargs,
            *arguments.args,
            *arguments.kwonlyargs,
            arguments.vararg,
            arguments.kwarg,
        ]
        bare = [
            each.arg for each in every if each and not each.annotation and each.arg not in ("self", "cls")
        ]
        assert not bare, f"{where} leaves {', '.join(bare)} untyped"
        assert node.returns, f"{where} has no return type"


def public(scope: ast.Module | ast.ClassDef) -> Iterator[ast.ClassDef | ast.FunctionDef]:
    """The public classes and functions of a module, and the public methods of these classes."""
    for node in scope.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
            yield node
            if isinstance(node, ast.ClassDef):
                yield from public(node)


@cache
def overrides() -> set[ast.AST]:
    """The methods that a base class below shoal/ declares as well, by the names of classes."""
    classes = {
        node.name: node
        for path in modules()
        for node in ast.walk(tree(path))
        if isinstance(node, ast.ClassDef)
    }

    def declared(name: str, below: frozenset[str] = frozenset()) -> set[str]:
        node = classes.get(name)
        if node is None or name in below:
            return set()
        own = {each.name for each in node.body if isinstance(each, ast.FunctionDef)}
        for each in node.body:
            if isinstance(each, ast.Assign | ast.AnnAssign):
                targets = each.targets if isinstance(each, ast.Assign) else [each.target]
                own |= {dotted(target) for target in targets}
        bases = (dotted(base).split(".")[-1] for base in node.bases)
        return own.union(*(declared(base, below | {name}) for base in bases))

    return {
        method
        for path in modules()
        for node in ast.walk(tree(path))
        if isinstance(node, ast.ClassDef)
        for method in node.body
        if isinstance(method, ast.FunctionDef)
        and any(method.name in declared(dotted(base).split(".")[-1]) for base in node.bases)
    }


@cache
def reads() -> set[str]:
    """`train.seed` for each `config.train.seed` or `train.seed` in the code that uses the record."""
    found = set()
    for path in modules():
        if part(path) == "config" and path.stem in RECORD:
            continue
        other = "of a model" if part(path) == "models" else "config"  # there `config` is Hugging Face's
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                base, name = ["", *dotted(node).split(".")][-2:]
                found.add(f"{other if base == 'config' else base}.{name}")
                if base == "options":  # of a strategy or codec
                    found.add(f"strategy.{name}")
    return found


@pytest.mark.parametrize("fact", facts(), ids=lambda fact: fact.key)
def test_every_setting_is_used(fact):
    ways = {fact.key} if fact.primary else {fact.key, f"config.{fact.field}"}
    assert ways & reads(), f"nothing reads {fact.key}: use it or take it away"


@pytest.mark.parametrize(
    "code",
    [
        "import shoal",
        "import shoal.config, shoal.diagnose.doctor, shoal.api",
        "import shoal.engines.local",
        "from shoal.cli import main; main(['--help'])",
        "from shoal.cli import main; main(['train', '--help'])",
        "from shoal.cli import main; main(['config', 'show'])",
    ],
)
def test_nothing_heavy_is_imported_before_it_is_needed(code):
    heavy = "{'torch', 'transformers', 'datasets', 'tokenizers', 'numpy', 'pyarrow'}"
    check = f"import sys; {code}; sys.exit(' '.join({heavy} & set(sys.modules)) or 0)"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, cwd=PACKAGE.parent)
    assert done.returncode == 0, done.stderr


def test_no_module_takes_the_place_of_a_public_name():
    """A module shoal/train.py would make `shoal.train` the module, and `shoal.train(...)` an error."""
    import shoal

    hidden = [
        name for name in shoal.__all__ if (PACKAGE / f"{name}.py").exists() or (PACKAGE / name).exists()
    ]
    assert not hidden, f"a module is called like the public {', '.join(hidden)}: rename it"


def test_the_public_names_are_those_of_their_homes():
    import shoal

    assert shoal.RunConfig.__module__ == "shoal.config.record"
    assert set(shoal.__all__) <= set(dir(shoal))
    with pytest.raises(AttributeError):
        shoal.nonesuch  # noqa: B018


def test_a_worker_does_not_import_torchao() -> None:
    """Which transformers would, for seconds of every start."""
    code = "import sys, shoal.training.jobs; sys.exit('torchao' in sys.modules or 'transformers' not in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


TESTS = Path(__file__).parent


@pytest.mark.parametrize("path", sorted(TESTS.rglob("*.py")), ids=lambda path: str(path.relative_to(TESTS)))
def test_a_test_imports_no_test_module(path: Path) -> None:
    """What tests share stands in modules of its own: else one suite runs with the settings of another."""
    shared = [name for name in imports(path) if any(part.startswith("test_") for part in name.split("."))]
    assert not shared
