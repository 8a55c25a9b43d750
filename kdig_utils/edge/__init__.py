"""How fast a network is, and where.

`timing` times calls; `benchmark` hears every network in every runtime of the table in `runtimes`, each in a process of
its own, and says what it found. A process (`worker`) is asked to write a file (`exporting`), or to open and to call
one; `serving` is what runs in it. `roofline` says what the machine could do at best, `records` what a row may hold.
"""
