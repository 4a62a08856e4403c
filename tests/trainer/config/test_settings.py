import ast
import re
from pathlib import Path
from types import NoneType
from typing import get_args, get_origin

import pytest
from pydantic import TypeAdapter
from pydantic.fields import FieldInfo

import trainer
from trainer.config import settings
from trainer.config.settings import Config, DataSettings, ScheduleArguments

SECTIONS = {
    name: found
    for name, found in vars(settings).items()
    if isinstance(found, type) and issubclass(found, settings.Section)
}
FIELDS = [
    pytest.param(info, id=f"{name}.{field}")
    for name, section in SECTIONS.items()
    if section is not Config
    for field, info in section.model_fields.items()
]


@pytest.mark.parametrize("info", FIELDS)
def test_every_field_is_described(info: FieldInfo):
    """Each setting has a docstring, which says what happens if it is not set and has no value."""
    assert info.description
    if not info.is_required() and info.default is None:
        assert "Not set: " in info.description


def test_every_schedule_argument_tells_its_default():
    """Each argument says which schedule reads it, and its default or that it is required."""
    described = TypeAdapter(ScheduleArguments).json_schema()["properties"]
    assert set(described) == set(ScheduleArguments.__annotations__)
    for name, schema in described.items():
        assert re.match(r"[a-z_]+: .*(default|required)", schema["description"]), name


# Whether each setting is read: the types of names and attributes are followed through the sources,
# from annotations and assignments.

PACKAGE = Path(trainer.__file__).parent
OWN = "config"
"""The folder that knows settings as such; being checked or printed there is no use."""


def section_of(annotation: ast.expr | None) -> str | None:
    """The section that an annotation names; `[DataSettings]` for several of them."""
    text = ast.unparse(annotation).strip("'\"").removesuffix(" | None") if annotation else ""
    several = re.fullmatch(r"(?:Sequence|Iterable|list|tuple)\[(\w+)(?:, \.\.\.)?\]", text)
    if several and several[1] in SECTIONS:
        return f"[{several[1]}]"
    return text if text in SECTIONS else None


def type_of_field(section: str, field: str) -> str | None:
    """The section that a field holds; `[DataSettings]` for `Config.data`."""
    annotation = SECTIONS[section].model_fields[field].annotation
    if get_origin(annotation) is tuple and get_args(annotation)[0] is DataSettings:
        return "[DataSettings]"
    return annotation.__name__ if annotation in SECTIONS.values() else None


class Reader(ast.NodeVisitor):
    """Follows sections through the functions of a module."""

    def __init__(
        self, attributes: dict[str, set[str]], reads: set[tuple[str, str]], strings: set[str]
    ) -> None:
        self.attributes, self.reads, self.strings = attributes, reads, strings
        self.names: list[dict[str, str]] = [{}]

    def types(self, node: ast.expr) -> set[str]:
        """The sections that an expression may hold."""
        match node:
            case ast.Name(id=name):
                kind = next((scope[name] for scope in reversed(self.names) if name in scope), None)
                return {kind} if kind else set()
            case ast.Attribute(value=value, attr=attr):
                holders = {
                    one
                    for one in self.types(value)
                    if one in SECTIONS and attr in SECTIONS[one].model_fields
                }
                self.reads |= {(one, attr) for one in holders}
                found = {kind for one in holders if (kind := type_of_field(one, attr))}
                return found or (set() if holders else self.attributes.get(attr, set()))
            case ast.Subscript(value=value):
                return {one.strip("[]") for one in self.types(value)}
            case ast.Call(func=ast.Attribute(attr="caption_of")):
                self.reads |= {("DataSettings", "caption"), ("Config", "caption")}
                return {"CaptionSettings"}
            case ast.Call(func=ast.Name(id="getattr"), args=[holder, key, *_]):
                # A name that is no constant comes out of a table in the same module.
                names = {key.value} if isinstance(key, ast.Constant) else self.strings
                sections = self.types(holder) & SECTIONS.keys()
                self.reads |= {
                    (one, name)
                    for one in sections
                    for name in names
                    if name in SECTIONS[one].model_fields
                }
            case ast.Call(
                func=ast.Name(id="with_seed" | "from_rank_0" | "load_config" as name), args=args
            ):
                return {"Config"} if name != "from_rank_0" else self.types(args[-1])
            case ast.BoolOp(values=values):
                return set().union(*map(self.types, values))
        return set()

    def bind(self, target: ast.expr, value: ast.expr | None, *, each: bool = False) -> None:
        """Note what a name or an attribute holds after an assignment, or in a loop."""
        if value is None:
            return
        if isinstance(target, ast.Tuple):
            if isinstance(value, ast.Tuple):
                for one, part in zip(target.elts, value.elts, strict=False):
                    self.bind(one, part)
            elif (
                each
                and isinstance(value, ast.Call)
                and isinstance(value.func, ast.Name)
                and value.func.id in ("enumerate", "zip")
            ):
                parts = [None, *value.args] if value.func.id == "enumerate" else value.args
                for one, part in zip(target.elts, parts, strict=False):
                    self.bind(one, part, each=True)
            return
        for found in self.types(value):
            kind = found.strip("[]") if each else found
            if isinstance(target, ast.Name):
                self.names[-1][target.id] = kind
            elif isinstance(target, ast.Attribute):
                self.attributes.setdefault(target.attr, set()).add(kind)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        """A function has names of its own, its parameters annotated."""
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        self.names.append(
            {one.arg: kind for one in arguments if (kind := section_of(one.annotation))}
        )
        self.generic_visit(node)
        self.names.pop()

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        """A field of a class, or a name with its type."""
        if isinstance(node.target, ast.Name) and (kind := section_of(node.annotation)):
            self.names[-1][node.target.id] = kind
            self.attributes.setdefault(node.target.id, set()).add(kind)
        self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        """A name or an attribute."""
        for target in node.targets:
            self.bind(target, node.value)
        self.generic_visit(node)

    def visit_For(self, node: ast.For) -> None:
        """A name that goes over data sets."""
        self.bind(node.target, node.iter, each=True)
        self.generic_visit(node)

    def visit_comprehension(self, node: ast.comprehension) -> None:
        """The same within an expression."""
        self.bind(node.target, node.iter, each=True)
        self.generic_visit(node)

    def _visit_with_loops_first(
        self, node: ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp
    ) -> None:
        for loop in node.generators:
            self.visit(loop)
        self.generic_visit(node)

    visit_ListComp = visit_SetComp = visit_DictComp = visit_GeneratorExp = _visit_with_loops_first  # noqa: N815 -- ast's names

    def visit_Attribute(self, node: ast.Attribute | ast.Call) -> None:
        """Any use of an attribute."""
        self.types(node)
        self.generic_visit(node)

    visit_Call = visit_Attribute  # noqa: N815 -- as above


