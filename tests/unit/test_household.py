"""The house stands alone: nothing points outside the repository, nothing is half done, names say what is there."""

import ast
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("ltx2_train", "data_prep", "conf")
VAGUE_NAMES = {"utils.py", "helpers.py", "common.py", "misc.py"}


def package_files(*suffixes: str) -> list[Path]:
    return sorted(p for package in PACKAGES for p in (ROOT / package).rglob("*") if p.suffix in suffixes)


def lines_matching(pattern: str, paths: list[Path]) -> list[str]:
    expression = re.compile(pattern)
    return [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in paths
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if expression.search(line)
    ]


def test_no_path_of_one_machine_stands_in_the_package():
    assert not lines_matching(
        r"(?<![\w.}])/(root|home|work|tmp|mnt|scratch|opt)/", package_files(".py", ".yaml", ".j2")
    )


def test_nothing_is_half_done():
    unfinished = r"\b(TODO|FIXME|XXX|HACK)\b|raise NotImplementedError|except\s*:\s*pass|except Exception:\s*pass"
    assert not lines_matching(unfinished, package_files(".py", ".yaml", ".j2"))


def test_the_library_logs_and_only_programs_print():
    printing = []
    for path in package_files(".py"):
        if path.relative_to(ROOT).parts[:2] == ("ltx2_train", "cli") or path.parts[-2] == "data_prep":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
                printing.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not printing


def test_files_are_named_for_what_is_in_them():
    vague = [p for p in package_files(".py") if p.name in VAGUE_NAMES]
    assert not vague
    assert not lines_matching(r"^class \w*Manager\b", package_files(".py"))


def test_every_file_says_what_it_is():
    bare = [
        path.relative_to(ROOT).as_posix()
        for path in package_files(".py")
        if path.name != "__init__.py" and not ast.get_docstring(ast.parse(path.read_text()))
    ]
    assert not bare


def test_every_console_script_has_its_function():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    for name, target in scripts.items():
        module, function = target.split(":")
        tree = ast.parse((ROOT / (module.replace(".", "/") + ".py")).read_text())
        names = {n.name for n in tree.body if isinstance(n, ast.FunctionDef)}
        names |= {alias.asname or alias.name for n in tree.body if isinstance(n, ast.ImportFrom) for alias in n.names}
        assert function in names, f"{name}: {target}"


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/README.md"])
def test_links_inside_the_documents_lead_somewhere(document):
    path = ROOT / document
    targets = re.findall(r"\]\((?!https?://|#)([^)#\s]+)", path.read_text())
    missing = [target for target in targets if not (path.parent / target).exists()]
    assert not missing
