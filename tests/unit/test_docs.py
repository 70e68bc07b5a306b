"""The documents say what is there: links, names, states, commands and generated pages."""

import ast
import enum
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import controller.cli
import controller.status
import decode_worker.request
import pdserve.contract.messages
import pdserve.handoff.ledger
import pdserve.handoff.prefill_job
import router.request_reports
from pdserve.config import DeployConfig
from pdserve.contract.work import BlockCounts
from tools import make_metrics_docs

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md")])
PACKAGES = ("pdserve", "router", "prefill_worker", "decode_worker", "controller")

LINK = re.compile(r"\[(?P<text>[^\]]+)\]\((?P<target>[^)\s]+)\)")
FILE = re.compile(r"(?<![\w<>/-])(?:[\w.-]+/)+[\w.-]+\.(?:py|md|proto|yaml|toml)\b")
DEFINITION = re.compile(r"`(?P<path>[\w./-]+\.py)::(?P<name>[\w.]+)`")
STATE_ENUMS: dict[str, type[enum.Enum]] = {
    kind.__name__: kind
    for kind in (
        pdserve.handoff.prefill_job.JobState,
        decode_worker.request.Phase,
        pdserve.handoff.ledger.HoldKind,
        pdserve.contract.messages.WorkerState,
        controller.status.ProcessState,
        controller.status.SystemState,
        router.request_reports.RequestState,
    )
}
LEGAL_MOVES = {
    "JobState": pdserve.handoff.prefill_job._LEGAL_MOVES,
    "Phase": decode_worker.request._LEGAL_MOVES,
}


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def links_of(page: Path) -> Iterator[tuple[str, str]]:
    """(text, target) of every link that stays in the repository."""
    for match in LINK.finditer(page.read_text()):
        if "://" not in match["target"] and not match["target"].startswith("mailto:"):
            yield match["text"], match["target"]


def definitions(source: Path) -> set[str]:
    """Qualified names of the classes, functions, fields and constants that a Python file defines."""
    names: set[str] = set()

    def visit(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            match node:
                case ast.ClassDef() | ast.FunctionDef() | ast.AsyncFunctionDef():
                    names.add(prefix + node.name)
                    visit(node.body, f"{prefix}{node.name}.")
                case ast.AnnAssign(target=ast.Name(name)):
                    names.add(prefix + name)
                case ast.Assign(targets=targets):
                    names.update(prefix + target.id for target in targets if isinstance(target, ast.Name))

    visit(ast.parse(source.read_text()).body, "")
    return names


def anchors(page: Path) -> set[str]:
    """What can follow # in a link to a page: its headings as GitHub writes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_resolve(page: Path) -> None:
    for text, target in links_of(page):
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), f"{text}: {target} does not exist"
        assert not re.fullmatch(r"L\d+.*", anchor), f"{text}: line numbers move; name a definition instead"
        if anchor:
            assert anchor in anchors(linked), f"{text}: {name_of(linked)} has no heading #{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_names_that_link_to_code_are_defined_there(page: Path) -> None:
    for text, target in links_of(page):
        name = text.strip("`").removesuffix("()")
        if target.endswith(".py") and text.startswith("`") and re.fullmatch(r"[A-Za-z_][\w.]*", name):
            source = (page.parent / target).resolve()
            assert name in definitions(source), f"{name_of(source)} does not define {name}"
    for match in DEFINITION.finditer(page.read_text()):
        assert match["name"] in definitions(ROOT / match["path"]), match[0]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_that_are_named_exist(page: Path) -> None:
    for path in FILE.findall(page.read_text()):
        places = (ROOT / path, page.parent / path)
        assert any(place.exists() for place in places), f"{path} does not exist"


# --- docs/states.md ---


def sections(page: Path) -> dict[str, list[list[str]]]:
    """Rows of the first table of every section of a page, by the section's first linked code name."""
    found: dict[str, list[list[str]]] = {}
    for section in re.split(r"^## ", page.read_text(), flags=re.MULTILINE)[1:]:
        link = re.search(r"\[`(\w+)`\]", section)
        rows = [line.split("|")[1:-1] for line in section.splitlines() if line.startswith("|")]
        if link is not None and rows:
            found[link[1]] = [[cell.strip() for cell in row] for row in rows[2:]]
    return found


def state_enums_in_code() -> set[str]:
    """Every enum of the packages that by its name is a state of something."""
    return {
        node.name
        for package in PACKAGES
        for source in (ROOT / package).rglob("*.py")
        for node in ast.walk(ast.parse(source.read_text()))
        if isinstance(node, ast.ClassDef)
        and any(isinstance(base, ast.Name) and base.id.endswith("Enum") for base in node.bases)
        and re.search(r"(State|Phase|HoldKind)$", node.name)
    }


def test_every_state_enum_has_its_table() -> None:
    assert state_enums_in_code() == set(STATE_ENUMS)
    assert set(STATE_ENUMS) <= set(sections(DOCS / "states.md"))


@pytest.mark.parametrize("enum_name", STATE_ENUMS)
def test_tables_have_exactly_the_states_of_the_code(enum_name: str) -> None:
    rows = sections(DOCS / "states.md")[enum_name]
    assert [row[0].strip("`") for row in rows] == [state.name for state in STATE_ENUMS[enum_name]]


@pytest.mark.parametrize("enum_name", LEGAL_MOVES)
def test_tables_have_exactly_the_legal_moves(enum_name: str) -> None:
    rows = sections(DOCS / "states.md")[enum_name]
    told = {(row[0].strip("`"), to) for row in rows for to in re.findall(r"`(\w+)`", row[2])}
    assert told == {(source.name, target.name) for source, target in LEGAL_MOVES[enum_name]}


def test_blocks_are_counted_as_the_table_says() -> None:
    rows = sections(DOCS / "states.md")["BlockAllocator"]
    assert {row[0].strip("`") for row in rows} == set(BlockCounts.__dataclass_fields__)


# --- README.md and generated pages ---


def code_blocks(page: Path, language: str) -> str:
    return "\n".join(re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL))


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "CONTRIBUTING.md"], ids=name_of)
def test_make_commands_exist(page: Path) -> None:
    named = set(re.findall(r"\bmake ([a-z][\w-]*)", "\n".join(re.findall(r"`[^`]+`", page.read_text()))))
    named |= set(re.findall(r"^make ([a-z][\w-]*)", code_blocks(page, "sh"), re.MULTILINE))
    assert named
    assert named <= make_targets()


