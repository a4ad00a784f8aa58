"""Every value of the configuration is read somewhere: from its own group, not from anything with a field of that name.

What expressions are is worked out from the source: annotations of parameters, fields and results, and what is assigned.
slime's `args` have the values of all groups, and `ClusterFlags` those that are needed before there is a configuration.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pytest

from rltrain.arguments.config import groups, places
from rltrain.arguments.groups.evaluation import SETTINGS
from rltrain.arguments.model_flags import megatron_shape

ROOT = Path(__file__).parents[2]
CONFIG, ARGS, GIVEN = "Config", "Namespace", "ClusterFlags"
Function = ast.FunctionDef | ast.AsyncFunctionDef
_LOOKED_AT = (ast.Attribute, ast.Call, ast.Assign, ast.NamedExpr, ast.AnnAssign, ast.For)


@cache
def group_names() -> dict[str, str]:
    """The classes of the groups, by the names that `Config` has for them."""
    return {name: kind.__name__ for name, kind in groups().items()}


@dataclass
class Known:
    """What is known of the classes and functions of all files, by their names.

    Attributes:
        attributes: of a class: name → class.
        bases: of a class.
        results: the classes of what functions, and methods as `Class.method`, return.
    """

    attributes: dict[str, dict[str, str]] = field(default_factory=dict)
    bases: dict[str, list[str]] = field(default_factory=dict)
    results: dict[str, str] = field(default_factory=dict)

    def attribute(self, owner: str, name: str) -> str | None:
        """The class of an attribute, of a class or of what it inherits from."""
        if owner == CONFIG:
            return ARGS if name == "namespace" else group_names().get(name)
        inherited = (self.attribute(base, name) for base in self.bases.get(owner, []))
        return self.attributes.get(owner, {}).get(name) or next(filter(None, inherited), None)

    def result(self, owner: str | None, name: str) -> str | None:
        """The class of what a function or method returns."""
        return self.results.get(f"{owner}.{name}") or self.results.get(name)


def named(annotation: ast.expr | None) -> str | None:
    """The class that an annotation names, without its module, quotes and `| None`."""
    match annotation:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name
        case ast.Constant(value=str(text)):
            return named(ast.parse(text, mode="eval").body)
        case ast.BinOp(left=left, op=ast.BitOr(), right=ast.Constant(value=None)):
            return named(left)
    return None


class Scope:
    """What the names in a function are.

    Attributes:
        owner: the class, if this is the body of one.
    """

    def __init__(self, known: Known, names: dict[str, str], owner: str | None = None) -> None:
        self.known, self.names, self.owner = known, dict(names), owner

    def within(self, function: Function) -> Scope:
        """That of a function inside."""
        inner = Scope(self.known, self.names)
        args = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
        for each in args:
            inner.names.pop(each.arg, None)
            inner.note(each.arg, named(each.annotation))
        if self.owner and args and args[0].arg in ("self", "cls"):
            inner.names[args[0].arg] = self.owner
        return inner

    def note(self, name: str, kind: str | None) -> None:
        """A name and its class."""
        if kind is not None:
            self.names[name] = kind

    def learn(self, node: ast.AST) -> None:
        """What a statement makes of its names."""
        match node:
            case ast.NamedExpr(target=ast.Name(id=name), value=value):
                self.note(name, self.kind(value))
            case ast.AnnAssign(target=ast.Name(id=name), annotation=annotation):
                self.note(name, named(annotation))
            case ast.For(target=ast.Name(id=name), iter=ast.Tuple(elts=[first, *_])):
                self.note(name, self.kind(first))
            case ast.Assign():
                for target, value in assigned(node):
                    if isinstance(target, ast.Name):
                        self.note(target.id, self.kind(value))

    def kind(self, node: ast.expr) -> str | None:
        """The class of an expression; None where it can't be told."""
        match node:
            case ast.Name(id=name):
                return self.names.get(name)
            case ast.Attribute(value=value, attr=name):
                owner = self.kind(value)
                return None if owner is None else self.known.attribute(owner, name)
            case ast.Call(func=ast.Name(id="group_of"), args=[_, ast.Name(id=name)]):
                return name
            case ast.Call(func=ast.Name(id="replace"), args=[first, *_]):
                return self.kind(first)
            case ast.Call(func=ast.Name(id=name)):
                return name if name in self.known.attributes else self.known.results.get(name)
            case ast.Call(func=ast.Attribute(value=ast.Name(id="Config"), attr=name)):
                return self.known.result(CONFIG, name)
            case ast.Call(func=ast.Attribute(value=value, attr=name)):
                return self.known.result(self.kind(value), name)
            case ast.Await(value=value):
                return self.kind(value)
            case ast.IfExp(body=one, orelse=other):
                return self.kind(one) or self.kind(other)
            case ast.BoolOp(values=values):
                return next(filter(None, map(self.kind, values)), None)
        return None


def assigned(node: ast.Assign) -> list[tuple[ast.expr, ast.expr]]:
    """Each target with its value."""
    target = node.targets[0]
    if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
        return list(zip(target.elts, node.value.elts, strict=False))
    return [(target, node.value)]


