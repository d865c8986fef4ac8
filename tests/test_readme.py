"""Every command that the documentation prints can be started."""

import ast
import configparser
import importlib.util
import os
import pathlib
import re
import shlex
import subprocess
import sys

import pytest

from experiments.lab import catalogue, pages
from tests import command_lines

ROOT = pathlib.Path(__file__).resolve().parents[1]
# What a newcomer reads; recipes and experiments print commands in their docstrings.
PAGES = [
    *(ROOT / name for name in ("README.md", "experiments/RESULTS.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]


def documents() -> dict[str, str]:
    """Returns the texts that print commands, by their path."""
    found = {str(p.relative_to(ROOT)): p.read_text("utf-8") for p in PAGES}
    for folder in ("configs", "experiments"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            doc = ast.get_docstring(ast.parse(path.read_text("utf-8")))
            found[str(path.relative_to(ROOT))] = doc or ""
        for path in sorted((ROOT / folder).rglob("*.md")):
            found[str(path.relative_to(ROOT))] = path.read_text("utf-8")
    return found


def shell_lines(text: str) -> list[str]:
    """Returns the lines of fenced blocks of commands, continued ones joined.

    In a console block commands follow `$ `, all else is output.
    """
    lines = []
    for kind, block in re.findall(r"^```(\w*)\n(.*?)^```", text, re.M | re.S):
        block = block.replace("\\\n", " ")
        # What is written into a file is no command.
        block = re.sub(r"(<<'?(\w+)'?)\n.*?^\2$", r"\1", block, flags=re.M | re.S)
        if kind == "console":
            lines += re.findall(r"^\$ (.*)$", block, re.M)
        elif kind in ("bash", "sh", "shell") or (not kind and "python -m" in block):
            lines += block.splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


def commands(text: str) -> list[list[str]]:
    """Returns the words of every command printed: in blocks, `python -m` anywhere."""
    found = []
    for line in shell_lines(text):
        found += split(line)
    outside = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    outside = outside.replace("\\\n", " ")
    # Up to the end of the line or of what backticks enclose.
    for line in re.findall(r"\bpython -m [^\n`]+", outside):
        found += split(line)
    for line in re.findall(r"`(pip install [^\n`]+)`", outside):
        found += split(line)
    return found


def split(line: str) -> list[list[str]]:
    """Splits a shell line into the words of its commands.

    Of what a cluster's launcher starts, the command behind the launcher.
    """
    words, found = shlex.split(line, comments=True), [[]]
    if words[:1] == ["gcloud"]:
        started = [w for w in words if w.startswith("--command=")]
        assert started, line
        return split(started[0].removeprefix("--command="))
    for word in words:
        if word in ("&&", ";"):
            found.append([])
        else:
            found[-1].append(word)
    found = [command for command in found if command and command[0] != "cd"]
    return [c[c.index("python") :] if c[0] == "srun" else c for c in found]


DOCUMENTS = documents()
PRINTED = [(path, words) for path in DOCUMENTS for words in commands(DOCUMENTS[path])]


def modules() -> list[tuple[str, list[str]]]:
    """Returns the `python -m` commands of this repository's programs."""
    ours = ("tlt_jax", "experiments", "notebooks")
    return [
        (path, words[2:])
        for path, words in PRINTED
        if words[:2] == ["python", "-m"] and words[2].split(".")[0] in ours
    ]


# Commands as they would be printed after a flag or a setting has gone.
STALE = (
    ("tlt_jax.main", "--config=configs/tiny.py", "--workdir=D", "--config.sed=1"),
    ("experiments.decode_speed", "--no-such-flag"),
    ("tlt_jax.export", "--workdir=D", "--out=D", "--no_such_flag=1"),
    ("tlt_jax.export", "--workdir=D"),
    ("tlt_jax.gone",),
)


@pytest.fixture(scope="module")
def started():
    """What came of every `python -m` command of ours, started once each."""
    unique = list(dict.fromkeys(tuple(words) for _, words in modules()))
    present = [words for words in unique if exists(words[0])]
    started = [prepared(words) for words in present]
    results = command_lines.start([*started, *STALE], stop=True)
    return dict(zip([*present, *STALE], results, strict=True))


def exists(module: str) -> bool:
    try:
        found = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        return False
    if found is not None and found.submodule_search_locations is not None:
        found = importlib.util.find_spec(f"{module}.__main__")
    return found is not None


def prepared(words: tuple[str, ...]) -> list[str]:
    """Puts something there for the words that a reader replaces."""
    # A session in a folder beside the clone names its recipes so.
    replaced = {"configs/<recipe>.py": "configs/tiny.py", "=../tlt_jax/": "="}
    prepared = []
    for word in words:
        word = re.sub(r"\bSPEC\b|\bsmollm2-135m-instruct\b", "scratch", word)
        for old, new in replaced.items():
            word = word.replace(old, new)
        prepared.append(word)
    return prepared


@pytest.mark.parametrize(
    ("path", "words"), modules(), ids=lambda value: " ".join(value)[:70]
)
def test_a_printed_command_starts(started, path, words):
    assert exists(words[0]), f"{path} prints a module that is not there: {words[0]}"
    status, output, errors = started[tuple(words)]
    assert status == 0, f"{path} prints a command that fails: {words}\n{errors}"
    if words[0] == "tlt_jax.main" and "--help" not in words:
        assert "would train" in output


def test_every_recipe_prints_its_command():
    for path in sorted((ROOT / "configs").glob("*.py")):
        named = f"--config=configs/{path.name}"
        printed = commands(ast.get_docstring(ast.parse(path.read_text())))
        assert any(
            word.partition(":")[0] == named for words in printed for word in words
        ), f"{path.name} says no command that starts it"


def test_every_experiment_prints_its_command():
    for slug in (*catalogue.PAPER, *catalogue.OURS):
        printed = commands(DOCUMENTS[f"experiments/{slug}.py"])
        assert any(f"experiments.{slug}" in words for words in printed), slug


def test_tables_of_the_readme_are_those_of_the_results():
    """`python -m experiments tables` writes them."""
    for page in ("README.md", "experiments/RESULTS.md", "docs/recipes.md"):
        text = DOCUMENTS[page]
        assert "<!-- table: " in text
        assert pages.rendered(text) == text


def extras() -> dict[str, str]:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return dict(parser["options.extras_require"])


def installs() -> list[tuple[str, list[str]]]:
    return [
        (path, words[words.index("install") + 1 :])
        for path, words in PRINTED
        if words[0] == "pip" or words[:3] == ["python", "-m", "pip"]
        if "install" in words
    ]


@pytest.mark.parametrize(
    ("path", "words"), installs(), ids=lambda value: " ".join(value)[:70]
)
def test_a_printed_installation_names_what_there_is(path, words):
    for word in words:
        if not word.startswith("."):
            continue
        local = re.fullmatch(r"\.(?:\[([\w,]+)\])?", word)
        assert local, f"{path}: pip installs {word}"
        for extra in (local[1] or "").split(",") if local[1] else ():
            assert extra in extras(), f"{path}: setup.cfg has no extra {extra!r}"


def test_tests_are_run_as_continuous_integration_runs_them():
    """Apart from what only changes the output, and the torch that is pinned there."""
    script = (ROOT / ".ci" / "run").read_text()
    quiet = re.compile(r"-q|-p no:cacheprovider|--durations=\d+|</dev/null")

    def pytest_commands(text):
        lines = re.findall(r"^python -m pytest .*$", text, re.M)
        return {" ".join(quiet.sub("", line).split()) for line in lines}

    readme = "\n".join(shell_lines(DOCUMENTS["README.md"]))
    (ours,) = pytest_commands(script)
    assert ours in pytest_commands(readme)
    pinned = re.findall(r"torch==\S+", script)
    assert pinned and all(f"pip install {name} " in readme for name in pinned)
    assert pinned[0] in extras()["test"]


def test_markers_that_are_printed_exist():
    settings = (ROOT / "pyproject.toml").read_text()
    for path, words in PRINTED:
        if words[:3] == ["python", "-m", "pytest"] and "-m" in words[3:]:
            marker = words[words.index("-m", 3) + 1]
            assert f'"{marker}: ' in settings, f"{path}: no marker {marker!r}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_names_exist(page):
    text = page.read_text("utf-8")
    folders = "tlt_jax|configs|experiments|tests|notebooks"
    # Paths in text are the repository's, links are the page's.
    named = re.findall(rf"(?<![\w(/])(?:{folders})/[\w/]+\.[a-z]+", text)
    linked = re.findall(r"\]\((?!http)([^)#]+)(?:#[^)]*)?\)", text)
    assert named or linked or page.name in ("metrics.md", "settings.md")
    missing = [name for name in named if not (ROOT / name).exists()]
    missing += [name for name in linked if not (page.parent / name).exists()]
    assert not missing, f"{page.name} names {missing}, which are not there"


def test_tests_that_a_page_names_exist():
    named = [
        found
        for text in DOCUMENTS.values()
        for found in re.findall(r"`(?:tests/)?([\w/]+\.py)::(\w+)`", text)
    ]
    assert len(named) > 50
    missing = [
        f"{file}::{name}"
        for file, name in named
        if not (ROOT / "tests" / file).is_file()
        or f"\ndef {name}(" not in (ROOT / "tests" / file).read_text("utf-8")
    ]
    assert not missing


def test_the_readme_is_one_page():
    size = len(DOCUMENTS["README.md"].encode())
    assert size <= 10_000, f"README.md has {size} bytes: what is more belongs to docs/"


def test_every_page_is_in_the_site_and_in_its_index():
    index = DOCUMENTS["docs/index.md"]
    navigation = (ROOT / "mkdocs.yml").read_text("utf-8")
    for page in (ROOT / "docs").glob("*.md"):
        assert f": {page.name}" in navigation, f"mkdocs.yml leaves out {page.name}"
        assert page.name == "index.md" or f"({page.name})" in index, page.name


def test_the_site_builds_without_a_warning(tmp_path):
    """Every link and anchor between pages leads somewhere; nothing is loaded."""
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--quiet", f"--site-dir={tmp_path}"],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr + built.stdout
    results = (tmp_path / "results" / "index.html").read_text("utf-8")
    for picture in re.findall(r'<img[^>]* src="([^"]+)"', results):
        assert (tmp_path / "results" / picture).is_file(), picture
    for html in tmp_path.rglob("*.html"):
        loaded = re.findall(
            r'(?:src|<link[^>]*href)="(https?:[^"]+)"', html.read_text()
        )
        assert not loaded, f"{html.name} loads {loaded}"


def told_by_the_code() -> str:
    """All texts in the package, with a gap where a value stands."""
    texts = []
    for path in sorted((ROOT / "tlt_jax").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return "\n".join(texts)


def test_messages_that_are_explained_are_told():
    """Every part of a quoted message between the values that stand in it."""
    table = DOCUMENTS["docs/troubleshooting.md"]
    rows = re.findall(r"^\| (.*?) \|", table, re.M)[2:]
    quoted = [text for row in rows for text in re.findall(r"`([^`]+)`", row)]
    code = told_by_the_code()
    assert len(quoted) > 15
    for text in quoted:
        parts = re.split(r"\.\.\.|\b[A-Z]+\b", text)
        parts = [part.strip(" ,") for part in parts]
        missing = [part for part in parts if len(part) > 3 and part not in code]
        assert not missing, f"{text!r} is explained, but nothing says {missing}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_of_a_page_is_of_a_kind_that_is_checked(page):
    for line in shell_lines(page.read_text("utf-8")):
        for words in split(line):
            known = (
                words[0] in ("pip", "echo", "head", "ls", "mkdir", "tensorboard")
                # A script that the page prints, as its own test runs it.
                or f"# {words[-1]}\n" in page.read_text("utf-8")
                or (words[:2] == ["python", "-m"])
                or (words[0].startswith((".", "./")) and (ROOT / words[0]).is_file())
            )
            assert known, f"teach this test how to start {words}"
            if words[:2] == ["python", "-m"]:
                ours = words[2].split(".")[0] in ("tlt_jax", "experiments", "notebooks")
                assert ours or words[2] in ("pytest", "pip", "mkdocs"), words


def test_commands_are_found_and_missing_ones_noticed():
    text = (
        "Start `python -m experiments` or\n\n    python -m tlt_jax.main \\\n        "
        "--config=configs/tiny.py --workdir=DIR\n\n```bash\npip install -e '.[test]' "
        "&& python -m gone.away --x=1  # later\n```\n```console\n$ .ci/run\nok\n```\n"
    )
    assert commands(text) == [
        ["pip", "install", "-e", ".[test]"],
        ["python", "-m", "gone.away", "--x=1"],
        [".ci/run"],
        ["python", "-m", "experiments"],
        ["python", "-m", "tlt_jax.main", "--config=configs/tiny.py", "--workdir=DIR"],
    ]
    assert not exists("gone.away") and not exists("tlt_jax.gone")
    assert exists("experiments") and not exists("tlt_jax")


@pytest.mark.parametrize("words", STALE, ids=" ".join)
def test_a_stale_command_would_be_noticed(started, words):
    assert started[words].status != 0
