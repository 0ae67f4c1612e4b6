"""The cost of a step: launches, bytes moved, memory, time."""
