"""What the machine and the operating system give: devices, files, caches, processes, other ranks."""