def test_the_two_commands_start_and_test() -> None:
    commands = code_blocks(ROOT / "README.md", "sh").splitlines()
    assert "make up" in [line.split("#")[0].strip() for line in commands]
    assert "make test" in [line.split("#")[0].strip() for line in commands]


def test_command_lines_are_understood() -> None:
    """Every `pdserve ...` line of the README parses; nothing is run."""
    lines = [line.split(" # ")[0] for line in code_blocks(ROOT / "README.md", "sh").splitlines()]
    commands = [shlex.split(line)[1:] for line in lines if line.startswith("pdserve ")]
    names = {"up", "status", "top", "admin", "check", "fault", "bench", "simulate", "generate", "down"}
    names |= {"scale", "drain", "rollout"}
    assert {words[0] for words in commands} == names
    for words in commands:
        controller.cli._parser().parse_args(words)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_configuration_keys_exist(page: Path) -> None:
    sections = "|".join(DeployConfig.model_fields)
    for key in re.findall(rf"`((?:{sections})(?:\.[a-z_]+)+)`", page.read_text()):
        kind: Any = DeployConfig
        for name in key.split("."):
            assert name in kind.model_fields, f"{key} is not a configuration key"
            kind = kind.model_fields[name].annotation


def test_folders_in_the_picture_exist() -> None:
    picture = code_blocks(ROOT / "README.md", "text")
    folders = set(re.findall(r"\b([a-z_]+(?:/[a-z_]+)*)/", picture))
    assert set(PACKAGES) <= folders
    for folder in folders:
        assert (ROOT / folder).is_dir(), f"{folder}/ is in the README's picture and not in the repository"


def test_metrics_page_is_generated_from_the_code() -> None:
    assert make_metrics_docs.PAGE.read_text() == make_metrics_docs.make_page()


def test_every_decision_has_a_number_of_its_own() -> None:
    """A number stays with its decision: what was withdrawn, or is written elsewhere, leaves a gap."""
    numbers = [int(path.name[:4]) for path in (DOCS / "decisions").glob("[0-9]*.md")]
    assert len(set(numbers)) == len(numbers)


def test_every_decision_is_listed() -> None:
    listed = {target for _, target in links_of(DOCS / "decisions" / "README.md")}
    assert {path.name for path in (DOCS / "decisions").glob("[0-9]*.md")} <= listed
