r"""What the handbook needs beside Markdown, made when it is built: no page asks a network for anything.

    $x_t$, $$x_t = \alpha_t x_0 \tag{1}$$   a formula: MathML, which browsers set by themselves
    [[module:name]]                         the line that defines the name, on a page with that module's source
    [[module:name text]]                    the first line of the name's definition that holds the text
    [[reverie train]]                       the help of a command, as it prints it
    [[rv]]                                  the names that `import reverie as rv` offers

A mark that no longer points at anything, and a formula that cannot be set, fail the build.
"""

import ast
import html
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
MARK = re.compile(r"\[\[(reverie[\w.]*):([\w.]+)(?: ([^\]\n]+))?\]\]")
HELP = re.compile(r"\[\[reverie ?([a-z]*)\]\]")
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
BLOCK = re.compile(r"^\$\$.*\\tag\{([^}]*)\}.*\$\$$", re.MULTILINE)
TAG = re.compile(r"\\tag\{([^}]*)\}")


class Place(NamedTuple):
    """A line of a file of the project."""

    path: str
    line: int


# Marks ----------------------------------------------------------------------------------------


def locate(module: str, name: str, text: str | None = None) -> Place:
    """Return where a module defines a name, or the first line of that definition with the text in it.

    Raises:
        LookupError: There is no such module, name or text.

    Example:
        >>> locate("reverie.diffusion.process", "Posterior.mean").path
        'reverie/diffusion/process.py'
    """
    path = module_path(module)
    source = (ROOT / path).read_text()
    node = definition(ast.parse(source).body, name.split("."))
    if node is None:
        raise LookupError(f"{path} defines no {name}")
    if text is None:
        return Place(path, node.lineno)
    lines = source.splitlines()[node.lineno - 1 : node.end_lineno]
    found = next((i for i, line in enumerate(lines) if text in line), None)
    if found is None:
        raise LookupError(f"{name} of {path} has no line with {text!r}")
    return Place(path, node.lineno + found)


def module_path(module: str) -> str:
    """Return a module's file, from the project's root."""
    path = module.replace(".", "/")
    for candidate in (f"{path}.py", f"{path}/__init__.py"):
        if (ROOT / candidate).is_file():
            return candidate
    raise LookupError(f"there is no module {module}")


def definition(body: Sequence[ast.stmt], names: Sequence[str]) -> ast.stmt | None:
    """Return the statement that defines names[0], and within it names[1], and so on."""
    for node in statements(body):
        if names[0] in defined(node):
            if len(names) == 1:
                return node
            inner = definition(getattr(node, "body", []), names[1:])
            if inner is not None:
                return inner
    return None