@cache
def parts(node: ast.AST) -> tuple[list[ast.AST], list[Function | ast.ClassDef]]:
    """What is inside, in the order of the source; and the functions and classes there, each of which has its own."""
    plain: list[ast.AST] = []
    own: list[Function | ast.ClassDef] = []

    def collect(outer: ast.AST) -> None:
        for child in ast.iter_child_nodes(outer):
            if isinstance(child, Function | ast.ClassDef):
                own.append(child)
                continue
            if isinstance(child, _LOOKED_AT):
                plain.append(child)
            collect(child)

    collect(node)
    return plain, own


def scopes(node: ast.AST, scope: Scope) -> Iterator[tuple[ast.AST, Scope]]:
    """A file or class and every function in it, with what the names are there."""
    inside, own = parts(node)
    for child in inside:
        scope.learn(child)
    yield node, scope
    for each in own:
        inner = (
            Scope(scope.known, scope.names, each.name)
            if isinstance(each, ast.ClassDef)
            else scope.within(each)
        )
        yield from scopes(each, inner)


def definitions(node: ast.AST) -> Iterator[Function | ast.ClassDef]:
    """Every function and class."""
    for each in parts(node)[1]:
        yield each
        yield from definitions(each)


def add_class(known: Known, node: ast.ClassDef) -> None:
    """What a class says of its attributes and methods."""
    own = known.attributes.setdefault(node.name, {})
    known.bases[node.name] = [name for base in node.bases if (name := named(base))]
    for each in node.body:
        if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name):
            own |= {each.target.id: kind} if (kind := named(each.annotation)) else {}
        elif isinstance(each, Function) and (kind := named(each.returns)):
            kind = node.name if kind == "Self" else kind
            known.results[f"{node.name}.{each.name}"] = kind
            if any(named(how) in ("property", "cached_property") for how in each.decorator_list):
                own[each.name] = kind


def learnt(files: Sequence[ast.Module]) -> Known:
    """From annotations, and then from what methods assign to `self`."""
    known = Known()
    for node in (each for file in files for each in definitions(file)):
        if isinstance(node, ast.ClassDef):
            add_class(known, node)
        elif (kind := named(node.returns)) and (kind == CONFIG or node.name not in known.results):
            known.results[node.name] = kind  # several have the name `load`, and files come in any order
    for file in files:
        for node, scope in scopes(file, Scope(known, {})):
            if (owner := scope.names.get("self")) is None:
                continue
            for each in parts(node)[0]:
                for target, value in assigned(each) if isinstance(each, ast.Assign) else ():
                    match target:
                        case ast.Attribute(value=ast.Name(id="self"), attr=name) if kind := scope.kind(value):
                            known.attributes[owner].setdefault(name, kind)
    return known


def read_from(owner: str | None, name: str) -> str | None:
    """The value of the configuration that `name` of an `owner` is, as `group.name`."""
    if owner in (ARGS, GIVEN):
        return f"{places()[name]}.{name}" if name in places() else None
    return next((f"{group}.{name}" for group, kind in group_names().items() if kind == owner), None)


def values_read(files: Sequence[ast.Module]) -> set[str]:
    """The values that are read in these files, as `group.name`."""
    known = learnt(files)
    found: set[str | None] = set()
    for file in files:
        for node, scope in scopes(file, Scope(known, {})):
            for each in parts(node)[0]:
                match each:
                    case ast.Call(
                        func=ast.Name(id="getattr"), args=[value, ast.Constant(value=str(name)), *_]
                    ):
                        found.add(read_from(scope.kind(value), name))
                    case ast.Attribute(value=value, attr=name, ctx=ast.Load()):
                        found.add(read_from(scope.kind(value), name))
    return {each for each in found if each is not None}


def read_by_name() -> set[str]:
    """Settings of an evaluation set, and the shape that is compared with a `config.json`."""
    published = json.loads((ROOT / "tests" / "published_configs.json").read_text())
    shape = {name.replace("-", "_") for each in published.values() for name in megatron_shape(each)}
    return {f"{places()[name]}.{name}" for name in (*SETTINGS.values(), *shape) if name in places()}


@pytest.mark.slow
def test_every_value_has_a_reader() -> None:
    paths = [path for room in ("hpc", "rltrain") for path in (ROOT / room).rglob("*.py")]
    read = values_read([ast.parse(path.read_text()) for path in paths])
    declared = {f"{group}.{name}" for name, group in places().items()}
    assert declared - read - read_by_name() == set()


def test_only_its_own_group_is_a_reader_of_a_value() -> None:
    """What the test above takes for reading, and what not."""
    file = ast.parse("""
class Job:
    def __init__(self, config: Config, other: Other) -> None:
        self.config, self.name = config, other.lr

    def run(self, model: "Model | None", args: argparse.Namespace, given: ClusterFlags) -> None:
        training = self.config.training
        training.seed = training.bf16 = load().rollout.rollout_top_p
        print(model.hf_checkpoint, args.save, given.num_gpus_per_node, "value_clip", training.max_skipped_steps)
        getattr(self.config.rollout, "rollout_seed"), args.nothing, self.config.num_layers

def load() -> Config: ...
""")
    assert values_read([file]) == {
        "rollout.rollout_top_p",
        "model.hf_checkpoint",
        "checkpoint.save",
        "parallel.num_gpus_per_node",
        "training.max_skipped_steps",
        "rollout.rollout_seed",
    }
