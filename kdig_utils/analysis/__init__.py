"""What runs mean.

The paper's claims: `claims`, `verdicts` (the rules), `counted`, `imagenet`, `scorecard`, `scorecard_text`, `plan`.
Statistics of runs: `comparisons`, `variance`, `frontier`, `pairing_results`, `choosing`.
Of networks: `faithfulness`, `calibration`, `corruptions`, and `explanations`, the table of all their measures.
"""
