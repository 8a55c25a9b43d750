"""kdig_utils: the helper package of the executable book on explanation-guided knowledge distillation.

Five wings, and imports go one way: `method` ← `experiments`, `edge`; `experiments` ← `analysis` ← `book` ← `commands`,
those of the command line `python -m kdig_utils`. Below all of them lie `paths` and `machine`.

- `method`: what the paper describes, from the images to the loss of a batch
- `experiments`: how runs are made and kept: the ledger, many students side by side, campaigns, a GPU lent for minutes
- `analysis`: what runs mean: claims, verdicts, comparisons, faithfulness
- `edge`: how fast a network is, in which runtime
- `book`: how it is told: figures, quoted numbers, chapters run headlessly
"""

__version__ = "0.1.0"
