"""The rules of the code that a machine can check: which way imports go, who may know a heavy dependency, how large things grow."""

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
    "fsspec": "train/checkpoint/mirror.py",
    "webdataset": "train/data/corpus/shards.py",
    "transformers": "train/pretrained/export.py",
    "plotly": "review/html/page.py",
    "matplotlib": "review/figures.py",
    "sklearn": "review/importance.py",
    "scipy": "review/scaling/scaling_law.py",
    "optuna": "cluster/sweep/search.py",
}
"""Who alone may import a heavy dependency; replacing one is a change to one place."""

MAX_LINES, MAX_STATEMENTS, MAX_ARGUMENTS = 400, 40, 6
"""Triton's kernels are excepted; what registered ops and the public ops over them take is flat: tensors and numbers."""


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


def test_private_api_of_ray_is_used_in_one_module():
    """Ray may change it in any release: ``ray_internals`` gives the reason for each use."""
    private = ("ray._private", "ray._raylet")
    users = {name(file) for file in FILES if any(i.startswith(private) for i in imports(file))}
    assert users == {"cluster/raycluster/ray_internals.py"}


def test_no_modules_import_each_other_in_a_ring():
    modules = {module(f): f for f in FILES}
    edges = {m: {i for i in imports(f) if i in modules and i != m} for m, f in modules.items()}
    # A package's __init__ counts only where it is named itself: importing a sibling is no ring.
    done: set[str] = set()

    def visit(at: str, path: tuple[str, ...]) -> None:
        assert at not in path, " -> ".join([*path[path.index(at) :], at])
        if at not in done:
            for to in sorted(edges[at]):
                visit(to, (*path, at))
            done.add(at)

    for start in sorted(modules):
        visit(start, ())


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
    """Loop, engine, checkpoint, loader, objectives, cluster: none imports a family, or has its name or its class's in its code."""
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
