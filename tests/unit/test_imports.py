"""Who may import whom, held by walking the syntax trees: no code is run, so a breach is found before it can bite."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
LEAVES = {"errors", "geometry", "record", "batch", "rng", "weightfile"}

# What each part of ltx2_train may import of ltx2_train, beside itself. A name with a dot allows that module only.
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "rng": set(),
    "geometry": {"errors"},
    "record": {"errors", "geometry"},
    "batch": {"errors", "geometry", "record"},
    "weightfile": {"errors"},
    "data": LEAVES,
    "model": LEAVES,
    "codecs": LEAVES,
    "text": LEAVES,
    "media": LEAVES,
    "diffusion": LEAVES | {"model.modality", "model.patchify"},  # types and layouts; the model comes as an argument
    "distributed": LEAVES | {"model"},
}
BELOW_TRAIN = LEAVES | {"data", "model", "codecs", "text", "media", "diffusion", "distributed"}
ALLOWED |= {"train": BELOW_TRAIN, "evals": BELOW_TRAIN}
ALLOWED["testing"] = BELOW_TRAIN | {"train", "evals"}
ALLOWED["cli"] = ALLOWED["testing"] | {"testing"}

# One library, one door: where each third-party library, or torch package, may be imported. A folder ends in /.
DOORS: dict[str, tuple[str, ...]] = {
    "hydra": ("ltx2_train/cli/",),
    "omegaconf": ("ltx2_train/cli/",),
    "torch.distributed": ("ltx2_train/distributed/", "ltx2_train/testing/"),
    "deepspeed": ("ltx2_train/distributed/zero3.py",),
    "wandb": ("ltx2_train/train/sinks.py",),
    "tqdm": ("ltx2_train/train/sinks.py", "data_prep/"),
    "peft": ("ltx2_train/model/lora.py",),
    "transformers": ("ltx2_train/text/gemma.py",),
    "diffusers": ("ltx2_train/codecs/ltx2.py",),
    "decord": ("ltx2_train/media/video.py",),
    "av": ("ltx2_train/media/",),
    "torchaudio": ("ltx2_train/media/audio.py", "ltx2_train/codecs/mel.py", "ltx2_train/codecs/resample.py"),
    "webdataset": ("ltx2_train/data/", "data_prep/"),
    "PIL": ("ltx2_train/media/",),
    "jinja2": ("ltx2_train/evals/report.py", "ltx2_train/cli/card.py"),
}

# What a module may import while it is being imported. Everything else waits inside the function that uses it.
LIGHT = {"torch", "numpy", "safetensors", "ltx2_train", "data_prep", "conf"} | set(sys.stdlib_module_names)
LIGHT_BY_FOLDER = {"ltx2_train/cli/": {"hydra", "omegaconf"}}


class Import(NamedTuple):
    path: str  # of the importing file, relative to the root
    line: int
    module: str  # absolute, dotted
    lazy: bool  # inside a function, or for type checkers only

    def __str__(self) -> str:
        return f"{self.path}:{self.line} imports {self.module}"


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def imports(path: Path) -> Iterator[Import]:
    """Every import of a file, with `from package import module` resolved to the module where that is a file."""
    name = path.relative_to(ROOT).as_posix()
    yield from _walk(ast.parse(path.read_text(), name), name, lazy=False)


def _walk(node: ast.AST, path: str, lazy: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (Import(path, child.lineno, alias.name, lazy) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            yield from (Import(path, child.lineno, module, lazy) for module in _from_modules(child, path))
        else:
            deferred = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or _is_type_checking(
                child
            )
            yield from _walk(child, path, lazy or deferred)


def _from_modules(node: ast.ImportFrom, path: str) -> Iterator[str]:
    package = path.removesuffix(".py").removesuffix("/__init__").split("/")
    parent = package[: len(package) - node.level + path.endswith("__init__.py")] if node.level else []
    module = ".".join([*parent, *filter(None, [node.module])])
    for alias in node.names:
        inner = ROOT.joinpath(*module.split("."), alias.name)
        is_file = inner.is_dir() or inner.with_suffix(".py").exists()
        is_torch_package = module == "torch" and alias.name == "distributed"
        yield f"{module}.{alias.name}" if is_file or is_torch_package else module


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def is_within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def part_of(path: str) -> str:
    """The part of ltx2_train a file belongs to: a package, or the name of a leaf."""
    return path.split("/")[1].removesuffix(".py")


@pytest.fixture(scope="module")
def all_imports() -> list[Import]:
    return list(dict.fromkeys(found for path in sources("ltx2_train", "data_prep", "conf") for found in imports(path)))


def test_ltx2_train_imports_downward_only(all_imports):
    breaches = []
    for found in all_imports:
        if not found.path.startswith("ltx2_train/") or not is_within(found.module, "ltx2_train"):
            continue
        part, target = part_of(found.path), found.module.removeprefix("ltx2_train").removeprefix(".")
        allowed = ALLOWED.get(part, set()) | {part}
        if target and not any(is_within(target, name) for name in allowed):
            breaches.append(str(found))
    assert not breaches, "\n".join(breaches)


def test_every_part_of_the_package_has_a_rule():
    parts = {part_of(path.relative_to(ROOT).as_posix()) for path in sources("ltx2_train")} - {"__init__"}
    assert parts <= set(ALLOWED)


def test_ltx2_train_never_imports_data_prep(all_imports):
    assert not [str(f) for f in all_imports if f.path.startswith("ltx2_train/") and is_within(f.module, "data_prep")]


def test_the_programs_of_data_prep_do_not_import_each_other(all_imports):
    programs = {path.stem for path in sources("data_prep") if '__name__ == "__main__"' in path.read_text()}
    assert {"pack", "encode", "show", "import_precomputed"} <= programs
    modules = {f"data_prep.{program}" for program in programs}
    assert not [str(f) for f in all_imports if f.path.startswith("data_prep/") and f.module in modules]


def test_a_private_name_stays_in_its_module():
    borrowed = [
        f"{path.relative_to(ROOT)}:{node.lineno} imports {alias.name} of {node.module}"
        for path in sources("ltx2_train", "data_prep", "conf")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.name.startswith("_") and not alias.name.startswith("__")
    ]
    assert not borrowed, "\n".join(borrowed)


@pytest.mark.parametrize("library", sorted(DOORS))
def test_a_library_is_imported_at_its_door_only(library, all_imports):
    doors = DOORS[library]
    outside = [f for f in all_imports if is_within(f.module, library) and not _is_at(f.path, doors)]
    assert not outside, "\n".join(map(str, outside))


def _is_at(path: str, doors: tuple[str, ...]) -> bool:
    return any(path.startswith(door) if door.endswith("/") else path == door for door in doors)


def test_nothing_heavier_than_torch_is_imported_before_it_is_needed(all_imports):
    heavy = []
    for found in all_imports:
        light = LIGHT | set().union(
            *(names for folder, names in LIGHT_BY_FOLDER.items() if found.path.startswith(folder))
        )
        if not found.lazy and found.module.split(".")[0] not in light:
            heavy.append(str(found))
    assert not heavy, "\n".join(heavy)


def test_the_walk_sees_all_forms_of_import(tmp_path):
    text = (
        "import a.b\nfrom torch import distributed as dist\nfrom ltx2_train import errors\n"
        "def f():\n    from ltx2_train.record import Sample\n"
        "if TYPE_CHECKING:\n    import c\nfrom .batch import Batch\n"
    )
    found = list(_walk(ast.parse(text), "ltx2_train/example.py", lazy=False))
    assert [(f.module, f.lazy) for f in found] == [
        ("a.b", False),
        ("torch.distributed", False),
        ("ltx2_train.errors", False),
        ("ltx2_train.record", True),
        ("c", True),
        ("ltx2_train.batch", False),
    ]
