"""Rules of the code that a machine can check: direction of imports, fences of dependencies, rooms, names and sizes."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("kernels", "train", "cluster", "review")
FILES = sorted(f for package in PACKAGES for f in (ROOT / package).rglob("*.py"))

FENCES = {
    "triton": "kernels/",
    "deepspeed": "train/engine/",
    "ray": "cluster/",
    "hydra": "train/config/load.py",
    "omegaconf": "train/config/load.py",
    "wandb": "train/reporting/tracking.py",
    "fsspec": ("train/checkpoint/mirror.py", "train/data/sources/remote.py"),
    "pyarrow": "train/data/sources/arrow_tables.py",
    "webdataset": "train/data/corpus/shards.py",
    "transformers": "train/pretrained/export.py",
    "plotly": "review/html/page.py",
    "matplotlib": "review/figures.py",
    "sklearn": "review/importance.py",
    "scipy": "review/scaling/scaling_law.py",
    "optuna": "cluster/sweep/search.py",
}
"""Who alone may import a heavy dependency; replacing one is a change to one place."""

MAX_LINES, MAX_STATEMENTS, MAX_ARGUMENTS, MAX_COLUMNS, MAX_MODULES = 400, 40, 6, 120, 12
"""Triton's kernels are excepted; what registered ops and the public ops over them take is flat: tensors and numbers."""

SAME_MODULE_NAME = {"__init__", "__main__", "evaluate", "generate"}  # verbs in cli/, named after what they call
SAME_CLASS_NAME: set[str] = set()
"""Names that more than one module or class may have, with the reason; those of families and objectives are excepted."""

CODE = sorted(f for folder in (*PACKAGES, "bench", "tests") for f in (ROOT / folder).rglob("*.py"))


