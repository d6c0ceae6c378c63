"""A rehearsal of Metal on Linux: the suite runs as on a Mac, as far as a machine without one can enforce.

`pytest --rehearse` installs all of it for the process (installing.py), and for the programs that tests start
(site/sitecustomize.py); `make rehearse` runs the whole suite so. What is enforced:

    refusals.py     what Metal has no kernel for ends with Metal's own message
    fake_metal.py   the device module is told that it computes on an M2, with its dtype and memory limits
    kernels.py      mlx-lm's own Metal kernels have no gradient
    system.py       no /proc, no fork, no affinity, no fadvise, macOS's units, and folders that ignore case
    host_syncs.py   counts how often the host waits for the device

What cannot be enforced here is listed in docs/development/metal.md.
"""
