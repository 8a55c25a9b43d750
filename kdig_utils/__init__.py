"""kdig_utils: the helper package of the executable book on explanation-guided knowledge distillation.

The modules follow the way of the data, and import only what stands before them:

- images and networks: `paths` → `cifar10` → `models`
- the teacher's reasons: `integrated_gradients` → `secants` → `attribution` → `losses` → `signals`
- training: `overlay` → `controls` → `runs` → `brief` → `evidence` → `engine` → `training` → `profiling` → `artifacts`
  → `teachers` → `campaigns` → `study`
- what runs mean: `claims` → `comparisons` → `verdicts` → `imagenet` → `counted` → `scorecard` → `scorecard_text`
  → `variance` → `frontier` → `hyperparameters` → `laboratory` → `faithfulness` → `robustness` → `explanations`
  → `prose`
- the edge: `latency` → `roofline` → `exporting` → `runtimes` → `browser` → `processes` → `court`
- a GPU lent for minutes: `queue` → `probes` → `flight`
- the book: `figures` → `publishing` → `status`, `reproduce` → the command line `python -m kdig_utils`
"""

__version__ = "0.1.0"