def name(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def module(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(file: Path) -> set[str]:
    """Every module that a file imports, wherever in the file: a lazy import is an import."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{name(file)} imports relatively"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("file", FILES, ids=name)
def test_imports_go_one_way(file: Path):
    above = {
        "kernels": {"train", "cluster", "review"},
        "train": {"cluster", "review"},
        "cluster": {"review"},
        "review": {"cluster", "kernels"},
    }[file.relative_to(ROOT).parts[0]]
    tops = {i.split(".")[0] for i in imports(file)}
    assert not tops & (above | {"tests", "bench"})


@pytest.mark.parametrize("file", FILES, ids=name)
def test_each_heavy_dependency_has_one_fence(file: Path):
    tops = {i.split(".")[0] for i in imports(file)}
    assert not [d for d, fence in FENCES.items() if d in tops and not name(file).startswith(fence)]


def test_consoles_take_text_of_users_as_it_is():
    """rich's own console would take ``[/v2]`` in a path for markup; ``UserConsole`` takes no text for it."""
    users = {name(file) for file in FILES if imports(file) & {"rich.console.Console", "rich.markup"}}
    assert users == {"train/reporting/terminal.py"}


def test_private_api_of_ray_is_used_in_one_module():
    """Ray may change it in any release: ``ray_internals`` gives the reason for each use."""
    private = ("ray._private", "ray._raylet")
    users = set()
    for file in FILES:
        users |= {name(file) for module in imports(file) if module.startswith(private)}
    vendored = "cluster/device_health/nvml.py"  # NVIDIA's own bindings, of which Ray carries a copy: no API of Ray's
    assert users == {"cluster/raycluster/ray_internals.py", vendored}


def test_no_modules_import_each_other_in_a_ring():
    modules = {module(f): f for f in FILES}
    # A package's __init__ counts only where it is named itself: importing a sibling is no ring.
    edges = {m: imports(f) & modules.keys() - {m} for m, f in modules.items()}
    assert_no_ring(edges)


@pytest.mark.parametrize("file", FILES, ids=name)
def test_files_and_functions_keep_their_size(file: Path):
    text = file.read_text()
    assert len(text.splitlines()) <= MAX_LINES
    for owner, function in functions(ast.parse(text)):
        decorators = " ".join(ast.unparse(d) for d in function.decorator_list)
        if "triton.jit" in decorators:
            continue
        body = [n for n in ast.walk(function) if isinstance(n, ast.stmt)]
        assert len(body) - 1 <= MAX_STATEMENTS, f"{owner} has {len(body) - 1} statements"
        if name(file).startswith("kernels/"):
            continue
        arguments = [a for a in function.args.posonlyargs + function.args.args if a.arg not in ("self", "cls")]
        assert len(arguments) + len(function.args.kwonlyargs) <= MAX_ARGUMENTS, (
            f"{owner} takes {len(arguments)} arguments"
        )


def functions(tree: ast.AST, owner: str = ""):
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield owner + node.name, node
        yield from functions(node, f"{node.name}." if isinstance(node, ast.ClassDef) else owner)


def test_no_type_checking_imports():
    assert not [name(f) for f in FILES if "TYPE_CHECKING" in f.read_text()]


def test_yaml_files_only_choose_and_set_numbers():
    for file in sorted((ROOT / "conf").rglob("*.yaml")):
        assert len(file.read_text().splitlines()) <= 25, name(file)
        assert "_target_" not in file.read_text(), name(file)


def test_only_its_own_files_and_one_list_know_a_family():
    """No loop, engine, checkpoint, loader, objective or cluster imports a family, or names one or its class in its
    code.
    """
    families = {"decoder": "Decoder", "encoder": "Encoder", "encdec": "EncDec", "recurrent": "Recurrent"}
    own = {f"train/{part}/{family}.py" for part in ("models", "config/keys") for family in families}
    assert own <= {name(file) for file in FILES}
    known = own | {
        "train/config/schema.py",
        "train/models/layers.py",
    }  # the list; and for the type checker what transformers share
    for file in FILES:
        if (
            name(file) in known
            or not name(file).startswith(("train/", "cluster/"))
            or name(file).startswith("train/pretrained/hf/")
        ):
            continue
        nodes = list(ast.walk(ast.parse(file.read_text())))
        said = {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
        said |= {node.attr for node in nodes if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "schema"}
        said |= {part for module in imports(file) if module.startswith("train.") for part in module.split(".")}
        assert not said & {*families, *families.values()}, (
            f"{name(file)} knows {said & {*families, *families.values()}}"
        )


def room(file: Path) -> str:
    """The folder of a module; a module beside rooms, such as ``train/loop.py``, is a room of its own."""
    folder, rooms = file.parent, [f for f in file.parent.iterdir() if (f / "__init__.py").exists()]
    return name(file) if rooms or file.name == "__init__.py" else name(folder)


def packages() -> list[Path]:
    return sorted(f.parent for f in FILES if f.name == "__init__.py")


@pytest.mark.parametrize("package", packages(), ids=name)
def test_a_room_has_at_most_a_dozen_modules(package: Path):
    modules = [f.name for f in package.glob("*.py") if f.stem not in ("__init__", "__main__")]
    assert len(modules) <= MAX_MODULES, f"{name(package)} has {len(modules)} modules: redraw the room"


@pytest.mark.parametrize("package", packages(), ids=name)
def test_a_room_lists_its_modules(package: Path):
    docstring = ast.get_docstring(ast.parse((package / "__init__.py").read_text())) or ""
    listed = {line.split()[0] for line in docstring.splitlines()[1:] if len(line.split()) > 1}
    held = {f.stem for f in package.glob("*.py") if f.stem not in ("__init__", "__main__")}
    held |= {f.parent.name for f in package.glob("*/__init__.py")}
    assert held <= listed, f"the docstring of {name(package)} lacks {sorted(held - listed)}"


def test_rooms_import_each_other_in_no_ring():
    modules = {module(f): f for f in FILES if f.name != "__init__.py"}
    edges: dict[str, set[str]] = {room(f): set() for f in modules.values()}
    for file in modules.values():
        edges[room(file)] |= {room(modules[i]) for i in imports(file) if i in modules} - {room(file)}
    assert_no_ring(edges)


def assert_no_ring(edges: dict[str, set[str]]) -> None:
    done: set[str] = set()

    def visit(at: str, path: tuple[str, ...]) -> None:
        assert at not in path, " -> ".join([*path[path.index(at) :], at])
        if at not in done:
            for to in sorted(edges[at]):
                visit(to, (*path, at))
            done.add(at)

    for start in sorted(edges):
        visit(start, ())


def stems(folder: str) -> set[str]:
    return {file.stem for file in (ROOT / folder).glob("*.py")}


def kinds() -> set[str]:
    """Modules that several rooms have by design: a family's or an objective's keys, module and rows have one name."""
    families = stems("train/config/keys") & stems("train/models")
    objectives = stems("train/objectives") & stems("train/data/examples")
    return families | objectives


def test_module_names_occur_once():
    names = [f.stem for f in FILES if f.stem not in SAME_MODULE_NAME | kinds()]
    assert sorted({stem for stem in names if names.count(stem) > 1}) == []


def test_class_names_occur_once():
    places: dict[str, list[str]] = {}
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ClassDef) and not (file.stem in kinds() and "keys" in file.parts):
                places.setdefault(node.name, []).append(name(file))
    assert {n: files for n, files in places.items() if len(files) > 1 and n not in SAME_CLASS_NAME} == {}


@pytest.mark.parametrize("file", CODE, ids=name)
def test_lines_are_short_and_have_one_comprehension(file: Path):
    text = file.read_text()
    long = [number for number, line in enumerate(text.splitlines(), 1) if len(line) > MAX_COLUMNS]
    assert not long, f"{name(file)}: lines {long} have more than {MAX_COLUMNS} columns"
    comprehensions = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
    lines = [node.lineno for node in ast.walk(ast.parse(text)) if isinstance(node, comprehensions)]
    crowded = sorted({line for line in lines if lines.count(line) > 1})
    assert not crowded, f"{name(file)}: lines {crowded} have more than one comprehension"


@pytest.mark.parametrize("file", FILES, ids=name)
def test_events_are_written_in_one_module(file: Path):
    keys = [key for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Dict) for key in node.keys]
    lines = [key.lineno for key in keys if isinstance(key, ast.Constant) and key.value == "event"]
    assert not lines or name(file) == "train/events.py", f"{name(file)}: events as plain dicts in lines {lines}"


@pytest.mark.parametrize("file", FILES, ids=name)
def test_exit_codes_have_names(file: Path):
    if name(file) == "train/errors.py":
        return
    numeric = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Constant) and node.value in (75, 130) and isinstance(node.value, int):
            numeric.append(node.lineno)
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("sys.exit", "os._exit", "SystemExit", "exit"):
            numeric += [a.lineno for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, int)]
        if isinstance(node, ast.FunctionDef) and node.name in ("main", "run", "worker_main"):
            values = [r.value for r in ast.walk(node) if isinstance(r, ast.Return)]
            numeric += [v.lineno for v in values if isinstance(v, ast.Constant) and type(v.value) is int]
    assert not numeric, f"{name(file)}: lines {numeric} have a number for an ExitCode of train/errors.py"


