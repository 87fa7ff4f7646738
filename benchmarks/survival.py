"""Does an answer survive its device, its link and its cloud? Counted, not timed.

Random sequences of drop, repeat, reorder, cut, kill and restart against the device's and the cloud's own code over a
simulated link (the state machine of tests/edge_survival.py). The first one in which a token is lost, doubled or wrong,
or in which anything else fails, is made as short as can be, printed, and ends the run.

usage: nice python benchmarks/survival.py [--sequences 5000]
"""

from __future__ import annotations

import argparse
import sys
import traceback

from record import ROOT, Record

SEQUENCES = 5000


def sequences(record: Record, count: int) -> None:
    """Runs them."""
    sys.path.insert(0, str(ROOT))
    from hypothesis import HealthCheck, settings
    from hypothesis.stateful import run_state_machine_as_test

    import isthmus.engine
    from tests.edge_survival import Survival
    from tests.edge_world import toy_open_part

    opened = isthmus.engine.open_part
    isthmus.engine.open_part = toy_open_part
    failed = 0
    try:
        run_state_machine_as_test(
            Survival,
            settings=settings(
                max_examples=count,
                stateful_step_count=20,
                deadline=None,
                database=None,
                suppress_health_check=list(HealthCheck),
            ),
        )
    except Exception:  # whatever it is, a sequence failed, and none is tried after it
        failed = 1
        traceback.print_exc()
    finally:
        isthmus.engine.open_part = opened
    record.figure("run", Survival.done["sequences"], "sequences", target=SEQUENCES)
    record.figure("ended by a sequence that failed", failed, "of 1 run", target=0, at_most=True)
    record.table("sequences", ["what was done", "times"], sorted(Survival.done.items()))


def main() -> int:
    """Runs what was asked for and writes results/survival.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=SEQUENCES)
    options = parser.parse_args()
    record = Record("survival", vars(options))
    sequences(record, options.sequences)
    record.write()
    return 0


if __name__ == "__main__":
    sys.exit(main())
