"""Functions that users name by an import path, `package.module.function`: checked, and loaded."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rltrain.run.errors import UserError, nearest


def check_function(
    path: str,
    *,
    flag: str,
    positional: Sequence[str] | None = None,
    keywords: Sequence[str] = (),
    optional: Sequence[str] = (),
    coroutine: bool | None = None,
) -> None:
    """Check, without running the module, that `path` names something that can be called as it will be.

    The module may need packages that only the job's machines have, so its source is read and not imported
    (the packages above it are, because Python needs them to find it). For names that the module imports from
    elsewhere, or assigns, only the name is checked.

    Args:
        positional: What it is called with, in order; None checks the name only.
        keywords: What it is given by name beside that.
        optional: What it is given by name if it has such a parameter.
        coroutine: Whether what it returns is awaited; None if that depends on the function.

    Raises:
        UserError: no such module, or nothing of that name in it (names the nearest), or it takes other
            arguments, or it is an `async def` where none will do, or the other way round.
    """
    module_name, name = _split(path, flag)
    try:
        spec = importlib.util.find_spec(module_name)
    except ModuleNotFoundError:
        spec = None
    except Exception as error:
        raise UserError(
            f"{flag} {path}: the packages above {module_name} can't be imported ({explain(error)})."
        ) from None
    if spec is None:
        raise UserError(f"{flag} {path}: there is no module {module_name}.{_HINT}")
    if spec.origin is None or not spec.origin.endswith(".py"):
        return  # compiled, or a namespace: loading it will tell
    try:
        tree = ast.parse(Path(spec.origin).read_bytes())
    except SyntaxError as error:
        raise UserError(f"{flag} {path}: {spec.origin}:{error.lineno}: {error.msg}.") from None
    names = _top_level_names(tree)
    if name not in names and "*" not in names:
        raise UserError(_no_such_name(path, module_name, name, names, flag))
    for node in _statements(tree.body):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name == name:
            call = [*(positional or ()), *(f"{keyword}=…" for keyword in keywords)]
            where = f"{flag} {path} ({Path(spec.origin).name}:{node.lineno})"
            problem = (
                None if positional is None else _arity_problem(node.args, positional, keywords, optional)
            )
            if problem:
                raise UserError(f"{where}: it is called as {name}({', '.join(call)}), and {problem}.")
            is_coroutine = isinstance(node, ast.AsyncFunctionDef)
            if coroutine and not is_coroutine:
                raise UserError(f"{where}: it is awaited, so it must be an `async def`.")
            if coroutine is False and is_coroutine:
                raise UserError(f"{where}: it is not awaited, so it must be a plain `def`.")


def missing_imports(path: str) -> list[str]:
    """Imports of the function's module that are not installed, with the line; nothing is run.

    Only plain imports at the top of the module, and of modules beside it that it imports: one within `try` or `if` may
    be meant to fail.
    """
    found: list[str] = []
    seen: set[str] = set()
    names = [path.rpartition(".")[0]]
    while names:
        name = names.pop()
        source = _source_of(name)
        if name in seen or source is None:
            continue
        seen.add(name)
        try:
            text = source.read_bytes()
            body = ast.parse(text).body
        except (OSError, SyntaxError):
            continue  # `check_function` says so where it is the function's own module
        if b"sys.path" in text:  # more can be imported then than this Python sees
            return []
        for line, module in _imports(body):
            if not _is_here(module):
                found.append(
                    f"{source.name}:{line} imports {module}, which is not installed in {sys.executable}"
                )
            else:
                names.append(module)
    return found


def _imports(body: Sequence[ast.stmt]) -> list[tuple[int, str]]:
    """Line and module of the absolute imports among these statements."""
    found = [
        (node.lineno, alias.name) for node in body if isinstance(node, ast.Import) for alias in node.names
    ]
    return found + [
        (node.lineno, node.module)
        for node in body
        if isinstance(node, ast.ImportFrom) and node.module and not node.level
    ]


def _is_here(module: str) -> bool:
    top = module.partition(".")[0]
    try:
        return top in sys.modules or importlib.util.find_spec(top) is not None
    except (ImportError, ValueError):
        return True  # it is there, in some unusual way


def _source_of(module: str) -> Path | None:
    """The file of a module of the user's own: below the directories that are looked in, and not installed, nor ours."""
    top, *rest = module.split(".")
    if top in sys.stdlib_module_names or top == __package__:
        return None
    for entry in sys.path:
        base = Path(entry or ".", top, *rest)
        for file in (base.with_name(f"{base.name}.py"), base / "__init__.py"):
            if file.is_file():
                return None if "site-packages" in file.parts else file
    return None


