"""Plants a bug in a copy of the tree and runs seeds there until one fails."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from tests.simulation.mutations.catalogue import MUTATIONS, Edit, Mutation

ROOT = Path(__file__).parents[3]
PARTS = ("pdserve", "router", "prefill_worker", "decode_worker", "controller", "benchmarks", "tests")
MAX_SEEDS = 500


@dataclass(frozen=True, slots=True)
class Catch:
    """How a bug was found; `seed` None: it was not."""

    mutation: Mutation
    seed: int | None
    failure: str
    seconds: float


def main(names: list[str]) -> int:
    """0 when all bugs, or all that are named, are found."""
    chosen = [mutation for mutation in MUTATIONS if not names or mutation.name in names]
    if not chosen:
        print(f"no such bug; choose from: {', '.join(mutation.name for mutation in MUTATIONS)}")
        return 2
    print(f"{'bug':<62}{'seed':>6}{'s':>6}  how it showed")
    catches = []
    for mutation in chosen:
        catches.append(catch := hunt(mutation))
        seed = "NONE" if catch.seed is None else str(catch.seed)
        print(f"{mutation.name:<62}{seed:>6}{catch.seconds:>6.0f}  {catch.failure[:140]}", flush=True)
    num_found = sum(catch.seed is not None for catch in catches)
    print(f"{num_found} of {len(catches)} bugs were found within {MAX_SEEDS} seeds")
    return int(num_found < len(catches))


def hunt(mutation: Mutation, max_seeds: int = MAX_SEEDS) -> Catch:
    """Run up to `max_seeds` seeds of the tree with this bug. Raises ValueError when it cannot be planted."""
    with tempfile.TemporaryDirectory(prefix="pdserve-mutation-") as scratch:
        tree = Path(scratch)
        for part in PARTS:
            # With what is compiled already: it goes by the sources' times, which are copied too.
            shutil.copytree(ROOT / part, tree / part, ignore=shutil.ignore_patterns("results"))
        for edit in mutation.edits:
            plant(edit, tree)
        began_at = time.monotonic()
        output = _run_seeds(tree, max_seeds)
        found = re.search(r"^seed (\d+): (.*)$", output, re.MULTILINE)
        seconds = time.monotonic() - began_at
    if found is None:
        return Catch(mutation, None, "", seconds)
    return Catch(mutation, int(found[1]), found[2], seconds)


def plant(edit: Edit, tree: Path) -> None:
    """Raises ValueError when the text to be replaced does not stand there once."""
    path = tree / edit.path
    source = path.read_text()
    if source.count(edit.old) != 1:
        raise ValueError(f"{edit.path} has {source.count(edit.old)} times, not once: {edit.old!r}")
    path.write_text(source.replace(edit.old, edit.new))


def _run_seeds(tree: Path, max_seeds: int) -> str:
    command = [sys.executable, "-m", "tests.simulation", "--seeds", f"0:{max_seeds}", "--stop-at-first"]
    environment = os.environ | {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 1) or "seeds:" not in done.stdout:
        raise RuntimeError(f"the seeds did not run: {done.stderr[-2000:]}")
    return done.stdout
