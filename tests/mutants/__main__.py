"""Build errors in, and see tests fail: `python -m tests.mutants [WORDS]`.

Words choose mutants by file or text. Each one's tests pass without it, first. Prints a
line for each that survives and the count at the end; exits with 1 if one does.
"""

import argparse
import pathlib
import sys
import tempfile
import time

from tests.mutants import catalogue, runner


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*", help="in the file's name or the edit")
    parser.add_argument("--part", default="1/1", help="such as 2/4: the second quarter")
    options = parser.parse_args(argv)
    part, parts = map(int, options.part.split("/"))
    chosen = [
        mutant
        for mutant in catalogue.MUTANTS[part - 1 :: parts]
        if not options.words
        or any(word in " ".join(mutant[:3]) for word in options.words)
    ]
    problems = [problem for m in chosen if (problem := m.problem())]
    if problems:
        sys.exit("\n".join(problems))
    survived = failed = 0
    passing: dict[str, bool] = {}
    with tempfile.TemporaryDirectory() as temporary:
        root, log = pathlib.Path(temporary, "tree"), pathlib.Path(temporary, "log")
        runner.copy(root)
        runner.import_outside(root)
        for number, mutant in enumerate(chosen, 1):
            start = time.monotonic()
            if mutant.tests not in passing:
                passing[mutant.tests] = runner.passes(root, mutant.tests, log)
            if not passing[mutant.tests]:
                said, failed = "ITS TESTS FAIL WITHOUT IT", failed + 1
            elif runner.is_seen(root, mutant, log):
                said = "seen"
            else:
                said, survived = "SURVIVES", survived + 1
            print(
                f"{number:3} {said} {time.monotonic() - start:5.1f} s "
                f"{mutant.file}: {mutant.old.strip()!r} -> {mutant.new.strip()!r}",
                flush=True,
            )
    seen = len(chosen) - survived - failed
    print(f"{len(chosen)} mutants: {seen} seen, {survived} survived, {failed} unclear")
    return int(survived + failed > 0)


if __name__ == "__main__":
    sys.exit(main())
