"""What a run costs and why: the profiling command, and what is read of compiled programs and traces."""
