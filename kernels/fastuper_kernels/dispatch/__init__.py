"""When and which way an operation runs: modes, backends, measured choices."""