TEXT_FILES = [file for file in CODE if not name(file).startswith("tests/")]
NO_FILES = ("os", "webbrowser", "console", "tarfile")
"""Receivers of an ``open`` that opens no text file."""


def lacks_encoding(call: ast.Call) -> bool:
    """Whether a call reads or writes text in the encoding of the locale."""
    receiver, _, called = ast.unparse(call.func).rpartition(".")
    keys = {keyword.arg: keyword.value for keyword in call.keywords}
    if "encoding" in keys:
        return False
    if called in ("read_text", "write_text"):
        return len(call.args) < (1 if called == "read_text" else 2)
    if called == "fdopen" or (called == "open" and receiver.rpartition(".")[2] not in NO_FILES):
        place = 0 if called == "open" and receiver else 1
        mode = keys.get("mode", call.args[place] if len(call.args) > place else None)
        return not (isinstance(mode, ast.Constant) and "b" in str(mode.value))
    return any(ast.unparse(keys[key]) == "True" for key in ("text", "universal_newlines") if key in keys)


@pytest.mark.parametrize("file", TEXT_FILES, ids=name)
def test_text_files_and_pipes_name_their_encoding(file: Path):
    """Else it is that of the locale, which need not be UTF-8."""
    calls = [node for node in ast.walk(ast.parse(file.read_text("utf-8"))) if isinstance(node, ast.Call)]
    assert not [call.lineno for call in calls if lacks_encoding(call)]


@pytest.mark.parametrize(
    ("code", "lacks"),
    [
        ("path.read_text()", True),
        ("path.read_text('utf-8')", False),
        ("path.write_text(text)", True),
        ("path.open()", True),
        ("path.open('a')", True),
        ("path.open(mode)", True),
        ("path.open('ab')", False),
        ("open(path, 'w')", True),
        ("open(path, 'rb')", False),
        ("os.fdopen(fd, 'w')", True),
        ("os.open(path, os.O_RDONLY)", False),
        ("subprocess.run(command, text=True)", True),
        ("subprocess.run(command, encoding='utf-8')", False),
        ("Text(text='a')", False),
    ],
)
def test_rule_of_encodings_knows_each_way_to_open(code: str, lacks: bool):
    call = ast.parse(code).body[0].value
    assert lacks_encoding(call) is lacks


@pytest.mark.parametrize("file", FILES, ids=name)
def test_docstrings_say_something(file: Path):
    """Public ones: at least a short sentence, which does not begin with a riddle."""
    poor = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            private = getattr(node, "name", "").startswith("_")
            docstring = "" if private else ast.get_docstring(node)
            if docstring and (docstring.startswith("What") or len(docstring) < 25):
                poor.append(docstring)
    assert not poor, f"{name(file)}: {poor}"


def test_test_names_are_short():
    tests = [n for f in CODE if f.stem.startswith("test_") for n in ast.walk(ast.parse(f.read_text()))]
    names = [n.name for n in tests if isinstance(n, ast.FunctionDef) and n.name.startswith("test_")]
    assert [n for n in names if len(n) >= 70] == []
