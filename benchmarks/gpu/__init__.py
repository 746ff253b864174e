"""What only a card can tell, in fifteen minutes: `python -m benchmarks.gpu --out FOLDER`.

Nobody has run this on a card yet; `--dry` runs all of it on a CPU, small, under Triton's
interpreter. Stages run in children that are killed when their box of time is over, so that none can
stop a later one; every figure is one line of JSON, on the disk before the next one is measured.

| file | |
|---|---|
| `plan.py` | which stages there are, in which order, how long each may take |
| `watch.py` | starts children, reads their lines, kills what hangs |
| `child.py` | runs stages in one process |
| `timing.py` | seconds on the device's own clock, over memory that its cache cannot hold |
| `roofline.py` | the least that a layer and a step can take: bytes and operations |
| `correctness.py`, `ceilings.py`, `layer.py`, `step.py`, `jobs.py` | the stages |
| `compiled.py` | machine code of the kernels, for which no card is needed |
| `prewarm.py` | fills Triton's cache for a card, where there is none |

Weights are random: what is generated means nothing. Prefixes are KV of random numbers in `layer`
and `step`, where what they hold does not change the time.
"""