def statements(body: Sequence[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield statements, those under an if or a try among them."""
    for node in body:
        yield node
        if isinstance(node, ast.If | ast.Try):
            yield from statements([*node.body, *node.orelse])


def defined(node: ast.stmt) -> list[str]:
    """Return the names that a statement defines."""
    if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]


def marks(markdown: str) -> Iterator[tuple[str, str, str | None]]:
    """Yield the (module, name, text) of each mark."""
    for match in MARK.finditer(markdown):
        yield match[1], match[2], match[3]


def source_page(path: str) -> str:
    """Return the page that shows a file: source/diffusion/process.md for reverie/diffusion/process.py."""
    return f"source/{path.removeprefix('reverie/').removesuffix('.py')}.md"


def source_text(path: str) -> str:
    """Return the page that shows a file, its lines numbered."""
    fence = "`" * 8
    code = (ROOT / path).read_text().rstrip()
    return f'---\nsearch:\n  exclude: true\n---\n# {path}\n\n{fence} {{ .python linenums="1" }}\n{code}\n{fence}\n'


def link(match: re.Match[str], page: Any, files: Any) -> str:
    """Return the link, in HTML, that a mark on a page stands for."""
    try:
        place = locate(match[1], match[2], match[3])
    except LookupError as error:
        log.warning("%s: the mark %s points at nothing: %s", page.file.src_uri, match[0], error)
        return match[0]
    target = files.get_file_from_path(source_page(place.path)).url_relative_to(page.file)
    shown = f"{place.path.removeprefix('reverie/')}:{place.line}"
    return f'<a class="line" href="{target}#__codelineno-0-{place.line}">{shown}</a>'


# The command line's help ------------------------------------------------------------------------


@cache
def command_help(name: str) -> str:
    """Return the help of a command, or of the group for no name.

    Raises:
        LookupError: There is no such command.
    """
    import click

    from reverie.cli.main import cli

    names = ["-h", "--help"]  # as the command line has them: click remembers the option that it made first
    group = click.Context(cli, info_name="reverie", max_content_width=100, terminal_width=100, help_option_names=names)
    if not name:
        return cli.get_help(group)
    command = cli.get_command(group, name)
    if command is None:
        raise LookupError(f"there is no command {name}")
    return command.get_help(click.Context(command, group, info_name=name, max_content_width=100, terminal_width=100))


def help_block(match: re.Match[str], page: str) -> str:
    """Return a command's help as a block of text."""
    try:
        return f"```text\n{command_help(match[1])}\n```"
    except LookupError as error:
        log.warning("%s: %s: %s", page, match[0], error)
        return match[0]


def names_table() -> str:
    """Return a table of what can be asked of the package, module by module."""
    import reverie

    rows = [f"| `{module}` | {', '.join(f'`{name}`' for name in names)} |" for module, names in reverie._PLACES.items()]
    return "\n".join(["| module | names |", "|---|---|", *rows])


# Formulas -------------------------------------------------------------------------------------


@cache
def mathml(latex: str, block: bool) -> str:
    """Return a formula as MathML.

    Raises:
        ValueError: It holds a command that latex2mathml does not know.
    """
    from latex2mathml.converter import convert

    result = convert(latex, display="block" if block else "inline")
    if unknown := re.search(r"\\[A-Za-z]+", result):
        raise ValueError(f"{unknown[0]} of the formula {latex!r} is not known to latex2mathml")
    return result


def set_formula(match: re.Match[str], page: str) -> str:
    """Return a formula that arithmatex found, with its number where it has one, as HTML."""
    latex, block = html.unescape(match[2]).strip(), match[1] == "div"
    tag = TAG.search(latex)
    try:
        formula = mathml(TAG.sub("", latex).strip(), block)
    except Exception as error:
        log.warning("%s: %s", page, error)
        return match[0]
    if not block:
        return formula
    number = f'<a class="number" href="#eq-{tag[1]}">({tag[1]})</a>' if tag else ""
    return f'<div class="formula">{formula}{number}</div>'


def anchored(markdown: str) -> str:
    """Return a page with a place to link to before each formula that has a number.

    Example:
        >>> anchored("$$ x \\\\tag{1} $$")
        '<div id="eq-1"></div>\\n\\n$$ x \\\\tag{1} $$'
    """
    return BLOCK.sub(lambda match: f'<div id="eq-{match[1]}"></div>\n\n{match[0]}', markdown)


# What MkDocs calls ------------------------------------------------------------------------------

log = logging.getLogger("mkdocs.hooks.handbook")


def on_config(config: Any) -> None:
    """Let warnings be heard: --quiet would silence them before --strict could count them."""
    if config.strict:
        logging.getLogger("mkdocs").setLevel(logging.WARNING)


def on_files(files: Any, config: Any) -> Any:
    """Add a page with the source of each module that a mark points into."""
    from mkdocs.structure.files import File, InclusionLevel

    paths = set()
    for file in files.documentation_pages():
        for module, name, text in marks(file.content_string):
            with suppress(LookupError):  # said where it stands
                paths.add(locate(module, name, text).path)
    for path in sorted(paths):
        page = File.generated(config, source_page(path), content=source_text(path), inclusion=InclusionLevel.NOT_IN_NAV)
        files.append(page)
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Turn marks into links and help."""
    where = page.file.src_uri
    if where.startswith("source/"):
        return markdown
    markdown = MARK.sub(lambda match: link(match, page, files), markdown)
    markdown = HELP.sub(lambda match: help_block(match, where), markdown)
    return anchored(markdown.replace("[[rv]]", names_table()))


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    """Set the formulas."""
    return FORMULA.sub(lambda match: set_formula(match, page.file.src_uri), html)
