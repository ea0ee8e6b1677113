"""Simulates whole clusters on virtual time, from a seed to a verdict.

    scripts/sim --seed 17                      one run of 200 steps on three nodes
    scripts/sim --seeds 1-500 --nodes 5        many, until one breaks an invariant
    scripts/sim --seed 17 --trace FILE         every message, write, fault and log line of the run
    scripts/sim --seeds 1-20 --twice           each seed twice; the traces must be equal

A run that breaks an invariant prints the command that repeats it exactly. The exit code is 1 then.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HASH_SEED = "0"


def fix_hashes() -> None:
    """Start anew unless strings hash as in every other run."""
    if os.environ.get("PYTHONHASHSEED") != HASH_SEED:
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {"PYTHONHASHSEED": HASH_SEED})  # noqa: S606 - itself


def seeds_of(text: str) -> range:
    """``7`` or ``1-500``."""
    first, _, last = text.partition("-")
    return range(int(first), int(last or first) + 1)


def main() -> int:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", "--seeds", type=seeds_of, required=True, help="one seed, or FIRST-LAST")
    parser.add_argument("--steps", type=int, default=200, help="of clients and faults, before everything is healed")
    parser.add_argument("--nodes", type=int, choices=(3, 5), default=3)
    parser.add_argument("--trace", type=Path, help="where to write the trace of the last run")
    parser.add_argument("--restores", action="store_true", help="let clients save and restore the whole state, too")
    parser.add_argument("--twice", action="store_true", help="run each seed twice and compare")
    return simulate_all(parser.parse_args())


def simulate_all(options: argparse.Namespace) -> int:
    """Run the seeds one after another; the exit code."""
    from tests.sim.world import simulate  # noqa: PLC0415 - after the hashes are fixed

    began, counts, virtual = time.monotonic(), Counter[str](), 0.0
    for seed in options.seed:
        rounds = [
            simulate(
                seed,
                steps=options.steps,
                nodes=options.nodes,
                keep_trace=options.trace is not None,
                restores=options.restores,
            )
            for _ in range(2 if options.twice else 1)
        ]
        report = rounds[0]
        counts.update(report.counts)
        virtual += report.seconds
        if options.trace is not None:
            options.trace.write_text("".join(report.kept))
        print(f"seed {seed}: {report.lines} lines, trace {report.trace[:16]}, {report.verdict}", flush=True)
        if len({each.trace for each in rounds}) > 1:
            print(f"seed {seed} does not replay: its two traces differ")
            return 1
        if report.violation:
            print(report.traceback, end="")
            print(f"repeat with: {report.command}")
            return 1
    print(f"{len(options.seed)} seeds, {virtual:.0f} virtual seconds in {time.monotonic() - began:.1f}")
    print_counts(counts)
    return 0


def print_counts(counts: Counter[str]) -> None:
    """What was injected, what came of it, and what of that happened while something was wrong."""
    faults = {what.removeprefix("fault "): count for what, count in counts.items() if what.startswith("fault ")}
    meanwhile = {what: count for what, count in counts.items() if " during " in what}
    rest = {what: count for what, count in counts.items() if what not in meanwhile and not what.startswith("fault ")}
    for title, found in (("faults", faults), ("events", rest), ("meanwhile", meanwhile)):
        print(f"{title}: " + ", ".join(f"{what} {count}" for what, count in sorted(found.items())))


if __name__ == "__main__":
    fix_hashes()
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
