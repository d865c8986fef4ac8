"""Read damaged files of strangers: `python -m tests.fuzzing --cases=10000`.

Prints how many of each kind were accepted and refused, and every finding once; exits
with 1 if there is one. `--seed` decides the cases.
"""

import argparse
import collections
import json
import os
import pathlib
import re
import sys
import tempfile
import time

from tests.fuzzing import campaign, seeds


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=10_000, help="in all kinds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", default=",".join(seeds.KINDS))
    parser.add_argument("--out", help="where findings and a summary are kept")
    options = parser.parse_args(argv)
    kinds = options.kinds.split(",")
    with tempfile.TemporaryDirectory() as temporary:
        scratch = pathlib.Path(options.out or temporary).absolute()
        scratch.mkdir(parents=True, exist_ok=True)
        _make_seeds(scratch / "seeds")
        summary, total = {}, 0
        for i, kind in enumerate(kinds):
            share = options.cases // len(kinds) + (i < options.cases % len(kinds))
            start = time.monotonic()
            done, refused, findings = campaign.run(kind, share, options.seed, scratch)
            spent = time.monotonic() - start
            print(
                f"{kind:12} {done:6} read {refused:6} refused "
                f"{done - refused - len(findings):6} accepted {len(findings):4} "
                f"findings {spent:6.1f} s",
                flush=True,
            )
            counted = collections.Counter(_alike(f.problem) for f in findings)
            example = {_alike(f.problem): f for f in reversed(findings)}
            for problem, count in counted.most_common():
                one = example[problem]
                where = f" {one.files}" if options.out else ""
                print(f"    {count} x {one.problem}{where}")
            summary[kind] = {
                "cases": done,
                "refused": refused,
                "findings": [finding.problem for finding in findings],
            }
            total += len(findings)
        (scratch / "summary.json").write_text(json.dumps(summary))
        count = sum(one["cases"] for one in summary.values())
        print(f"{count} cases, {total} findings")
    return int(total > 0)


def _alike(problem: str) -> str:
    """Findings that differ in values alone are one."""
    return re.sub(r"[0-9]+|'[^']*'|\"[^\"]*\"", "#", problem.partition(": ")[0])


def _make_seeds(root: pathlib.Path) -> None:
    """Write valid files in a child: JAX's threads do not live through a fork."""
    if root.exists():
        return
    pid = os.fork()
    if not pid:
        seeds.write(root)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    if status:
        sys.exit("the valid files could not be written")


if __name__ == "__main__":
    sys.exit(main())
