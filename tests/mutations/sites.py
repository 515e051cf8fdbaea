"""Where a fault can be put: conditions on a device, a dtype, an option, a shape or a resume, and what guards them."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

SOURCES = ("lowrank_optim/optim/**/*.py", "lowrank_optim/ops/*.py", "lowrank_optim/pretrain/checkpoint.py",
           "lowrank_optim/pretrain/sharded_checkpoint.py", "lowrank_optim/pretrain/weight_files.py",
           "lowrank_optim/pretrain/random_state.py", "lowrank_optim/pretrain/update.py")  # fmt: skip
# Pure functions of names, with tables of their own in the tests.
LEFT_OUT = ("lowrank_optim/optim/roles.py", "lowrank_optim/optim/groups.py")

# What a condition is about: the first that its text matches.
KINDS = {
    "device": r"device|is_cuda|is_compiling|host_looks|capturing|\bok\b|backend|autocast|kernel|fuse|fits|eager",
    "dtype": r"dtype|is_complex|is_floating|float|codes|int8|\bbits\b|rounding|correction|wide|NARROW",
    "resume": r"step\b|waiting|warm|usable|version|names?\b|pending|late|fixed|loaded|saved|format|started|overlap"
    r"|renew|before|state\b",
    "option": r"group|option|two_phase|accumulate|clip|max_norm|decay|elementwise|needs_norms|factored|flattens"
    r"|follows|reads|moments|basis|similarity|subspace|scheduled|steps|per_matrix|column_scale|row_scale",
    "shape": r"ndim|batch|kind|shape|numel|left|square|size|len\(|rank|columns|rows",
}
# Tables of which every entry matters.
TABLES = frozenset({"FIXED", "OWN", "VOLATILE", "BOOKKEEPING", "OF_PARAMS", "SALTS", "UNSIGNED", "SUM_DTYPES"})
# Methods that give another tensor of the same shape: without them it is shared, unguarded or of another dtype.
UNNEEDED = {
    "clone": "resume", "conj": "dtype", "resolve_conj": "dtype", "to_real": "dtype", "clamp": "guard",
    "clamp_": "guard", "clamp_min": "guard", "clamp_min_": "guard", "masked_fill_": "guard", "nan_to_num": "guard",
    "square": "option",
}  # fmt: skip
# Calls that stand for one of their arguments where the special case is not given.
STANDS_FOR = {"zero_unless": (1, "device"), "keep_where": (1, "shape"), "torch.promote_types": (0, "dtype"),
              "torch.where": (1, "guard")}  # fmt: skip
# What an argument is without the special case that it is there for.
NEUTRAL = {"per_matrix": ("False", "shape"), "start": ("0", "shape"), "where": ("None", "device")}
# Functions in which every statement counts.
CAREFUL = re.compile(
    r"__setstate__|load_state_dict|put_state|take_state|^fit_$|^checked$|drop_unused|abandon|remove|add_param_group"
    r"|_attach|load_$|set_random_state|^random_state$|^refresh$|transport"
)


class Site(NamedTuple):
    """One fault: ``text[start:stop]`` of a file becomes ``new``."""

    path: str
    line: int
    end_line: int
    function: str
    kind: str
    start: int
    stop: int
    old: str
    new: str
    number: int

    @property
    def name(self) -> str:
        """Stays the same while other lines change."""
        ordinal = f" #{self.number}" if self.number else ""
        return f"{self.path.removeprefix('lowrank_optim/')}:{self.function}: {self.old} -> {self.new}{ordinal}"


def sources(root: Path) -> list[Path]:
    """The files that get faults."""
    found = [path for pattern in SOURCES for path in sorted(root.glob(pattern))]
    return [path for path in found if str(path.relative_to(root)) not in LEFT_OUT and path.name != "__init__.py"]


def functions(tree: ast.AST) -> dict[int, str]:
    """For every line of a module the qualified name of the innermost function or class around it."""
    lines: dict[int, str] = {}

    def visit(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            name = prefix
            if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
                name = f"{prefix}.{child.name}" if prefix else child.name
                lines.update(dict.fromkeys(range(child.lineno, (child.end_lineno or child.lineno) + 1), name))
            visit(child, name)

    visit(tree, "")
    return lines


def find(root: Path) -> list[Site]:
    """All faults."""
    return [site for path in sources(root) for site in _in_file(path.read_text(encoding="utf-8"), path, root)]


class _Finder(ast.NodeVisitor):
    def __init__(self, text: str) -> None:
        self.text = text
        self.found: list[tuple[ast.AST, str, str | None]] = []
        self.around: list[str] = []
        # Faults of a condition are those of the innermost reason to look at it.
        self.seen: set[int] = set()

    def source(self, node: ast.AST) -> str:
        return ast.get_source_segment(self.text, node) or ""

    def add(self, node: ast.AST, new: str, kind: str | None = None) -> None:
        self.found.append((node, new, kind))

    def condition(self, test: ast.expr, outcomes: tuple[str, ...] = ("True", "False")) -> None:
        if id(test) in self.seen:
            return
        self.seen.add(id(test))
        for outcome in outcomes:
            self.add(test, outcome)
        self.operands(test)

    def operands(self, test: ast.expr) -> None:
        if isinstance(test, ast.UnaryOp):
            self.operands(test.operand)
        if not isinstance(test, ast.BoolOp):
            return
        self.seen.add(id(test))
        word = " and " if isinstance(test.op, ast.And) else " or "
        for i, operand in enumerate(test.values):
            rest = [f"({self.source(v)})" for j, v in enumerate(test.values) if j != i]
            self.add(test, word.join(rest), self.kind_of(self.source(operand)))
            self.operands(operand)

    def kind_of(self, text: str) -> str | None:
        return next((kind for kind, words in KINDS.items() if re.search(words, text)), None)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self.around.append(node.name)
        returns = node.returns is not None and self.source(node.returns) == "bool"
        for child in ast.walk(node) if returns else ():
            value = child.value if isinstance(child, ast.Return) else None
            if value is not None and not isinstance(value, (ast.Constant, ast.Name)):
                self.condition(value)
        self.generic_visit(node)
        self.around.pop()

    def visit_If(self, node: ast.If) -> None:
        refuses = all(isinstance(child, ast.Raise) for child in node.body)
        self.condition(node.test, ("False",) if refuses else ("True", "False"))
        self.generic_visit(node)

    def visit_IfExp(self, node: ast.IfExp) -> None:
        # Without what it guards against, None, it would only crash.
        if not re.fullmatch(r"\w+ is (not )?None", self.source(node.test)):
            self.condition(node.test)
        self.generic_visit(node)

    def visit_comprehension(self, node: ast.comprehension) -> None:
        for test in node.ifs:
            self.condition(test)
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        if id(node) not in self.seen:
            self.operands(node)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        name = self.source(node.func)
        if name in STANDS_FOR and len(node.args) >= 2:
            place, kind = STANDS_FOR[name]
            self.add(node, self.source(node.args[place]), kind)
        if isinstance(node.func, ast.Attribute) and node.func.attr in UNNEEDED:
            receiver = self.source(node.func.value)
            if node.func.attr != "square" or ".abs()" in receiver:
                self.add(node, receiver, UNNEEDED[node.func.attr])
        if name.endswith(".get") and len(node.args) == 2 and self.source(node.args[0]) == '"start"':
            self.add(node, self.source(node.args[1]), "shape")
        for keyword in node.keywords:
            self.keyword(keyword)
        self.generic_visit(node)

    def keyword(self, keyword: ast.keyword) -> None:
        if keyword.arg in NEUTRAL and not isinstance(keyword.value, ast.Constant):
            new, kind = NEUTRAL[keyword.arg]
            self.add(keyword.value, new, kind)
        elif keyword.arg in ("fixed", "late") and self.source(keyword.value) == "True":
            self.add(keyword.value, "False", "resume")

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if node.attr == "mH":
            self.add(node, f"{self.source(node.value)}.mT", "dtype")
        self.generic_visit(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        for child in node.body:
            if isinstance(child, (ast.Assign, ast.AnnAssign)) and isinstance(child.value, ast.Constant):
                value = child.value.value
                if isinstance(value, bool):
                    self.add(child.value, str(not value), "option")
                elif value is None and isinstance(child, ast.Assign):
                    self.add(child, "pass", "option")
        self.around.append(node.name)
        self.generic_visit(node)
        self.around.pop()

    def visit_Assign(self, node: ast.Assign) -> None:
        target = node.targets[0]
        if isinstance(target, ast.Name) and target.id in TABLES and not self.around:
            self.table(node.value)
        self.statement(node, isinstance(target, (ast.Attribute, ast.Subscript)))
        self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        self.statement(node, True)
        self.generic_visit(node)

    def visit_Expr(self, node: ast.Expr) -> None:
        self.statement(node, isinstance(node.value, ast.Call))
        self.generic_visit(node)

    def visit_Delete(self, node: ast.Delete) -> None:
        self.statement(node, True)

    def statement(self, node: ast.stmt, acts: bool) -> None:
        if acts and self.around and any(CAREFUL.search(name) for name in self.around):
            self.add(node, "pass", self.kind_of(self.source(node)) or "resume")

    def table(self, value: ast.expr) -> None:
        for child in ast.walk(value):
            if isinstance(child, ast.Dict):
                for number in child.values:
                    if self.source(number) != "0":
                        self.add(number, "0", "resume")
            elif isinstance(child, (ast.Tuple, ast.Set)):
                entries = [self.source(entry) for entry in child.elts if isinstance(entry, ast.Constant)]
                for entry in child.elts:
                    if isinstance(entry, ast.Constant):
                        # As if it were not there.
                        self.add(entry, next((e for e in entries if e != self.source(entry)), '"_"'), "resume")


def _in_file(text: str, path: Path, root: Path) -> Iterator[Site]:
    tree = ast.parse(text)
    around = functions(tree)
    finder = _Finder(text)
    finder.visit(tree)
    offsets = [0]
    for line in text.encode().splitlines(keepends=True):
        offsets.append(offsets[-1] + len(line))
    known: Counter[tuple[str, str, str]] = Counter()
    for node, new, told in finder.found:
        old = finder.source(node)
        kind = told or finder.kind_of(old)
        if kind is None or old == new:
            continue
        function = around.get(node.lineno, "")
        start, stop = offsets[node.lineno - 1] + node.col_offset, offsets[node.end_lineno - 1] + node.end_col_offset
        key = (function, old, new)
        yield Site(str(path.relative_to(root)), node.lineno, node.end_lineno, function, kind, start, stop, old, new,
                   known[key])  # fmt: skip
        known[key] += 1


def apply(site: Site, root: Path) -> str:
    """The text of the file with the fault in it."""
    data = (root / site.path).read_bytes()
    new = site.new if site.new == "pass" else f"({site.new})"
    return (data[: site.start] + new.encode() + data[site.stop :]).decode()
