"""Whether the simulation would notice: protocol bugs are planted in a copy of the code, one at a time.

python -m tests.simulation.mutations
python -m tests.simulation.mutations "skip the digest check"
"""
