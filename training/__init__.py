"""What a run is made of: its parts, tasks, session, state on disk, numerics, logs and report."""
