"""What papers report of their methods, to stand beside our figures. Theirs, not measured here."""

from __future__ import annotations

from typing import NamedTuple


class Table(NamedTuple):
    """Of a paper; `note`: whose model, and what its figures leave out."""

    head: tuple[str, ...]
    rows: list[tuple[str, ...]]
    note: str


KV_PACKET = Table(
    ("data", "full", "concat", "CacheBlend 10/50/90 %", "EPIC", "SAM-KV", "packet"),
    [
        ("NIAH", ".830", ".387", ".519 / .606 / .823", ".530", ".616", ".804"),
        ("HotpotQA", ".444", ".238", ".396 / .451 / .450", ".413", ".453", ".436"),
        ("MuSiQue", ".410", ".007", ".251 / .286 / .420", ".376", ".395", ".375"),
    ],
    "KV Packet's files: Llama-3.1-8B, F1, n = 100. Its FLOPs leave out the question and loading. "
    "Its adapter of Biography gives .177 on HotpotQA.",
)
KVLINK = Table(
    ("arm", "NQ", "2Wiki", "HotpotQA", "MuSiQue"),
    [
        ("KVLink0", "40.8", "62.2", "48.1", "13.5"),
        ("KVLink5", "45.0", "66.0", "55.6", "19.2"),
        ("Block-Attention", "39.0", "64.3", "48.3", "14.3"),
        ("CacheBlend", "25.7", "31.0", "28.7", "3.7"),
    ],
    "KVLink's table: Llama-3.2-1B, fine-tuned.",
)
SYSTEMS = Table(
    ("system", "reported"),
    [
        ("KV Packet, Llama-3.1-8B", "time to first token 1.08 s to .055 s on NIAH"),
        ("KVLink, Llama-3.2-1B", "time to first token down by up to 96 %"),
        ("LazyAttention (2606.04302)", "1.40 times the throughput of Block-Attention"),
        ("MiniPIC (2606.13126)", "49 % more prefill throughput"),
        ("CacheWeaver", "order alone: time to first token down by 20 to 33 %"),
    ],
    "Systems, on machines and loads of their own.",
)
TABLES = [KV_PACKET, KVLINK, SYSTEMS]
