"""How the package's modules hang together: none imports itself by way of others, in a function neither."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
TREES = {"hf_d2sd": ROOT / "src" / "hf_d2sd", "hf_d2sd.modeling": ROOT / "modeling"}
KNOWN = {
    ("hf_d2sd.modeling.modeling_d2sd", "hf_d2sd"),  # as remote code it asks whether there is a package
    ("hf_d2sd.growing", "hf_d2sd.options"),  # the name of a type, which is never imported
}


def modules_of(trees: dict[str, Path]) -> dict[str, Path]:
    """File of each module, by its dotted name."""
    found = {}
    for package, root in trees.items():
        for file in root.rglob("*.py"):
            parts = [package, *file.relative_to(root).with_suffix("").parts]
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def imports_of(name: str, file: Path, modules: dict[str, Path]) -> set[str]:
    """The modules that one imports, wherever in it; of `from package import name` the submodule, if it is one."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = name.split(".")
                above = parts[: len(parts) - node.level + (file.name == "__init__.py")]
                base = ".".join([*above, *filter(None, [node.module])])
            full = [f"{base}.{alias.name}" for alias in node.names]
            found |= {one if one in modules else base for one in full}
    return found & set(modules) - {name}


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """The strongly connected components of more than one module."""

    def reached(start: str) -> set[str]:
        seen, waiting = set(), [start]
        while waiting:
            fresh = edges[waiting.pop()] - seen
            seen |= fresh
            waiting += fresh
        return seen

    reach = {name: reached(name) for name in edges}
    found = {frozenset(other for other in reach[name] if name in reach[other]) for name in edges}
    return sorted(sorted(circle) for circle in found if circle)


def circles_in(trees: dict[str, Path], known: set[tuple[str, str]]) -> list[list[str]]:
    modules = modules_of(trees)
    edges = {name: imports_of(name, file, modules) for name, file in modules.items()}
    return circles({name: {other for other in edges[name] if (name, other) not in known} for name in edges})


def test_no_module_imports_itself_by_way_of_others():
    assert circles_in(TREES, KNOWN) == []


def test_every_module_of_the_package_is_looked_at():
    modules = modules_of(TREES)
    assert {"hf_d2sd", "hf_d2sd.records", "hf_d2sd.benchmark.run", "hf_d2sd.modeling.modeling_d2sd"} <= set(modules)
    imported = imports_of("hf_d2sd.benchmark.run", modules["hf_d2sd.benchmark.run"], modules)
    assert {"hf_d2sd.records", "hf_d2sd.benchmark.result", "hf_d2sd.modeling"} <= imported


def test_circles_are_found_through_functions_packages_and_relative_imports(tmp_path):
    files = {
        "__init__.py": "from .a import x",
        "a.py": "def f():\n    from .b import c\n    import p.alone",
        "b/__init__.py": "",
        "b/c.py": "class C:\n    def f(self):\n        from .. import a",
        "alone.py": "import os",
        "d.py": "from p import e",
        "e.py": "if False:\n    from p.d import y",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert circles_in({"p": tmp_path}, set()) == [["p.a", "p.b.c"], ["p.d", "p.e"]]
    assert circles_in({"p": tmp_path}, {("p.e", "p.d")}) == [["p.a", "p.b.c"]]


# How long functions are, and how much they ask for -------------------------------------------------------------------

REGISTERED = {"cascade"}  # its signature is the operator's schema
CORE = [*(ROOT / "src" / "hf_d2sd").glob("*.py"), *(ROOT / "modeling").glob("*.py")]
EVERY = [file for root in TREES.values() for file in root.rglob("*.py")]


def functions_of(files) -> list[tuple[str, int, int]]:
    """Name, lines and parameters of each function; `self`, `cls` and what a `**name` takes aside."""
    found = []
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                names = [one.arg for one in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
                asked = [name for name in names if name not in ("self", "cls")]
                found.append((f"{file.name}:{node.name}", node.end_lineno - node.lineno + 1, len(asked)))
    return found


def test_functions_of_the_core_are_short():
    lines = sorted(length for _, length, _ in functions_of(CORE))
    assert len(lines) > 300
    assert lines[int(0.9 * len(lines))] <= 22
    assert [name for name, length, _ in functions_of(CORE) if length > 50] == []


def test_no_function_asks_for_more_than_seven_things_but_the_registered_operator():
    asking = {name.split(":")[1] for name, _, count in functions_of(EVERY) if count > 7}
    assert asking == REGISTERED


# Who knows what of Transformers --------------------------------------------------------------------------------------

HOMES = {"compat.py", "compat_d2sd.py"}
PUBLIC = {"transformers.utils", "transformers.utils.logging"}  # documented: logging and progress bars
OF_A_FORWARD = {"output_hidden_states", "logits_to_keep", "next_sequence_length", "is_first_iteration"}


def code_of(file: Path) -> list[ast.AST]:
    return list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))


