"""What one model costs: operations, memory and time."""
