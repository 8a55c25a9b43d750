"""What the paper describes; usable alone, with torch and torchvision.

Images and networks: `cifar10`, `models`, `artifacts`, `released` (the authors' students). The teacher's reasons:
`integrated_gradients` (to be read); `tracing`, `secants` and `attribution` (to be fast and sure). What students learn
from: `overlay`, `pairings`, `losses`, `signals` and `precompute`, which computes them. A run as a value: `spec`, with
`checks`. The loop to read: `training`.
"""
