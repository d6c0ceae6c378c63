"""Bad inputs by the thousand: seeded mutations of good files, and hand-made nasties, through the real commands.

    seeds.py     one good file or folder of each kind
    mutate.py    what spoils bytes, JSON, safetensors and GGUF
    nasty.py     hand-made cases: each is a known way to break a reader
    kinds.py     kind, number -> a folder with the case in it, and the command that reads it
    worker.py    runs cases in a child process, each in its own folder, and watches
    runner.py    starts workers, times them, lays a death to the case that died, makes the table

`make fuzz` prints the table; tests/cli/test_fuzz.py holds a short form.
"""
