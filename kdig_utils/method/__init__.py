"""What the paper describes; usable alone, with torch and torchvision.

Images and networks: `cifar10`, `models`, `artifacts`. The teacher's reasons: `integrated_gradients` (to be read),
`secants` and `attribution` (to be fast and sure). What students learn from: `overlay`, `pairings`, `losses`, `signals`.
A run as a value: `spec`. Its loss and its images: `training`.
"""
