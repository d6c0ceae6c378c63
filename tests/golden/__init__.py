"""Golden runs: the results of two trees of this project on one machine, compared bit for bit.

A change that should not change results, such as moving code, is checked against the commit before it:

    python -m golden check                              the working tree against the commit in tests/golden/BASE
    python -m golden record --tree . --out new.json     one tree's results
    python -m golden compare old.json new.json          where they differ: case, file, key

Results hold for one machine only, because each CPU rounds in its own way; so recordings are not kept in the repository.
"""
