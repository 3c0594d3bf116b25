"""Command line: ``python -m bench CASE [options]``, ``claims [--check]``, ``tables [--check]``."""

from __future__ import annotations

import os
import sys

from bench.claims import check_claims, list_claims, update_tables
from bench.harness import BenchError, case_names, load_case

USAGE = """usage: python -m bench CASE [options]      measure, write bench/results/CASE.DEVICE.json
       python -m bench claims [--check]    list all claims; --check: recompute them from the records
       python -m bench tables [--check]    write the tables of README.md and docs/; --check: only compare
cases: """


def main(argv: list[str]) -> int:
    """Exit code: 0 done, 1 a check failed, 2 wrong usage."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line of vrlt, before torch is loaded
    command, *options = argv or [""]
    try:
        if command in ("claims", "tables") and options in ([], ["--check"]):
            return (_claims if command == "claims" else _tables)(bool(options))
        if command in case_names():
            load_case(command).run(options)
            return 0
    except BenchError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    asked = command in ("-h", "--help")
    (sys.stdout if asked else sys.stderr).write(f"{USAGE}{', '.join(case_names()) or 'none'}\n")
    return 0 if asked else 2


def _claims(check: bool) -> int:
    if not check:
        sys.stdout.write(f"{list_claims()}\n")
        return 0
    faults = check_claims()
    if faults:
        sys.stderr.write("".join(f"{fault}\n" for fault in faults))
        sys.stderr.write("measure again with python -m bench CASE; result files aren't edited by hand\n")
    return 1 if faults else 0


def _tables(check: bool) -> int:
    changed = update_tables(check=check)
    for name in changed:
        sys.stdout.write(f"{'stale' if check else 'updated'}: {name}\n")
    if check and changed:
        sys.stderr.write("run: python -m bench tables\n")
    return 1 if check and changed else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
