"""A scheduled job on one day: which nights are due, their steps, what is published. No Prefect.

```
 unfinished nights, then tonight's:   validate ─► plan ─► generate ─► audit ─► report ─► publish
```
"""