def load_function(path: str | None, *, flag: str) -> Callable[..., Any]:
    """Import the function that `path` names.

    Raises:
        UserError: the module can't be imported, or has no such function; the message has the reason.
    """
    assert path is not None
    module_name, name = _split(path, flag)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise UserError(f"{flag} {path}: importing {module_name} failed: {explain(error)}.{_HINT}") from error
    function: Callable[..., Any] | None = getattr(module, name, None)
    if function is None:
        raise UserError(_no_such_name(path, module_name, name, set(dir(module)), flag))
    if not callable(function):
        raise UserError(f"{flag} {path}: it is a {type(function).__name__}, not a function.")
    return function


def takes(function: Callable[..., Any], count: int) -> bool:
    """Whether a function can be called with so many positional arguments and nothing else."""
    try:
        inspect.signature(function).bind(*[None] * count)
    except TypeError:
        return False
    return True


def explain(error: BaseException) -> str:
    """What a user's function raised, in one line, and where: `ValueError: … (rewards.py:12, grade)`."""
    # As escapes, and not as they are: a lone surrogate could not be written to a log.
    said = f"{type(error).__name__}: {error}".encode(errors="backslashreplace").decode()
    summary = said.strip().splitlines()[0]
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return summary
    hint = next((hint for file, hint in _NOT_HERE.items() if frames[-1].filename.endswith(file)), "")
    return f"{summary} ({Path(frames[-1].filename).name}:{frames[-1].lineno}, {frames[-1].name}){hint}"


# What functions written for slime may ask of Megatron where it has no answer.
_NOT_HERE = {
    "megatron/core/parallel_state.py": (
        ": Megatron's groups exist in the trainer's ranks, so only functions that run in the trainer can ask for them."
        " Sizes are in args, such as args.tensor_model_parallel_size"
    ),
    "megatron/training/global_vars.py": (
        ": Megatron-LM's global variables are not set here. Use the args that the function gets"
    ),
}


def explain_fully(error: BaseException) -> str:
    """`explain`, and below it the traceback, for the record of a sample."""
    frames = traceback.format_list(traceback.extract_tb(error.__traceback__)[-_FRAMES:])
    return f"{explain(error)}\n{''.join(frames)}".rstrip()


_FRAMES = 10  # the innermost ones say what went wrong
_HINT = (
    " Modules are searched for in the directory that the job was submitted from and among installed packages."
)


def _split(path: str, flag: str) -> tuple[str, str]:
    module_name, _, name = path.rpartition(".")
    if not module_name or not name.isidentifier():
        raise UserError(f"{flag} {path}: give an import path such as package.module.function.")
    return module_name, name


def _no_such_name(path: str, module_name: str, name: str, names: set[str], flag: str) -> str:
    near = nearest(name, sorted(names))
    public = ", ".join(sorted(each for each in names if not each.startswith("_"))[:10])
    hint = f"did you mean {near}?" if near else f"it has {public or 'nothing'}."
    return f"{flag} {path}: module {module_name} has no function {name}; {hint}"


def _arity_problem(
    args: ast.arguments, positional: Sequence[str], keywords: Sequence[str], optional: Sequence[str]
) -> str | None:
    """Why a function with these parameters can't be called so, or None."""
    by_position = [each.arg for each in (*args.posonlyargs, *args.args)]
    by_name = {each.arg for each in (*args.args, *args.kwonlyargs)}
    if len(positional) > len(by_position) and args.vararg is None:
        return f"takes only {len(by_position)} positional arguments ({', '.join(by_position) or 'none'})"
    if args.kwarg is None:
        unknown = [each for each in keywords if each not in by_name]
        if unknown:
            return f"has no parameter {unknown[0]!r}"
    required = by_position[len(positional) : len(by_position) - len(args.defaults)]
    required += [each.arg for each, d in zip(args.kwonlyargs, args.kw_defaults, strict=True) if d is None]
    missing = [each for each in required if each not in (*keywords, *optional)]
    if missing:
        return f"wants {missing[0]!r} as well"
    return None


def _top_level_names(tree: ast.Module) -> set[str]:
    """Names bound by the module's statements, also inside `if` and `try`; `*` for a star import."""
    names: set[str] = set()
    for node in _statements(tree.body):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names.update(alias.asname or alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names.update(
                each.id for target in targets for each in ast.walk(target) if isinstance(each, ast.Name)
            )
    return names


def _statements(body: list[ast.stmt]) -> list[ast.stmt]:
    """The statements and those nested in `if`, `try` and `with` at module level."""
    found = list(body)
    for node in body:
        if isinstance(node, ast.If | ast.Try | ast.With):
            for block in ("body", "orelse", "finalbody"):
                found += _statements(getattr(node, block, []))
            for handler in getattr(node, "handlers", []):
                found += _statements(handler.body)
    return found
