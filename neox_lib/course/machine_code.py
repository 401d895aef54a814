"""What a compiler made of a loop: how many numbers one instruction multiplies, read from the machine code."""

import re

# Registers of x86 (AVX-512, AVX, SSE) and of ARM (NEON), and how many fp32 numbers one holds.
REGISTERS = {"%zmm": 16, "%ymm": 8, "%xmm": 4, r"\.4s": 4}
PACKED = re.compile(r"\t(v?mulps|vfn?m(?:add|sub)\w*ps|fmul|fml[as])\s+(.+)")


def widest_product(assembly: str) -> tuple[int, str]:
    """How many fp32 products one instruction makes, at most, and that instruction; 1 and "" where there is none that
    makes several, or none that is known.

    >>> widest_product("\\tvmulss\\t%xmm1, %xmm2, %xmm2\\n\\tvmulps\\t(%rsi), %ymm5, %ymm5\\n")
    (8, 'vmulps (%rsi), %ymm5, %ymm5')
    >>> widest_product("\\tfmul\\ts0, s1, s2\\n\\tfmla\\tv0.4s, v1.4s, v2.4s\\n")
    (4, 'fmla v0.4s, v1.4s, v2.4s')
    """
    best = 1, ""
    for name, registers in PACKED.findall(assembly):
        width = max((many for mark, many in REGISTERS.items() if re.search(mark, registers)), default=1)
        if width > best[0]:
            best = width, f"{name} {registers.strip()}"
    return best
