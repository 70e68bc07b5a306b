"""python -m tests.simulation.mutations [NAME ...]"""

import sys

from tests.simulation.mutations.hunt import main

sys.exit(main(sys.argv[1:]))
