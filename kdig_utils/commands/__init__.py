"""The commands of `python -m kdig_utils`: `make_runs` and `laptop_runs` make runs, `use_runs` measures and publishes.

`options` has the kinds of numbers that they take.

What only some commands need is imported in them: it is slow to import, or not there on a bare GPU machine.
"""

from collections.abc import Callable

from kdig_utils.commands.laptop_runs import rerun
from kdig_utils.commands.make_runs import adopt, campaign, data, flight, probe, search, signals, teacher, train, unpack
from kdig_utils.commands.use_runs import (
    explain,
    first_calls,
    latency,
    links,
    publish,
    readme,
    reproduce,
    status,
    store,
)

Command = Callable[..., int | None]  # returns its exit status; None is 0

COMMANDS: tuple[Command, ...] = (
    data, teacher, adopt, signals, train, campaign, probe, flight, first_calls, search, unpack, rerun, explain,
    latency, reproduce, store, status, publish, readme, links,
)  # fmt: skip

# Of commands that are not just called by their name.
EXAMPLES = """\
data    # with KDIG_DATA=FOLDER in the environment: checks the files there
teacher --epochs 50 --validation-images 5000 --cutout 16    # a candidate, judged by validation
teacher --budget-minutes 9 --pack out    # the recipe, on all images, a part at a time
teacher --epochs 4 --schedule one_cycle --learning-rate 0.04 --initial teacher.safetensors
adopt theirs.safetensors --recipe "Adam, 30 epochs, no augmentation" --epochs 30 --learning-rate 0.001
adopt longer.safetensors --initial artifacts/teacher.safetensors --epochs 11 --recipe "SGD, by other code"
signals --budget-minutes 2    # goes on where it stopped
train --method student kd ig kd_ig --seed 0 1 2
train --method kd --k 9 --epochs 5 --campaign short
campaign next --plan
campaign next --budget-minutes 9 --pack out
campaign pairing --budget-minutes 9 --at-once 8 --way compiled
campaign laptop --workers 2    # on two CPUs; goes on where it stopped
campaign ablation --budget-minutes 240 --scheduler tcp://10.0.0.1:8786    # by the workers of a cluster
campaign compression --budget-minutes 1 --profile smoke    # a rehearsal, tiny
probe compiled --seconds 5 --json compiled.json
flight --budget-minutes 9 --pack out
first-calls results/latency/first_calls/my_card.csv
search --method kd --trials 30 --budget-minutes 240 --pack out
search --method kd_ig --storage postgresql://me@host/search --budget-minutes 9    # one of several workers
unpack out/ablation.tar.*
explain --images 1000 --budget-minutes 9 --table explanations.csv
latency --json my_device.json
latency --patience 300    # time for every export
reproduce --profile smoke --only 03,06
reproduce --profile full --resume
status --watch 30    # until Ctrl-C; into a pipe or a file, once
publish 2f1ac711c7eb 6e99d614e029    # status lists the runs
"""
