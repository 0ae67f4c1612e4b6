"""What a step costs: launches, bytes, memory, time."""
