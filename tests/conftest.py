"""What holds for all tests."""

from hypothesis import settings

# The same examples in every run, and no limit on the time of one: a busy machine is not a bug. A failure
# prints what reproduces it.
settings.register_profile("pdserve", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("pdserve")
