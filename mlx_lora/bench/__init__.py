"""The benchmark suite: fixed workloads, what a run of them records, and the comparison of several machines."""
