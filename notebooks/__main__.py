"""Execute the notebooks and keep what they show: `python -m notebooks [NAME ...]`.

Outputs are kept so that pictures are there for whoever looks at a notebook in a browser
without running it. Each notebook records of which sources its outputs are: a test fails
if a cell was changed and the notebook not executed again. Needs the extra `demo`.

    python -m notebooks
    python -m notebooks 1_draft_tree
    python -m notebooks --repository=OWNER/NAME

The last one executes nothing: it writes the address of the public repository into the
badges and the first cells.
"""

import argparse
import hashlib
import json
import pathlib
import re
import sys
import tempfile

FOLDER = pathlib.Path(__file__).resolve().parent
_TIMEOUT_S = 1800
_SOURCES = "executed_sources"
_ADDRESS = re.compile(
    r"(https://(?:colab\.research\.google\.com/github|github\.com)/)[\w.-]+/[\w.-]+"
)


def names() -> list[str]:
    """List the notebooks."""
    return sorted(path.stem for path in FOLDER.glob("*.ipynb"))


def digest(notebook: dict) -> str:
    """Hash the sources of all cells that are executed."""
    sources = ["".join(c["source"]) for c in notebook["cells"] if _is_code(c)]
    return hashlib.sha256("\0".join(sources).encode()).hexdigest()[:16]


def execute(name: str) -> None:
    """Execute a notebook from beginning to end and write it with its outputs."""
    import nbclient
    import nbformat

    path = FOLDER / f"{name}.ipynb"
    notebook = nbformat.read(path, as_version=4)
    client = nbclient.NotebookClient(
        notebook,
        timeout=_TIMEOUT_S,
        kernel_name="python3",
        record_timing=False,
        resources={"metadata": {"path": str(FOLDER.parent)}},
    )
    client.execute()
    for cell in notebook.cells:
        if _is_code(cell):
            kept = [_kept(o) for o in cell.outputs if _is_shown(o)]
            cell.outputs = nbformat.from_dict(kept)
    notebook.metadata.pop("language_info", None)
    plain = json.loads(nbformat.writes(notebook))
    notebook.metadata[_SOURCES] = digest(plain)
    path.write_text(nbformat.writes(notebook).rstrip("\n") + "\n", "utf-8")


def is_executed(notebook: dict) -> bool:
    """Say whether a notebook's outputs are those of its sources."""
    return notebook["metadata"].get(_SOURCES) == digest(notebook)


def publish(repository: str) -> None:
    """Write a repository's address into badges and first cells."""
    for name in names():
        path = FOLDER / f"{name}.ipynb"
        notebook = json.loads(path.read_text("utf-8"))
        was_executed = is_executed(notebook)
        for cell in notebook["cells"]:
            cell["source"] = [
                _ADDRESS.sub(rf"\g<1>{repository}", line) for line in cell["source"]
            ]
        if was_executed:
            notebook["metadata"][_SOURCES] = digest(notebook)
        text = json.dumps(notebook, indent=1, ensure_ascii=False)
        path.write_text(text + "\n", "utf-8")


def _is_code(cell) -> bool:
    return cell["cell_type"] == "code"


def _is_shown(output) -> bool:
    """What libraries write to standard error is no result."""
    return output["output_type"] != "stream" or output["name"] == "stdout"


def _kept(output):
    """An image needs no text beside it; a folder of this machine is nobody else's."""
    if "image/png" in output.get("data", {}):
        output["data"].pop("text/plain", None)
    shown = json.dumps(output)
    folders = re.escape(json.dumps(tempfile.gettempdir())[1:-1]) + r"/tmp\w+"
    return json.loads(re.sub(folders, "WORKDIR", shown))


def main() -> None:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(prog="python -m notebooks", description=__doc__)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(names())}")
    parser.add_argument("--repository", help="OWNER/NAME on github.com")
    asked = parser.parse_args()
    unknown = sorted(set(asked.names) - set(names()))
    if unknown:
        parser.error(f"no notebook {unknown[0]!r}: there are {', '.join(names())}.")
    if asked.repository:
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", asked.repository):
            parser.error(f"--repository={asked.repository}: OWNER/NAME is wanted.")
        publish(asked.repository)
        return
    for name in asked.names or names():
        print(name, file=sys.stderr, flush=True)
        execute(name)


if __name__ == "__main__":
    main()
