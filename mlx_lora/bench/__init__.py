"""The benchmark suite of fixed workloads, and `doctor`: what one machine computes and how fast, and how several compare."""
