"""When and how an operation runs: modes, backends, measured choices, the files they are kept in."""
