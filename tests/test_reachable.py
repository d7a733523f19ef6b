"""Every public function and class is reached from a command, a spec or a table of entry points.

The sources are read, not run: a name is followed through imports to where it is defined, and what a
reached function names is reached in turn. A module is reached with its first name; then so is
what its own statements name, and what a decorator of its own registers. Tests reach nothing.
"""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import graftwork

ROOT = Path(__file__).parent.parent
PACKAGES = ("methods", "operators", "pipelines", "cluster")

ENTRIES = {
    "graftwork.pipelines.__main__": "the command",
    **{f"graftwork.pipelines.api:{name}": "Python" for name in graftwork._PLACES["pipelines.api"]},
    "graftwork.operators.serving:_load_pyfunc": "MLflow loads a model through it",
    "graftwork.operators.backbones.shipped:vit_micro_patch4_32": "timm makes the model by its name",
}
"""What others call by a name that is in no source here. Scripts are found by themselves."""

Place = tuple[str, str]
"""Module and name of a function or class; the name is empty for the module's own statements."""

DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def own(dotted: str) -> str:
    """The name of a module below the packages."""
    return dotted.removeprefix("graftwork.")


class Sources:
    """Modules by dotted name: what they define, and what the names in them stand for."""

    def __init__(self, texts: dict[str, str], packages: frozenset[str] = frozenset()) -> None:
        self.trees = {name: ast.parse(text) for name, text in texts.items()}
        self.packages = packages
        self._next: dict[Place, frozenset[Place]] = {}
        self.defined = {
            name: {node.name: node for node in tree.body if isinstance(node, DEFINITIONS)}
            for name, tree in self.trees.items()
        }
        self.imported = {name: dict(self._imports(name, tree)) for name, tree in self.trees.items()}

    def _imports(self, module: str, tree: ast.AST) -> Iterator[tuple[str, str]]:
        """Names that imports bind, anywhere in a module, with the dotted name of what they mean."""
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    whole = own(alias.name)
                    yield (
                        alias.asname or whole.split(".")[0],
                        (whole if alias.asname else whole.split(".")[0]),
                    )
            elif isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    yield alias.asname or alias.name, f"{self._base(module, node)}.{alias.name}"

    def _base(self, module: str, node: ast.ImportFrom) -> str:
        if not node.level:
            return own(node.module or "")
        parts = module.split(".")[: None if module in self.packages else -1]
        parts = parts[: len(parts) - node.level + 1]
        return ".".join([*parts, *([node.module] if node.module else [])])

    def find(self, dotted: str, seen: frozenset[str] = frozenset()) -> Place | None:
        """The place of a dotted name, followed through modules that only import it."""
        if dotted in self.trees:
            return dotted, ""
        module, _, name = dotted.rpartition(".")
        if module not in self.trees or dotted in seen:
            return None
        if name in self.defined[module]:
            return module, name
        if target := self.imported[module].get(name):
            return self.find(target, seen | {dotted})
        return module, ""  # a variable

    def _meant(self, module: str, node: ast.AST) -> Place | None:
        if isinstance(node, ast.Name):
            if node.id in self.defined[module]:
                return module, node.id
            target = self.imported[module].get(node.id)
            return self.find(target) if target else None
        if isinstance(node, ast.Attribute):
            base = self._meant(module, node.value)
            return self.find(f"{base[0]}.{node.attr}") if base and not base[1] else None
        return None

    def named(self, module: str, node: ast.AST) -> Iterator[Place]:
        """What a piece of a module names: in code, in quoted annotations, in tables of strings."""
        for part in ast.walk(node):
            if isinstance(part, (ast.Name, ast.Attribute)):
                if place := self._meant(module, part):
                    yield place
            elif isinstance(part, ast.ImportFrom):
                base = self._base(module, part)
                for dotted in (base, *(f"{base}.{alias.name}" for alias in part.names)):
                    if dotted in self.trees:
                        yield dotted, ""
            elif isinstance(part, ast.Import):
                yield from ((own(a.name), "") for a in part.names if own(a.name) in self.trees)
            elif isinstance(part, ast.Constant) and isinstance(part.value, str):
                yield from self._string(part.value)
            for field in ("annotation", "returns"):
                if quoted := getattr(part, field, None):
                    yield from self._quoted(module, quoted)

    def _string(self, text: str) -> Iterator[Place]:
        """`module:name` is that name, the name of a module all that is public in it."""
        module, colon, name = own(text).partition(":")
        if colon and name in self.defined.get(module, {}):
            yield module, name
        elif not colon and "." in module and module in self.trees:
            yield from ((module, public) for public in self.public(module))

    def _quoted(self, module: str, annotation: ast.AST) -> Iterator[Place]:
        for part in ast.walk(annotation):
            if isinstance(part, ast.Constant) and isinstance(part.value, str):
                try:
                    inner = ast.parse(part.value, mode="eval")
                except SyntaxError:  # a word of a Literal
                    continue
                yield from self.named(module, inner)

    def statements(self, module: str) -> ast.Module:
        """A module without its functions and classes."""
        body = [node for node in self.trees[module].body if not isinstance(node, DEFINITIONS)]
        return ast.Module(body=body, type_ignores=[])

    def registered(self, module: str) -> Iterator[Place]:
        """Functions whose decorator belongs to a variable of the module, as `@app.command()`."""
        variables = {
            target.id
            for node in self.trees[module].body
            for target in getattr(node, "targets", [getattr(node, "target", None)])
            if isinstance(target, ast.Name)
        }
        for name, node in self.defined[module].items():
            for root in node.decorator_list:
                while isinstance(root, (ast.Call, ast.Attribute)):
                    root = root.func if isinstance(root, ast.Call) else root.value
                if isinstance(root, ast.Name) and root.id in variables:
                    yield module, name

    def public(self, module: str) -> list[str]:
        """Names of the public functions and classes of a module."""
        return [name for name in self.defined[module] if not name.startswith("_")]

    def scripts(self) -> Iterator[Place]:
        """Modules that do something when they are run."""
        for module in self.trees:
            for node in self.statements(module).body:
                if isinstance(node, ast.If) and "__main__" in ast.unparse(node.test):
                    yield module, ""

    def reached(self, entries: list[Place]) -> set[Place]:
        """All that is reached from some places."""
        found: set[Place] = set()
        waiting = list(entries)
        while waiting:
            place = waiting.pop()
            if place in found:
                continue
            found.add(place)
            waiting += self.next(place)
        return found

    def next(self, place: Place) -> frozenset[Place]:
        """What a place reaches by itself."""
        if place not in self._next:
            self._next[place] = frozenset(self._follow(*place))
        return self._next[place]

    def _follow(self, module: str, name: str) -> Iterator[Place]:
        if name:
            yield module, ""
            yield from self.named(module, self.defined[module][name])
            return
        if (above := module.rpartition(".")[0]) in self.trees:
            yield above, ""
        yield from self.named(module, self.statements(module))
        yield from self.registered(module)

    def unreached(self, entries: list[Place]) -> list[str]:
        """Public functions and classes that nothing reaches."""
        found = self.reached([*entries, *self.scripts()])
        return [
            f"{module}:{name}"
            for module in self.trees
            for name in self.public(module)
            if (module, name) not in found
        ]


