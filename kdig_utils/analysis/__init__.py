"""What runs mean.

The paper's claims: `claims`; what settles them: `eligibility` (which runs count), `verdicts` (the rules), `counted`;
what came of them: `scorecard`, `plan`; how often the rules err: `operating_characteristics`. Statistics of runs:
`comparisons` (with `permutation`), `sample_size`, `variance`; of the laptop protocol: `laboratory`. Of networks:
`faithfulness`, `gradients`, `calibration`, `corruptions`; `examination` asks a network all of these, `explanations` is
the table of the answers. What the authors published beside the paper: `witnesses` (their networks, measured) and
`printed` (their notebooks' figures).
"""
