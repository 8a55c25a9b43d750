"""kdig_utils: the helper package of the executable book on explanation-guided knowledge distillation.

The modules follow the way of the data, and import only what stands before them:

`paths` → `cifar10` → `models` → `integrated_gradients` → `losses` → `signals` → `overlay` → `controls` → `runs`
→ `engine` → `training` → `artifacts` → `study` → `campaigns`, `latency`, `claims`, `figures` → `publishing`
→ `status`, `reproduce` → the command line `python -m kdig_utils`.
"""

__version__ = "0.1.0"
