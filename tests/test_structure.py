"""Shape of the package, read from its syntax trees: who writes whose fields, how large classes and functions are."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "nanopd"
TREES = {
    path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_text(encoding="utf-8"))
    for path in sorted(PACKAGE.rglob("*.py"))
}
Function = ast.FunctionDef | ast.AsyncFunctionDef
MAX_CLASS_LINES, MAX_METHODS, MAX_ATTRIBUTES = 320, 30, 20
MAX_FUNCTION_LINES, LONG_MODULE_LINES, MAX_LONG_MODULES, MAX_ROOT_MODULES = 50, 400, 3, 10

# Fields that are written from outside the module of their class, and why that is right.
EXCEPTIONS = {
    ("cuda/launch.py", "value"): "of a structure of ctypes",
    ("cuda/ptx.py", "body"): "of an intrinsic of numba, for the emulator",
    ("ipc/buffers.py", "words"): "shared counters of two processes; Control is how one of them sees them",
    ("ipc/ring.py", "words"): "the same",
}
# What objects of the classes are called that may be written in these rooms.
NAMES = {"Sequence": {"seq", "child", "parent"}, "SlotTable": {"t", "slots", "_slots"}}
ROOMS = {"Sequence": ("core/", "engine/"), "SlotTable": ("core/",)}


def classes() -> Iterator[tuple[str, ast.ClassDef]]:
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                yield name, node


def num_lines(node: ast.stmt) -> int:
    assert node.end_lineno is not None
    return node.end_lineno - node.lineno + 1


def is_record(node: ast.ClassDef) -> bool:
    """Whether it is a dataclass, a tuple or an enumeration: values without rules of their own. A Sequence has some."""
    if node.name in ROOMS:
        return False
    marks = [ast.unparse(mark) for mark in (*node.decorator_list, *node.bases)]
    return any(word in mark for mark in marks for word in ("dataclass", "NamedTuple", "Enum", "Flag"))


def written(tree: ast.AST) -> Iterator[tuple[str, str, int]]:
    """Every attribute that is assigned, changed or deleted: the object's expression, the attribute, the line.

    An element of an attribute that is assigned (`table.column[i] = value`) counts as written too.
    """
    for node in ast.walk(tree):
        targets: list[ast.expr] = []
        if isinstance(node, ast.Assign | ast.Delete):
            targets = list(node.targets)
        elif isinstance(node, ast.AugAssign | ast.AnnAssign):
            targets = [node.target]
        while targets:
            target = targets.pop()
            if isinstance(target, ast.Tuple | ast.List):
                targets += target.elts
            elif isinstance(target, ast.Subscript | ast.Starred):
                targets.append(target.value)
            elif isinstance(target, ast.Attribute):
                yield ast.unparse(target.value), target.attr, target.lineno


def owners() -> dict[str, set[tuple[str, str]]]:
    """Attribute -> (module, class) of each class with rules of its own that sets it on itself."""
    found: dict[str, set[tuple[str, str]]] = {}
    for name, node in classes():
        if not is_record(node):
            declared = [child.target for child in node.body if isinstance(child, ast.AnnAssign)]
            fields = [target.id for target in declared if isinstance(target, ast.Name) and node.name in ROOMS]
            for attribute in fields + [attribute for obj, attribute, _ in written(node) if obj == "self"]:
                found.setdefault(attribute, set()).add((name, node.name))
    return found


def record_fields() -> set[str]:
    return {
        child.target.id
        for _, node in classes()
        if is_record(node) and "frozen" not in ast.unparse(ast.Tuple(node.decorator_list, ast.Load()))
        for child in node.body
        if isinstance(child, ast.AnnAssign) and isinstance(child.target, ast.Name)
    }


def test_fields_are_written_where_their_class_is() -> None:
    """By name: what some class sets on itself is not written from other modules; fields of mutable records may be."""
    found, of_records, wrong = owners(), record_fields(), []
    for name, tree in TREES.items():
        for obj, attribute, line in written(tree):
            of = found.get(attribute, set())
            kind = next((kind for kind, names in NAMES.items() if obj.split(".")[-1] in names), None)
            if kind is not None and kind in {owner for _, owner in of}:
                is_right = name.startswith(ROOMS[kind])
                of = {pair for pair in of if pair[1] == kind}
            else:
                is_right = obj in ("self", "cls") or attribute in of_records or name in {module for module, _ in of}
            if of and not is_right and (name, attribute) not in EXCEPTIONS:
                names = ", ".join(sorted(owner for _, owner in of))
                wrong.append(f"nanopd/{name}:{line} writes {obj}.{attribute} of {names}: call a method instead")
    assert not wrong, "\n".join(wrong)


def test_classes_are_small() -> None:
    wrong = []
    for name, node in classes():
        if name.startswith("cuda/"):
            continue
        methods = [child for child in node.body if isinstance(child, Function)]
        attributes = {attribute for obj, attribute, _ in written(node) if obj == "self"}
        is_bound = not is_record(node) and node.name != "Sequence"
        sizes = {
            "lines": (num_lines(node), MAX_CLASS_LINES),
            "methods": (len(methods), MAX_METHODS),
            "attributes": (len(attributes) if is_bound else 0, MAX_ATTRIBUTES),
        }
        wrong += [f"nanopd/{name}: {node.name} has {n} {what} of {top}" for what, (n, top) in sizes.items() if n > top]
    assert not wrong, "\n".join(wrong)


def test_functions_and_modules_are_short() -> None:
    """But for the factories of CUDA kernels, whose bodies are one kernel each."""
    wrong = []
    for name, tree in TREES.items():
        if not name.startswith("cuda/"):
            functions = [node for node in ast.walk(tree) if isinstance(node, Function)]
            long = [node for node in functions if num_lines(node) > MAX_FUNCTION_LINES]
            wrong += [f"nanopd/{name}:{node.lineno} {node.name} has {num_lines(node)} lines" for node in long]
    lines = {name: len((PACKAGE / name).read_text(encoding="utf-8").splitlines()) for name in TREES}
    modules = [f"nanopd/{name}: {n} lines" for name, n in lines.items() if n > LONG_MODULE_LINES]
    assert not wrong and len(modules) <= MAX_LONG_MODULES, "\n".join(wrong + modules)
    at_root = [name for name in TREES if "/" not in name and name != "__init__.py"]
    assert len(at_root) <= MAX_ROOT_MODULES, at_root


def imported(name: str) -> set[str]:
    """Modules of the package that a module imports when it is loaded, not within functions or for types alone."""
    body, found = list(TREES[name].body), set()
    while body:
        node = body.pop()
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "nanopd":
            base = "/".join(node.module.split(".")[1:])
            for alias in node.names:  # a module, or else something within the module before
                paths = (f"{base}/{alias.name}.py".lstrip("/"), f"{base}.py", f"{base}/__init__.py".lstrip("/"))
                found |= set([path for path in paths if path in TREES][:1])
        elif isinstance(node, ast.If | ast.Try):
            body += [] if "TYPE_CHECKING" in ast.unparse(node)[:20] else node.body
    return found - {name}


def test_no_module_imports_itself_in_a_circle() -> None:
    left = {name: imported(name) for name in TREES}
    while free := [name for name, names in left.items() if not names & set(left)]:
        for name in free:
            del left[name]
    assert not left, f"these import each other: { {name: sorted(names & set(left)) for name, names in left.items()} }"
