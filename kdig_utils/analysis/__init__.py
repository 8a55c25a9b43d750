"""What runs mean.

The paper's claims: `claims`, `verdicts` (the rules), `operating_characteristics` (how often they err), `eligibility`
(which runs count), `counted`, `imagenet`, `scorecard`, `scorecard_text`, `plan`.
Statistics of runs: `comparisons`, `permutation`, `sample_size`, `variance`, `frontier`, `pairing_results`, `choosing`.
Of networks: `faithfulness`, `calibration`, `corruptions`, and `explanations`, the table of all their measures.
"""