def internals_in(file: Path) -> set[str]:
    """Submodules of Transformers that a file imports from, and private attributes of objects that are not its own."""
    code = code_of(file)
    imported = {node.module for node in code if isinstance(node, ast.ImportFrom) and node.module and not node.level}
    inner = {module for module in imported if module.startswith("transformers.")} - PUBLIC
    touched = {node.attr for node in code if isinstance(node, ast.Attribute) and _is_private(node.attr)}
    return inner | (touched - OWN)


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def own_names() -> set[str]:
    """Private names that the library defines itself: methods, and attributes that it sets on `self` or an object."""
    defined = set()
    for file in EVERY:
        if file.name in HOMES:
            continue
        for node in code_of(file):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                defined.add(node.name)
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                defined.add(node.attr)
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                defined.add(node.target.id)
    return defined


_SDPA = {
    f"_scaled_dot_product_{kernel}" for kernel in ("flash_attention", "flash_attention_for_cpu", "efficient_attention")
}
OWN = own_names() | _SDPA | {"_foreach_copy_", "_foreach_lerp_", "_getframe"}  # torch's, Python's


def test_internals_of_transformers_have_one_home():
    assert {file.name: internals_in(file) for file in EVERY if file.name not in HOMES and internals_in(file)} == {}


def test_the_homes_do_hold_them():
    """Else the test above would see nothing."""
    found = set().union(*(internals_in(file) for file in EVERY if file.name in HOMES))
    assert {"transformers.cache_utils", "_attn_implementation", "_is_stateful", "_pad_token_tensor"} <= found


def test_arguments_of_a_targets_forward_have_one_home():
    def passed(file: Path) -> set[str]:
        return {node.arg for node in code_of(file) if isinstance(node, ast.keyword)} & OF_A_FORWARD

    assert {file.name: passed(file) for file in EVERY if file.name not in HOMES and passed(file)} == {}
    assert set().union(*(passed(file) for file in EVERY if file.name in HOMES)) >= {"output_hidden_states"}


# The page that says all this -----------------------------------------------------------------------------------------

PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


def test_the_page_has_twelve_words_and_every_room_of_the_core():
    words = re.findall(r"^\| (\w+) \| .+ \| (`.+`) \|$", PAGE, re.M)
    assert len(words) == 12
    for _, files in words:
        for name in re.findall(r"`([\w/]+\.py)`", files):
            assert (TREES["hf_d2sd"] / name).exists() or (ROOT / name).exists(), name
    rooms = {file.stem for file in (ROOT / "src" / "hf_d2sd").glob("*.py")} - {"__init__", "cli"}
    assert {room for room in rooms if not re.search(rf"\b{room}\b", PAGE)} == set()


def test_the_arrows_of_the_page_go_down():
    """A room imports only rooms that stand below it, or beside it on its line."""
    drawn = re.search(r"```\n(integration.+?)```", PAGE, re.S).group(1).splitlines()
    names = {file.stem for file in (ROOT / "src" / "hf_d2sd").glob("*.py")}
    floors = {word: at for at, line in enumerate(drawn) for word in re.split(r"  +", line.strip()) if word in names}
    assert len(floors) > 20
    modules = modules_of(TREES)
    for name, at in floors.items():
        edges = imports_of(f"hf_d2sd.{name}", modules[f"hf_d2sd.{name}"], modules)
        edges = {other for other in edges if (f"hf_d2sd.{name}", other) not in KNOWN}
        above = {other for other in edges if floors.get(other.removeprefix("hf_d2sd."), at) < at}
        assert above == set(), f"{name} imports {above}"
