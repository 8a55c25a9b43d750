"""How runs are made and kept.

`ledger` holds each finished run once. `runs` makes a run ready, `steps` train it, `side_by_side` says who trains when,
`checkpoints` let it go on, `reservations` share runs among processes, `cluster` among machines; `study` has the images,
networks and signals of a profile. Lists of runs: `campaigns`, `brief`, `laptop`; `queue` orders them. Settings:
`hyperparameters`, `search`. What travels: `packs`, `publishing`, `teachers`. A GPU lent for minutes: `probes`,
`profiling`, `flight`. What a run is evidence of: `evidence`. What long work says: `reports`.
"""
