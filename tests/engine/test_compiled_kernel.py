"""Machine code of the attention kernel for sm_90: it must not get worse unseen.

Long prefixes are bound by the instructions of one loop: 64 exponentials for each warp and block of
16 rows and 128 keys take as long as all 517 instructions do, so that fewer would not be faster.
Before blocks that all rows see went without masks they were 1,123 (heads of 64) and 756 (of 128).
"""

from __future__ import annotations

import pytest
import torch

from benchmarks.gpu.compiled import Variant, compile_variant, leanest_loop
from pipeline.engine.kernels.rules import AttentionRules

B, F = torch.bfloat16, torch.float32
SASS = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], !UPT ;
        /*0020*/                   FSEL R2, R2, -INF , P0 ;
        /*0030*/               @P0 BRA 0x10 ;
        /*0040*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], !UPT ;
        /*0050*/              @!P1 BRA 0x40 ;
        /*0060*/                   ISETP.GE.AND P0, PT, R2, R3, PT ;
        /*0070*/               @P0 BRA 0x60 ;
        /*0080*/                   EXIT ;
"""


def test_the_loop_that_is_counted_is_the_leanest_with_products() -> None:
    assert leanest_loop(SASS) == (2, "HGMMA")


@pytest.mark.parametrize(
    ("variant", "product", "loop", "registers"),
    [
        (Variant(B, 64, 64), "HGMMA", 540, 246),
        (Variant(B, 128, 64), "HGMMA", 430, 232),
        (Variant(B, 64, 16), "HMMA", 310, 112),
        (Variant(B, 128, 16), "HMMA", 282, 144),
        (Variant(B, 128, 64, AttentionRules(0.1, window=1024, softcap=20.0)), "HGMMA", 860, 255),
        (Variant(F, 64, 64, heads=(4, 2)), "FFMA", 740, 104),
        (Variant(F, 64, 16, heads=(4, 2)), "FFMA", 465, 96),
    ],
    ids=str,
)
def test_code_for_a_card_is_as_lean_as_it_was(
    variant: Variant, product: str, loop: int, registers: int
) -> None:
    """Seen red, in float32: 848 bytes of stack, 5,523 instructions."""
    pytest.importorskip("triton", reason="triton is not installed; it comes for Linux alone")
    code = compile_variant(variant)
    assert code.product == product, code
    assert code.stack == 0, f"registers are spilled: {code}"
    assert code.loop <= loop and code.registers <= registers, code
