"""Runs seeds and tells what they showed: python -m tests.simulation --seeds 0:20000 --jobs 2"""

import sys

from tests.simulation.command import main

sys.exit(main(sys.argv[1:]))
