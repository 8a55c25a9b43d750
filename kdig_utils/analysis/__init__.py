"""What runs mean.

The paper's claims: `claims`, `verdicts` (the rules), `counted`, `imagenet`, `scorecard`, `scorecard_text`, `plan`.
Statistics of runs: `comparisons`, `variance`, `frontier`, `pairing_results`, `choosing`.
Of networks: `faithfulness`, `calibration`, `corruptions`; `examination` asks all of a network, `explanations` is the
table of the answers.
"""
