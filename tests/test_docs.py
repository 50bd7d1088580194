"""The documents are programs: every block of README and the guides runs, and what the guide to extending defines keeps the project's contracts."""

from __future__ import annotations

import importlib.util
import inspect
import re
import shlex
import sys
import types

import pytest
import torch
from hypothesis import settings

import passes
import surgery
from passes import kinds
from surgery.cli import main
from tests.conftest import ROOT
from tests.networks import low_rank_conv
from tests.passes import test_cleanup, test_kinds, test_passes
from tests.surgery import test_methods

DOCUMENTS = ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")) if path.name != "api.md")]
BENCHMARKS = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("benchmarks/**/README.md"))
EXTENDING = "docs/extending.md"
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)")


def text_of(document):
    return (ROOT / document).read_text()


def blocks_of(document):
    """Language, line number and text of every block."""
    text = text_of(document)
    return [(found[1], text.count("\n", 0, found.start(2)), found[2]) for found in BLOCK.finditer(text)]


def run(document):
    """All blocks of a document in one namespace and in the current folder; the namespace."""
    name = "guide_" + re.sub(r"\W", "_", document)
    sys.modules[name] = module = types.ModuleType(name)
    try:
        for language, line, block in blocks_of(document):
            if language == "python":
                exec(compile("\n" * line + block, str(ROOT / document), "exec"), vars(module))
            elif language == "sh":
                for command in block.replace("\\\n", " ").splitlines():
                    run_command(command)
    finally:
        del sys.modules[name]
    return module


def run_command(command):
    """A line of a shell: our own command is run here, as in the shell; of the others the files that they name must exist."""
    words = shlex.split(command, comments=True)
    if words[:1] == ["surgery"]:
        assert main(words[1:]) == 0, command
    for word in words:
        if word.startswith(("tools/", "benchmarks/", "examples/", "tests/")):
            assert (ROOT / word).exists(), command


@pytest.mark.parametrize("document", [d for d in DOCUMENTS if d != EXTENDING])
def test_every_block_runs(document, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SURGERY_CACHE", str(tmp_path / "cache"))
    run(document)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_blocks_say_what_they_are(document):
    """A block without a language would never be run."""
    assert {language for language, _, _ in blocks_of(document)} <= {"python", "sh", "text", "json"}
    assert text_of(document).count("```") == 2 * len(blocks_of(document))


def headings(document):
    """The anchors of a document, as GitHub makes them."""
    found = re.findall(r"^#+ (.*)$", BLOCK.sub("", text_of(document)), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}


@pytest.mark.parametrize("document", [*DOCUMENTS, "CONTRIBUTING.md", "CHANGELOG.md", *BENCHMARKS])
def test_links_lead_somewhere(document):
    for link in LINK.findall(BLOCK.sub("", text_of(document))):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = ((ROOT / document).parent / path).resolve() if path else ROOT / document
        assert target.exists(), link
        assert not anchor or anchor in headings(target.relative_to(ROOT)), link


def tool(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reference_is_up_to_date():
    assert (ROOT / "docs" / "api.md").read_text() == tool("api_reference").reference(), "run: python tools/api_reference.py"


def test_public_names_say_what_they_take():
    """Every parameter of a public function or method is spoken of in its docstring, or in that of a verb to which the docstring points."""
    for name, item in public():
        for where, function, text in documented(name, item):
            if not text:
                assert where.endswith("__call__") or item in (passes.GraphHost, passes.ModuleHost), where
                continue
            verbs = [getattr(surgery, word, None) for word in re.findall(r"``(\w+)``", text)]
            shared = [parameter for verb in verbs if inspect.isfunction(verb) for parameter in inspect.signature(verb).parameters]
            words = {*re.findall(r"\w+", text), *shared}
            given = [p for p in inspect.signature(function).parameters.values() if p.name not in ("self", "cls")]
            assert not {p.name for p in given if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)} - words, where


def public():
    for module in (surgery, surgery.ranks, passes):
        yield from ((f"{module.__name__}.{name}", getattr(module, name)) for name in module.__all__ if not name.startswith("__"))


def documented(name, item):
    """A function, or the methods of a class, each with its docstring."""
    if inspect.isfunction(item):
        yield name, item, item.__doc__
    elif isinstance(item, type):
        methods = [(key, m.__func__ if isinstance(m, classmethod) else m) for key, m in vars(item).items() if key == "__call__" or key[0] != "_"]
        yield from ((f"{name}.{key}", m, m.__doc__) for key, m in methods if inspect.isfunction(m))
        assert item.__doc__, name


def test_the_citation_is_of_this_version():
    text = (ROOT / "CITATION.cff").read_text()
    assert re.search(r"^version: (.*)$", text, re.MULTILINE)[1] == surgery.__version__
    assert "1909.05675" in text


@pytest.fixture(scope="module")
def extending(tmp_path_factory):
    """The guide's namespace after all its blocks ran; its kind is known as long as this lasts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("extending"))
        patch.setattr(kinds, "_registered", {})
        yield run(EXTENDING)


def contracts(module, *names):
    """The tests of a module that are run with each of its parametrized ``names``."""
    found = [check for name, check in sorted(vars(module).items()) if name.startswith("test_") and names_in(check) == set(names)]
    assert found
    return found


def names_in(check):
    marks = [mark for mark in getattr(check, "pytestmark", []) if mark.name == "parametrize"]
    return {name for mark in marks for name in ([mark.args[0]] if isinstance(mark.args[0], str) else mark.args[0])}


def of(check):
    return check.__name__.removeprefix("test_")


@pytest.mark.parametrize("check", contracts(test_kinds, "kind"), ids=of)
def test_the_guides_kind_keeps_the_contract_of_kinds(check, extending, monkeypatch):
    if hasattr(check, "hypothesis"):  # a quarter of the examples that the project's own kinds get
        monkeypatch.setattr(check, "_hypothesis_internal_use_settings", settings(max_examples=10))
    check(kind=extending.FILTERS)


@pytest.mark.parametrize("host_model", [test_passes.on_module, test_passes.on_graph], ids=["module", "graph"])
@pytest.mark.parametrize("check", contracts(test_passes, "host_model", "kind"), ids=of)
def test_the_guides_kind_keeps_the_contract_of_hosts(check, host_model, extending):
    check(host_model=host_model, kind=extending.FILTERS)


def test_the_guides_kind_cuts_alike_on_both_hosts(extending):
    test_passes.test_both_hosts_cut_alike_with_every_kind(extending.FILTERS)


@pytest.mark.parametrize("host_of", [test_cleanup.on_module, test_cleanup.on_graph], ids=["module", "graph"])
@pytest.mark.parametrize("check", contracts(test_cleanup, "host_of", "apply", "build", "gone"), ids=of)
def test_the_guides_pass_keeps_the_contract_of_passes(check, host_of, extending):
    check(host_of=host_of, apply=extending.FoldPadding(), build=extending.Converted, gone={"pad", "body.1"})


def test_the_guides_rule_is_one_for_every_kind_and_finds_the_rank_that_was_put_in(extending):
    rule = extending.HardThreshold()
    for kind in kinds.all_kinds():
        if kind.has_spectra:
            test_methods.test_every_kind_takes_every_rule(kind, rule)
    conv = low_rank_conv(torch.Generator().manual_seed(0), 5, 4, noise=0.1)
    assert surgery.plan(torch.nn.Sequential(conv), rule) == {"0": surgery.Tucker(5, 4)}