def read_settings(sources: list[str]) -> set[tuple[str, str]]:
    """(section, field) of all settings that are read in these modules."""
    attributes: dict[str, set[str]] = {}
    reads: set[tuple[str, str]] = set()
    trees = [ast.parse(source) for source in sources]
    strings = [
        {
            one.value
            for one in ast.walk(tree)
            if isinstance(one, ast.Constant) and isinstance(one.value, str)
        }
        for tree in trees
    ]
    for _ in range(3):  # what is assigned in one module is used in another
        for tree, said in zip(trees, strings, strict=True):
            Reader(attributes, reads, said).visit(tree)
    return reads


@pytest.mark.parametrize(
    ("source", "reads"),
    [
        (
            "def f(config: Config):\n return config.loss.kind",
            {("Config", "loss"), ("LossSettings", "kind")},
        ),
        ("def f(a: LossSettings):\n return a.kind, a.other", {("LossSettings", "kind")}),
        ("def f(a: TextSettings):\n return a.kind", set()),
        (
            "def f(config: Config):\n for n, a in enumerate(config.data):\n  a.flip",
            {("Config", "data"), ("DataSettings", "flip")},
        ),
        (
            "def f(sets: Sequence[DataSettings]):\n return [a.flip for a in sets]",
            {("DataSettings", "flip")},
        ),
        (
            "def f(config: Config):\n return config.data[0].flip",
            {("Config", "data"), ("DataSettings", "flip")},
        ),
        (
            "class A:\n one: LossSettings\n def f(self):\n  return self.one.kind",
            {("LossSettings", "kind")},
        ),
        (
            "class A:\n def f(self, a: LossSettings):\n  self.x, self.y = 1, a\n  self.y.kind",
            {("LossSettings", "kind")},
        ),
        ("def f(kind, config):\n return kind.kind", set()),
        (
            "A = ['kind', 'x']\ndef f(a: LossSettings):\n return [getattr(a, key) for key in A]",
            {("LossSettings", "kind")},
        ),
        (
            "def f(config: Config):\n c = config.caption_of(0)\n c.pick",
            {
                *((one, "caption") for one in ("Config", "DataSettings")),
                ("CaptionSettings", "pick"),
            },
        ),
    ],
)
def test_the_reader_follows_sections(source, reads):
    """A field counts as read if its name or attribute is known to hold its section."""
    assert read_settings([source]) == reads


def test_every_setting_is_read():
    """No setting is without effect because nothing asks for it."""
    reads = read_settings(
        [
            path.read_text(encoding="utf-8")
            for path in sorted(PACKAGE.rglob("*.py"))
            if path.parent.name != OWN or path.name.startswith("settings")
        ]
    )
    expected = {
        (name, field) for name, section in SECTIONS.items() for field in section.model_fields
    }
    assert sorted(expected - reads) == []


def test_there_are_sections_to_walk():
    """The walk goes over all sections that a config has."""
    held = {info.annotation for name, info in Config.model_fields.items() if name != "data"} | {
        DataSettings
    }
    assert held <= set(SECTIONS.values())
    assert NoneType not in held


def test_the_page_names_every_setting():
    """The table of sections in docs/training.md names exactly the settings of each of them."""
    page = (PACKAGE.parents[1] / "docs" / "training.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `\[+(\w+)\]+` \| .* \| (`.*`) \|$", page, re.MULTILINE)
    named = {section: re.findall(r"`(\w+)`", keys) for section, keys in rows}
    found = {
        name: list((DataSettings if name == "data" else info.annotation).model_fields)
        for name, info in Config.model_fields.items()
    }
    assert named == found