@cache
def read() -> Sources:
    paths = [path for name in PACKAGES for path in sorted((ROOT / name).rglob("*.py"))]
    texts, packages = {}, set()
    for path in paths:
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[-1] == "__init__":
            parts = parts[:-1]
            packages.add(".".join(parts))
        texts[".".join(parts)] = path.read_text()
    return Sources(texts, frozenset(packages))


def test_every_public_function_and_class_is_reached() -> None:
    sources = read()
    entries = [sources.find(own(entry).replace(":", ".")) for entry in ENTRIES]
    missing = [entry for entry, place in zip(ENTRIES, entries, strict=True) if place is None]
    assert missing == []
    assert sources.unreached([place for place in entries if place is not None]) == []


def test_every_entry_is_needed() -> None:
    sources = read()
    for left_out in ENTRIES:
        places = [sources.find(e.replace(":", ".")) for e in ENTRIES if e != left_out]
        reached = sources.reached([*(p for p in places if p is not None), *sources.scripts()])
        assert sources.find(left_out.replace(":", ".")) not in reached, left_out


def test_what_is_reached_is_followed_through_imports() -> None:
    texts = {
        "p": "",
        "p.main": "import p.a as a\nfrom p import b\nfrom p.c import shown\n"
        "def main(x: 'Kind') -> None: a.used(); shown(); b.other\n"
        "from p.a import Kind",
        "p.a": "def used(): helper()\ndef helper(): helper()\nclass Kind: ...\n"
        "def unused(): unused(); idle()\ndef idle(): ...\ndef _private(): ...",
        "p.b": "app = App()\n@app.command()\ndef command(): ...\n"
        "@cache\ndef cached(): ...\nTABLE = {'x': 'p.d:kept'}\nother = TABLE\nMODULES = ['p.e']",
        "p.c": "from p.c_inner import shown, hidden",
        "p.c_inner": "def shown(): ...\ndef hidden(): ...",
        "p.d": "def kept(): ...\ndef lost(): ...",
        "p.e": "def one(): ...\ndef two(): ...",
    }
    sources = Sources(texts, frozenset({"p"}))
    assert sources.unreached([("p.main", "main")]) == [
        *("p.a:unused", "p.a:idle", "p.b:cached", "p.c_inner:hidden", "p.d:lost")
    ]
