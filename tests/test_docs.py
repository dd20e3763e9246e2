"""
The documents: no dead link, no name that is gone, and code that runs. `python -m tests.test_docs` mends the line numbers of
links into the code.
"""

import re
import shutil
import subprocess
import sys

import pytest

from conftest import ROOT
from model import BACKBONES, CURVATURES, ENERGIES, RULES

DOCUMENTS = sorted({*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("experiments/*.md"), *ROOT.glob("results/**/*.md")})
LINK = re.compile(r"\[([^\]]*)\]\(([^)\s]+)\)")
each_document = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))


def prose(path):
    """A document without its blocks of code."""
    return re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)


def slugs(path):
    """The anchors that GitHub makes of a document's headings."""
    headings = re.findall(r"^#+ (.*)$", prose(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def defined(path, name):
    """The number of the line of a Python file that defines a name, or None."""
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if re.match(rf"\s*((class|def) {name}\b|{name} = )", line):
            return number
    return None


@each_document
def test_links(path):
    for text, target in LINK.findall(prose(path)):
        if target.startswith(("http:", "https:", "mailto:")):
            continue
        file, _, anchor = target.partition("#")
        there = (path.parent / file).resolve() if file else path
        assert there.exists(), f"[{text}]({target}): no such file"
        if there.suffix == ".py" and text.startswith("`"):
            number = defined(there, text.strip("`"))
            assert number, f"[{text}]({target}): {there.name} defines no such name"
            assert anchor == f"L{number}", (
                f"[{text}]({target}) is at line {number}: python -m tests.test_docs mends all of these"
            )
        elif anchor:
            assert anchor in slugs(there), f"[{text}]({target}): no such heading"


def test_every_result_is_linked():
    """No file lies in results/ that no document speaks of."""
    linked = {
        (path.parent / target.partition("#")[0]).resolve() for path in DOCUMENTS for _, target in LINK.findall(prose(path))
    }
    assert {path for path in ROOT.glob("results/**/*.*")} <= linked | {ROOT / "results" / "README.md"}


@each_document
def test_names_of_tests(path):
    """A test that a document names is there."""
    tests = "".join(p.read_text() for p in [ROOT / "test_model.py", *ROOT.glob("tests/test_*.py")])
    for name in re.findall(r"\btest_\w+\b(?!\.py)", prose(path)):
        assert f"def {name}(" in tests or name in {p.stem for p in ROOT.glob("**/test_*.py")}, name


@each_document
def test_python_blocks(path):
    """Each runs, in the order of the document, and prints what the comments behind print() say."""
    blocks = re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL)
    whole = "\n".join(blocks)
    if not blocks:
        return
    done = subprocess.run([sys.executable, "-c", whole], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:-1] == [
        said.strip() for said in re.findall(r"print\(.*#(.*?)(?::.*)?$", whole, re.MULTILINE)
    ]


@pytest.mark.slow
def test_solutions(tmp_path):
    """The solutions of the exercises pass the tests that grade them."""
    for path in (*ROOT.glob("*.py"), ROOT / "pyproject.toml"):
        shutil.copy(path, tmp_path)
    blocks = re.findall(r"```(?:py)?\n(.*?)```", (ROOT / "docs" / "solutions.md").read_text(), re.DOTALL)
    classes = [block for block in blocks if "class " in block]
    functions = [block for block in blocks if block.startswith("def ") and block not in classes]
    equations = [block for block in blocks if re.match(r"\w+=lambda", block)]
    assert (len(classes), len(functions), len(equations)) == (3, 2, 3)
    lines = {
        "model.py": ("SPLITTINGS = dict(", [*classes, "RULES.update(fading=Fading)\n",
                     "ENERGIES.update(quartic=QuarticAttention, deltanet=DeltaNet)\n"]),
        "test_model.py": ("BESIDE = {", [*functions, f"EQUATIONS['momentum'].update({equations[0]})\n",
                          f"EQUATIONS['energy'].update({''.join(equations[1:])})\n"]),
    }  # fmt: skip
    for name, (before, added) in lines.items():
        text = (tmp_path / name).read_text()
        assert text.count(f"\n{before}") == 1
        (tmp_path / name).write_text(text.replace(f"\n{before}", "\n" + "\n\n".join(added) + f"\n{before}"))
    command = [sys.executable, "-m", "pytest", "-k", "fading or quartic or deltanet or every_class", "test_model.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and int(re.search(r"(\d+) passed", done.stdout)[1]) > 30, done.stdout


def test_learn_has_every_part():
    """Each energy, curvature, oracle and rule has a line in LEARN.md's table, with an equation and a test."""
    table = (ROOT / "LEARN.md").read_text().split("## Equation, class, test")[1]
    parts = [*ENERGIES.values(), *CURVATURES.values(), *RULES.values(), *BACKBONES.values()]
    for part in parts:
        (row,) = [row for row in table.splitlines() if row.count("|") == 4 and f"[`{part.__name__}`]" in row.split("|")[2]]
        assert "$" in row.split("|")[1] and "`test_" in row.split("|")[3], row


def mend():
    """Write the right line numbers into all links to names in Python files."""
    for path in DOCUMENTS:

        def right(link, path=path):
            text, target = link.groups()
            file = path.parent / target.partition("#")[0]
            number = defined(file, text.strip("`")) if file.suffix == ".py" and text.startswith("`") and file.exists() else None
            return f"[{text}]({target.partition('#')[0]}#L{number})" if number else link[0]

        path.write_text(LINK.sub(right, path.read_text()))


if __name__ == "__main__":
    mend()
