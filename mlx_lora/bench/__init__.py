"""The benchmark suite: fixed workloads, what a run of them records, and how results of several machines compare."""
