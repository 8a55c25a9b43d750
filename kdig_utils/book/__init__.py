"""How it is told.

`figures`: style, caption and alternative text. `repository`: address and README. `status`: what is there and what is
missing. `watch`: long runs, as they go. `reproduce`: all chapters, headlessly. `widgets`: figures that a reader can
turn. `exercises`: their checkers.
"""
