"""How fast a network is, and where.

`timing` times calls, `benchmark` hears every runtime in turn, each in a process of its own (`worker`, `runtimes`).
`exporting` writes the files, `roofline` says what the machine could do at best, `browser` makes the page that runs
networks in the reader's browser.
"""
