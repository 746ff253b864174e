"""The experiment of *KV Cache Recycling*: arms, measurements, tables. Nothing of a job needs it."""
